"""The choices that the loss is predicted to suffer least from: allocation by the loss change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deltalab.budgets import Budget, Choice, Tensors, check, in_bits, refused
from deltalab.statistics.knapsack import knapsack

GRAIN = 1 << 16
"""Parts of a bit a weight in which costs are counted, each rounded up."""
SIGNALS = ("loss", "noise", "energy")


@dataclass(frozen=True)
class Knapsack(Budget):
    """Choose for every tensor so that the predicted loss change is least within the total.

    dL = sum_l a_l ||E_l||^2 + <g_l, E_l>, E_l = D_hat_l - D_l as each choice really gives it, a_l
    the loss change for each unit of squared error, measured with noise (arXiv 2411.17525), and g_l
    the loss gradient half-way to what the edit gives without a budget: the mean term of codes that
    are biased (of random ones the part of E_l along D_l). The program is solved
    exactly, with costs rounded up to 2^-16 bits a weight of the whole, and its solution is never
    worse than the best that is the same for all tensors.

    Args:
        total: null: what the edit's own settings take, bits a weight, or megabytes.
        unit: "bits" or "megabytes".
        choices: values of the edit's setting; null for those that the edit names.
        signal: "loss" as above; "noise" without the mean term; "energy" has a_l = 1 too, and needs
            no objective.

    Raises:
        ValueError: a field is out of range.

    >>> a = Tensors(10, choices=(Choice(None, 20, 1.0), Choice(1, 10, 4.0)), sensitivity=9.0)
    >>> b = Tensors(10, choices=(Choice(None, 20, 1.0), Choice(1, 10, 4.0)), sensitivity=1.0)
    >>> Knapsack(1.5, "bits", None, "loss")({"a": a, "b": b}, "total")
    {'a': None, 'b': 1}
    """

    total: float | None
    unit: str
    choices: list[Any] | None
    signal: str
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check(self.total, self.unit)
        if self.signal not in SIGNALS:
            raise ValueError(f"budget.signal={self.signal}: must be one of {', '.join(SIGNALS)}")
        if self.choices is not None and not (isinstance(self.choices, list) and self.choices):
            raise ValueError(f"budget.choices={self.choices}: must be null, or a list of values")

    def wants(self, spends: str) -> tuple[str, ...]:
        """Return what choices take, and what the loss makes of errors."""
        return ("choices",) if self.signal == "energy" else ("choices", "sensitivity")

    def __call__(self, tensors: Mapping[str, Tensors], spends: str) -> dict[str, Any]:
        """Return every tensor's choice."""
        if not tensors:
            return {}
        total = in_bits(self.total, self.unit, tensors)
        costs, losses = table([*tensors.values()], self.signal == "loss")
        least = int(costs.min(1).sum())
        if least > total:
            raise refused(total, least, tensors)
        grain = max(1, sum(one.entries for one in tensors.values()) // GRAIN)
        candidates = [np.full(len(tensors), at) for at in range(costs.shape[1])]
        try:
            candidates.insert(0, knapsack(-(-costs // grain), losses, total // grain))
        except ValueError:  # rounded up, not even the cheapest fit
            candidates.insert(0, costs.argmin(1))
        found: list[tuple[float, int, Any]] = []
        every = np.arange(len(tensors))
        for chosen in candidates:
            if costs[every, chosen].sum() <= total:
                found.append((float(losses[every, chosen].sum()), len(found), chosen))
        best = min(found, key=lambda each: each[:2])[2]
        return {
            name: one.choices[at].share
            for (name, one), at in zip(tensors.items(), best.tolist(), strict=True)
        }


def table(tensors: "list[Tensors]", mean: bool) -> tuple[Any, Any]:
    """Return what every choice of every tensor takes, and what it is predicted to change the loss.

    A choice that takes more bits and is predicted to change it more is there too: the program
    leaves it alone.

    Args:
        tensors: what is known of each.
        mean: whether the gradient's share counts.
    """
    costs = np.array([[c.bits for c in one.choices] for one in tensors], dtype=np.int64)
    losses = np.array([[predicted(one, c, mean) for c in one.choices] for one in tensors])
    return costs, losses


def predicted(one: Tensors, choice: Choice, mean: bool = True) -> float:
    """Return the predicted loss change of one choice, a ||E||^2 + <g, E>; without the mean term."""
    return one.sensitivity * choice.error + (choice.slope if mean else 0.0)
