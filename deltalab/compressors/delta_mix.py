"""DeltaMix: bits of singular vectors from a 0/1 program, and a corrected target.

ADAMIX, arXiv 2506.11087; what its reviews and summary do not say is a field here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.factorised import allocated, quantised
from deltalab.codes.rounding import HOW
from deltalab.compressors.delta_come import ROUNDINGS
from deltalab.compressors.rounded import Rounded
from deltalab.edits import one_of, whole, within
from deltalab.edits.coded import untouched, whole_matrix
from deltalab.linear.factor import Factors as Svd


@dataclass(frozen=True)
class DeltaMix(Rounded):
    """Round singular vectors to the bits that lose least, U to fit the rounded V.

    The bits of every component make the expected error of the layer's outputs least under the
    total, with at most `widths` different ones, and 0 (`factorised.allocated`). With V rounded and
    Y = S V_hat', the left factor U = D H Y' (Y H Y')^-1 makes ||(D - U Y) X|| least and is rounded
    in place of the singular vectors; H is the second moment of the layer's inputs with "gptq", the
    identity with "nearest". Tensors of more than two dimensions are read as (out, rest); those of
    fewer are returned as they are.

    Args:
        total: bits of all entries of U and V for each entry of the matrix, in (0, 16].
        widths: how many different bits there may be beside 0, from 1 to 8.
        correct: whether U is fitted to the rounded V.
        rounding: as for `delta_come.DeltaCome`.
        scale: likewise.

    Raises:
        ValueError: a field is out of range.

    >>> import torch
    >>> from deltalab.linear.factor import svd
    >>> edit = DeltaMix(total=8.0, widths=3, correct=True, rounding="nearest", scale="max")
    >>> delta = torch.outer(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0]))
    >>> edit(delta, svd=lambda: svd(delta)).round(decimals=4)
    tensor([[ 3.,  3.],
            [-3., -3.]])
    """

    total: float
    widths: int
    correct: bool
    rounding: str
    scale: str
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "total"
    choices: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)

    def __post_init__(self) -> None:
        within("total", self.total, "(0, 16]")
        whole("widths", self.widths, 1)
        within("widths", self.widths, "[1, 8]")
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
        chosen = allocated(shape, factors, self.total, self.scale, gram, self.widths)
        target = delta.flatten(1) if self.correct else None
        return quantised(tuple(delta.shape), factors, chosen, self.scale, gram, target)
