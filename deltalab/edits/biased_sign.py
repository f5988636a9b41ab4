"""Biased drop by the sign of the delta: a control of arXiv 2410.13841, Table 1."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.edits import Edit, within


@dataclass(frozen=True)
class BiasedSign(Edit):
    """DARE's two multipliers, given out by the sign of the delta instead of at random.

    Entries with D_ij < 0 get k, the others (1 - k p) / (1 - p).

    Args:
        k: multiplier of the negative entries, any number.
        p: in [0, 1), or null for the fraction of negative entries of each tensor, which makes the
            mean multiplier exactly 1 (the paper states none).

    Raises:
        ValueError: k or p is out of range.

    >>> BiasedSign(k=0.5, p=None)(torch.tensor([1.0, -2.0, -4.0, 1.0]))
    tensor([ 1.5000, -1.0000, -2.0000,  1.5000])
    """

    k: float
    p: float | None
    fuses: ClassVar[bool] = True
    version: ClassVar[int] = 1
    axes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        within("k", self.k, "(-inf, inf)")
        if self.p is not None:
            within("p", self.p, "[0, 1)")

    def __call__(self, delta: Tensor) -> Tensor:
        """Return the delta times the multiplier of its sign."""
        return two_multipliers(delta, delta < 0, self.k, self.p)


def two_multipliers(delta: Tensor, chosen: Tensor, k: float, p: float | None) -> Tensor:
    """Multiply the chosen entries by k and the others by (1 - k p) / (1 - p).

    Args:
        delta: any shape.
        chosen: boolean mask of delta's shape.
        k: multiplier of the chosen entries.
        p: null for the chosen fraction.
    """
    if p is not None:
        return torch.where(chosen, k * delta, (1 - k * p) / (1 - p) * delta)
    fraction = chosen.mean(dtype=torch.float64)
    others = (1 - k * fraction) / (1 - fraction)  # unused where all are chosen
    return torch.where(chosen, k * delta, others.float() * delta)
