"""Delta-CoMe: singular vectors at mixed precision (arXiv 2406.08903)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.factorised import allocated, paper_widths, quantised
from deltalab.codes.rounding import HOW
from deltalab.compressors.rounded import Rounded
from deltalab.edits import one_of, within
from deltalab.edits.coded import untouched, whole_matrix
from deltalab.linear.factor import Factors as Svd

ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class DeltaCome(Rounded):
    """Round the singular vectors of the delta, those of large singular values to more bits.

    D = sum_i s_i u_i v_i'; u_i and v_i have b_i bits an entry, with levels that are symmetric about
    zero and one scale a component. Tensors of more than two dimensions are read as (out, rest);
    those of fewer are returned as they are.

    Args:
        total: bits of all entries of U and V for each entry of the matrix, in (0, 16].
        bits: "paper" has 8, 3 and 2 bits for the first components as the paper does at rank 4096
            and fewer in proportion; "allocate" the bits of least error under the total, from 0
            to 8.
        rounding: "nearest" needs no data; "gptq" makes every error good by what is rounded later,
            with the second moments of the layer's inputs; where a tensor is no layer's weight, to
            the nearest.
        scale: "best" of some steps in squared error, or "max", to the largest magnitude.

    Raises:
        ValueError: a field is out of range.

    >>> import torch
    >>> from deltalab.linear.factor import svd
    >>> edit = DeltaCome(total=8.0, bits="paper", rounding="nearest", scale="max")
    >>> delta = torch.outer(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0]))
    >>> edit(delta, svd=lambda: svd(delta))
    tensor([[ 3.,  3.],
            [-3., -3.]])
    """

    total: float
    bits: str
    rounding: str
    scale: str
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "total"
    choices: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)

    def __post_init__(self) -> None:
        within("total", self.total, "(0, 16]")
        one_of("bits", self.bits, ("paper", "allocate"))
        one_of("rounding", self.rounding, ROUNDINGS)
        one_of("scale", self.scale, HOW)

    def encode(
        self,
        delta: Tensor,
        *args: Any,
        svd: Callable[[], Svd],
        gram: Tensor | None = None,
        **needs: Any,
    ) -> Code:
        """Return the code of the rounded factors."""
        if (shape := whole_matrix(delta)) is None:
            return untouched(delta, needs)
        factors = svd()
        if self.bits == "paper":
            widths = paper_widths(shape, self.total)
        else:
            widths = allocated(shape, factors, self.total, self.scale)
        return quantised(tuple(delta.shape), factors, widths, self.scale, gram)
