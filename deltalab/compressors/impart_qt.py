"""ImPart-Qt: ImPart's sparse singular vectors rounded to few bits (arXiv 2504.13237, App. B)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.factorised import REFERENCE, quantised
from deltalab.codes.rounding import HOW
from deltalab.compressors.delta_come import ROUNDINGS
from deltalab.compressors.impart import MASKS, probabilities
from deltalab.compressors.rounded import Rounded
from deltalab.edits import one_of, within
from deltalab.edits.coded import seeded, untouched, whole_matrix
from deltalab.linear.factor import Factors as Svd
from deltalab.rng import Rng

CHARGES = ("paper", "code")


@dataclass(frozen=True)
class ImpartQt(Rounded):
    """Drop entries of singular vectors as ImPart does, and round the rest to 8, 3 and 2 bits.

    Two components in 4096 have 8 bits, 32 have 3 and all others 2, at least one each. The sparsity
    of U and V for which the bits of the kept entries come to the total is found by halving an
    interval, to 1e-4 of the total. Tensors of more than two dimensions are read as (out, rest);
    those of fewer are returned as they are.

    Args:
        total: bits of all kept entries for each entry of the matrix, in (0, 16].
        beta: as for `impart.Impart`.
        exponent: likewise.
        masks: likewise.
        charge: "paper" counts three bits as three, "code" as the four that the authors' code does.
        rounding: as for `delta_come.DeltaCome`.
        scale: likewise.

    Raises:
        ValueError: a field is out of range.

    >>> from deltalab.linear.factor import svd
    >>> edit = ImpartQt(4.0, 0.0, 1.0, "exact", "paper", "nearest", "max")
    >>> delta = torch.outer(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0]))
    >>> edit(delta, svd=lambda: svd(delta), rng=Rng(0, "w"))
    tensor([[ 3.,  3.],
            [-3., -3.]])
    """

    total: float
    beta: float
    exponent: float
    masks: str
    charge: str
    rounding: str
    scale: str
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "total"
    choices: ClassVar[tuple[float, ...]] = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)

    def __post_init__(self) -> None:
        within("total", self.total, "(0, 16]")
        within("beta", self.beta, "[0, 1)")
        within("exponent", self.exponent, "[0, inf)")
        one_of("masks", self.masks, MASKS)
        one_of("charge", self.charge, CHARGES)
        one_of("rounding", self.rounding, ROUNDINGS)
        one_of("scale", self.scale, HOW)

    def encode(
        self,
        delta: Tensor,
        *args: Any,
        svd: Callable[[], Svd],
        rng: Rng,
        gram: Tensor | None = None,
        **needs: Any,
    ) -> Code:
        """Return the code of the kept entries, rounded."""
        if (shape := whole_matrix(delta)) is None:
            return untouched(delta, needs)
        factors = svd()
        widths = grouped(len(factors[1]))
        drop = self.drop(factors[1], shape, widths)
        chosen = torch.where(drop.cpu() < 1, widths, 0)
        again = (1 - drop).square().reciprocal()
        settings = seeded(rng, self.masks == "exact")
        return quantised(
            tuple(delta.shape), factors, chosen, self.scale, gram, None, drop, again, settings
        )

    def drop(self, s: Tensor, shape: tuple[int, int], widths: Tensor) -> Tensor:
        """Return p_i of every component, for which the kept entries come to the total."""
        charged = torch.where((widths == 3) & (self.charge == "code"), 4, widths).to(s.device)
        units = self.total * shape[0] * shape[1] / sum(shape)

        def spent(sparsity: float) -> tuple[Tensor, float]:
            found = probabilities(s, shape, sparsity, self.beta, self.exponent)
            return found, float(((1 - found.double()) * charged).sum())

        low, high = 0.0, 1.0
        drop, bits = spent(low)
        if bits <= units:
            return drop
        drop, bits = spent(high)
        for _ in range(40):
            middle = (low + high) / 2
            found, now = spent(middle)
            if now > units:
                low = middle
            else:
                high, drop, bits = middle, found, now
            if units - 1e-4 * units <= bits <= units:
                break
        return drop


def grouped(rank: int) -> Tensor:
    """Return 8, 3 and 2 bits for the components of a matrix, as `ImpartQt` says.

    >>> grouped(5).tolist()
    [8, 3, 2, 2, 2]
    """
    widths = torch.full((rank,), 2)
    first, second = (max(1, round(count * rank / REFERENCE)) for count in (2, 32))
    widths[first : first + second], widths[:first] = 3, 8
    return widths
