"""TIES-Merging (arXiv 2306.01708): trim, elect a sign, average those that agree."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltalab.merges import Merge, number, one_of
from deltalab.weights.threshold import Cut, Threshold

Limit = Callable[[float, str, Tensor], Threshold | Cut]
"""Gives what a share and a scope keep of one expert's delta, or of the part of it at hand."""


@dataclass(frozen=True)
class Ties(Merge):
    """Keep the largest entries of every expert, elect each entry's sign, average who agrees.

    With T_t the trimmed deltas: s = sign(sum_t T_t), a sum of zero counting as positive, as in PEFT
    and mergekit (the authors' code takes the sign of most entries of the model); then D = weight
    times the mean of those T_t that are not zero and have the sign s, zero where none has.

    Args:
        keep: fraction of entries of largest magnitude that every expert keeps, in [0, 1].
        scope: "model" ranks an expert's entries over the whole model, as the paper does; "tensor"
            in every tensor by itself.
        weight: what the mean is multiplied by, any number.

    Raises:
        ValueError: a field is out of range.

    >>> merge = Ties(keep=1.0, scope="tensor", weight=1.0)
    >>> merge([torch.tensor([3.0, -1.0]), torch.tensor([1.0, 4.0])], quantile=())
    tensor([2., 4.])
    """

    keep: float
    scope: str
    weight: float
    unit: ClassVar[Literal["entry", "tensor"]] = "entry"
    version: ClassVar[int] = 1
    alone: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0, "weight": 1.0}

    def __post_init__(self) -> None:
        number("keep", self.keep, lambda x: 0 <= x <= 1, "in [0, 1]")
        number("weight", self.weight)
        one_of("scope", self.scope, ("model", "tensor"))

    def __call__(self, deltas: Sequence[Tensor], *, quantile: Sequence[Limit]) -> Tensor:
        """Return the merged delta."""
        trimmed = [self._trimmed(delta, index, quantile) for index, delta in enumerate(deltas)]
        found, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        sign = torch.copysign(found.new_ones(()), _elected(trimmed))
        for each in trimmed:  # times the sign, those that agree are above zero: no comparisons
            agreed = (each * sign).clamp_(min=0)
            found += agreed
            count += agreed.sign_()
        return self.weight * (found.mul_(sign) / count.clamp_(min=1))

    def _trimmed(self, delta: Tensor, index: int, quantile: Sequence[Limit]) -> Tensor:
        if self.keep == 1:
            return delta
        survivors = quantile[index](self.keep, self.scope, delta).survivors(delta)
        return torch.where(survivors, delta, 0.0)


def agreeing(deltas: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield for every expert where its entries are not zero and have the sign of the sum of all."""
    positive = _elected(deltas) >= 0
    for each in deltas:
        yield torch.where(positive, each > 0, each < 0)


def _elected(deltas: Sequence[Tensor]) -> Tensor:
    """Return the sum, whose signs are elected; where it is zero it is +0."""
    found = torch.zeros_like(deltas[0])
    for each in deltas:
        found += each
    return found
