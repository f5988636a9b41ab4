"""Fisher merging (arXiv 2111.09832): an average weighted by how much each entry matters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.merges import Merge, check_shares, number, one_of, weights_of


@dataclass(frozen=True)
class Fisher(Merge):
    """Average every entry by the experts' Fisher information: D = sum w_t F_t D_t / sum w_t F_t.

    It minimises sum_t w_t F_t (D - D_t)^2. F_t is the mean over the expert's calibration data of
    the squared gradients of single examples at the expert, with the labels of the data, where the
    paper draws them from the model. Entries that matter to no expert are averaged by w_t.

    Args:
        weights: w_t by expert's name, not negative and not all zero; None: all equal.
        normalise: "none", or "trace" to divide F_t by its sum over the tensor, that experts count
            alike however steep their losses are.
        ridge: what is added to every F_t, in units of the mean of all F_t over the tensor, at least
            0; it draws the result to the plain average.

    Raises:
        ValueError: a field is out of range.

    >>> merge = Fisher(weights=None, normalise="none", ridge=0.0)
    >>> deltas, steep = [torch.tensor([4.0]), torch.tensor([0.0])], [torch.ones(1), torch.ones(1)]
    >>> merge(deltas, fisher=[steep[0], 3 * steep[1]], experts=("a", "b"))
    tensor([1.])
    """

    weights: Mapping[str, float] | None
    normalise: str
    ridge: float
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_shares(self.weights)
        one_of("normalise", self.normalise, ("none", "trace"))
        number("ridge", self.ridge, lambda x: x >= 0, "0 or more")

    def check(self, experts: Sequence[str]) -> None:
        """Raise `ValueError` where the weights are not those of the experts."""
        weights_of(self.weights, experts, 1.0)

    def __call__(
        self, deltas: Sequence[Tensor], *, fisher: Sequence[Tensor], experts: Sequence[str]
    ) -> Tensor:
        """Return the average, taken in float64 and rounded once."""
        shares = weights_of(self.weights, experts, 1.0)
        scales = [self._scale(each) for each in fisher]
        pairs = [*zip(scales, fisher, strict=True)]
        means = [scale * float(each.double().mean()) for scale, each in pairs if each.numel()]
        least = self.ridge * sum(means) / len(deltas)
        top, whole, plain = (torch.zeros_like(deltas[0], dtype=torch.float64) for _ in range(3))
        for share, delta, (scale, each) in zip(shares, deltas, pairs, strict=True):
            weight = (each.double() * scale + least) * share
            top.add_(weight * delta)
            whole.add_(weight)
            plain.add_(delta, alpha=share / sum(shares))
        return torch.where(whole > 0, top / whole, plain).float()

    def _scale(self, fisher: Tensor) -> float:
        trace = float(fisher.double().sum())
        return 1 / trace if self.normalise == "trace" and trace > 0 else 1.0
