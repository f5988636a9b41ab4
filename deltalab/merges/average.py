"""The weighted average of the experts' weights, also of checkpoints along a run (model soups)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from deltalab.merges import Merge, check_shares, weights_of


@dataclass(frozen=True)
class Average(Merge):
    """Average the deltas: D = sum_t w_t D_t / sum_t w_t.

    As the base is common, that is the average of the weights (arXiv 2203.05482).

    Args:
        weights: w_t by expert's name, not negative and not all zero; None: all equal.

    Raises:
        ValueError: a weight out of range.

    >>> import torch
    >>> one, three = torch.tensor([1.0]), torch.tensor([3.0])
    >>> Average(weights={"a": 3, "b": 1})([one, three], experts=("a", "b"))
    tensor([1.5000])
    """

    weights: Mapping[str, float] | None
    unit: ClassVar[Literal["entry", "tensor"]] = "entry"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_shares(self.weights)

    def check(self, experts: Sequence[str]) -> None:
        """Raise `ValueError` where the weights are not those of the experts."""
        weights_of(self.weights, experts, 1.0)

    def __call__(self, deltas: Sequence[Tensor], *, experts: Sequence[str]) -> Tensor:
        """Return the average, taken in float64 and rounded once."""
        shares = weights_of(self.weights, experts, 1.0)
        found = deltas[0].double() * shares[0]
        for share, delta in zip(shares[1:], deltas[1:], strict=True):
            found.add_(delta, alpha=share)
        return (found / sum(shares)).float()
