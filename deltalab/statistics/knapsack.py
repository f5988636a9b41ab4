"""The best choice for each of many items under one total: an exact 0/1 program."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def knapsack(costs: Array, losses: Array, total: int) -> Array:
    """Return for each item the choice that makes the sum of losses least within a total cost.

    min sum_i losses[i, c_i] subject to sum_i costs[i, c_i] <= total: the multiple-choice knapsack
    problem, solved exactly by dynamic programming over the cost that is spent. It takes
    items * choices * total steps, in passes over arrays of `total` numbers.

    Args:
        costs: (items, choices), integers of at least 0.
        losses: (items, choices), finite numbers; infinity where an item has no such choice.
        total: what may be spent.

    Returns:
        (items,), the index of the choice of every item. Of equal sums the cheaper one comes out.

    Raises:
        ValueError: no choice fits within the total.

    >>> knapsack(np.array([[0, 2], [0, 2]]), np.array([[9.0, 1.0], [5.0, 0.0]]), 3)
    array([1, 0])
    """
    cheapest = np.where(np.isfinite(losses), costs, np.iinfo(np.int64).max).min(1)
    spare = int(total) - sum(int(cost) for cost in cheapest)
    if spare < 0:
        raise ValueError(f"a total of {total} is less than the least cost, {int(total) - spare}")
    extra = costs - cheapest[:, None]
    spare = min(spare, int(np.where(np.isfinite(losses), extra, 0).max(1, initial=0).sum()))
    best = np.zeros(spare + 1)  # least sum of losses of the items so far, by what they may spend
    chosen = np.zeros((len(costs), spare + 1), dtype=np.uint16)
    for item, (each, loss) in enumerate(zip(extra, losses, strict=True)):
        now = np.full(spare + 1, np.inf)
        for choice in np.argsort(each, kind="stable"):
            cost = int(each[choice])
            if cost > spare or not np.isfinite(loss[choice]):
                continue
            candidate = best[: spare + 1 - cost] + loss[choice]
            better = candidate < now[cost:]
            now[cost:][better] = candidate[better]
            chosen[item, cost:][better] = choice
        best = now
    left = int(np.argmin(best))  # of equal sums the first, which spends least
    found = np.zeros(len(costs), dtype=np.int64)
    for item in reversed(range(len(costs))):
        found[item] = chosen[item, left]
        left -= int(extra[item, found[item]])
    return found
