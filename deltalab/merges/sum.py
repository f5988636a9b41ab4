"""Task arithmetic (arXiv 2212.04089): the weighted sum of the experts' deltas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltalab.merges import Merge, number, weights_of


@dataclass(frozen=True)
class Sum(Merge):
    """Add the deltas up: D = sum_t w_t D_t.

    w_t = 1/T gives the average of the experts' weights, w = 1 for one expert the expert itself, and
    a negative weight takes away what an expert has learned.

    Args:
        weight: w_t of every expert, any number.
        weights: w_t by expert's name, in place of `weight`.

    Raises:
        ValueError: a weight that is no number.

    >>> merge = Sum(weight=0.5, weights=None)
    >>> merge([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])], experts=("a", "b"))
    tensor([2., 0.])
    """

    weight: float
    weights: Mapping[str, float] | None
    unit: ClassVar[Literal["entry", "tensor"]] = "entry"
    version: ClassVar[int] = 1
    alone: ClassVar[Mapping[str, Any] | None] = {"weight": 1.0}

    def __post_init__(self) -> None:
        number("weight", self.weight)

    def check(self, experts: Sequence[str]) -> None:
        """Raise `ValueError` where the weights are not those of the experts."""
        weights_of(self.weights, experts, self.weight)

    def __call__(self, deltas: Sequence[Tensor], *, experts: Sequence[str]) -> Tensor:
        """Return the weighted sum, added up in the order of the experts."""
        shares = weights_of(self.weights, experts, self.weight)
        found = torch.zeros_like(deltas[0])
        for share, delta in zip(shares, deltas, strict=True):
            found.add_(delta, alpha=share)
        return found
