"""More of what varies more: UltraDelta's mixed sparsity (arXiv 2505.13563)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deltalab.budgets import Budget, Tensors

MOST = 0.99
"""The largest rate, as in the authors' code."""


@dataclass(frozen=True)
class Thirds(Budget):
    """Drop more of the tensors of small deltas, less of those of large ones, as many in all.

    In the order of the deltas' standard deviations, the tensors up to a third of all parameters
    have rate + step, those up to two thirds the rate itself, and the others the rate with which the
    whole has the edit's own. It is for edits that spend a drop rate. Rates are between 0 and 0.99,
    which the last third's may miss.

    Args:
        step: at least 0, below 1; 0 is no budget.

    Raises:
        ValueError: the step is out of range.

    >>> own = {n: Tensors(10, 0.5, std) for n, std in [("a", 3.0), ("b", 1.0), ("c", 2.0)]}
    >>> Thirds(step=0.25)(own, "rate")
    {'b': 0.75, 'c': None, 'a': 0.25}
    """

    step: float
    version: ClassVar[int] = 1
    spends: ClassVar[tuple[str, ...]] = ("rate", "p")

    def __post_init__(self) -> None:
        if not 0 <= self.step < 1:
            raise ValueError(f"budget.step={self.step}: must be in [0, 1)")

    def wants(self, spends: str) -> tuple[str, ...]:
        """Return the deltas' standard deviations."""
        return ("std",)

    def __call__(self, tensors: Mapping[str, Tensors], spends: str) -> dict[str, Any]:
        """Return every tensor's rate."""
        order = sorted(tensors, key=lambda name: (tensors[name].std, name))
        if not self.step or not order:
            return dict.fromkeys(order)
        total, rate = sum(one.entries for one in tensors.values()), float(tensors[order[0]].own)
        shares: dict[str, Any] = {}
        last, seen, dropped = [], 0, 0.0
        for name in order:
            seen += tensors[name].entries
            if 3 * seen <= total:
                shares[name] = min(rate + self.step, MOST)
            elif 3 * seen <= 2 * total:
                shares[name] = None
            else:
                last.append(name)
                continue
            dropped += tensors[name].entries * (rate if shares[name] is None else shares[name])
        left = sum(tensors[name].entries for name in last)
        rest = min(max((rate * total - dropped) / left, 0.0), MOST)
        return {**shares, **dict.fromkeys(last, rest)}
