"""Which candidate to measure next, and which of those measured to recommend.

What is measured has a change on each half of the examples: half A chooses, half B is what is told.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltalab.choosing.goals import Goal
from deltalab.choosing.prediction import Expected

FACTOR = 3.0
"""By which predictions miss: one standard deviation, in either direction."""
SLACK = 1.02
"""By how much a size that is expected of a sample may exceed the goal."""


@dataclass(frozen=True)
class Measured:
    """A measured candidate.

    Attributes:
        tuned: its loss change on half A, and one error more.
        change: on half B.
        error: of that.
        bits: for each weight that is edited.
        size: of the file, bytes.
    """

    tuned: float
    change: float
    error: float
    bits: float
    size: float


def following(
    goal: Goal, expected: Sequence[Expected], measured: Mapping[int, Measured], gap: float
) -> int | None:
    """Return the candidate to measure next; None where none is left that could do.

    Of a bound on the size, the one of least expected change within it. Of a bound on the loss, the
    one of most expected gain: the probability that it keeps the bound, by `FACTOR`, times the
    logarithm of how much smaller it is than the smallest that has.

    Args:
        goal: what is asked for.
        expected: of every candidate.
        measured: of those that are, by their places.
        gap: loss of pre less that of post, half A.
    """
    left = [i for i in range(len(expected)) if i not in measured]
    if goal.name != "loss":
        left = [
            i for i in left if goal.size(expected[i].bits, expected[i].size) <= goal.most * SLACK
        ]
        return min(left, key=lambda i: (expected[i].change, expected[i].bits), default=None)
    limit = goal.most * gap
    done = [m.bits for m in measured.values() if m.tuned <= limit]
    largest = max((e.bits for e in expected), default=1.0) * SLACK
    smallest = min(done, default=largest)

    def gain(i: int) -> float:
        each = expected[i]
        kept = _below(math.log(max(limit, 1e-12) / max(each.change, 1e-12)) / math.log(FACTOR))
        return kept * math.log(smallest / each.bits) if each.bits < smallest else 0.0

    best = max(left, key=gain, default=None)
    return best if best is not None and gain(best) > 0 else None


def chosen(goal: Goal, measured: Mapping[int, Measured], gap: float) -> int | None:
    """Return the candidate to recommend by half A; None where none meets the goal."""
    if goal.name == "loss":
        fit = [i for i, m in measured.items() if m.tuned <= goal.most * gap]
        return min(fit, key=lambda i: (measured[i].bits, measured[i].tuned), default=None)
    fit = [i for i, m in measured.items() if goal.size(m.bits, m.size) <= goal.most]
    return min(fit, key=lambda i: (measured[i].tuned, measured[i].bits), default=None)


def front(measured: Mapping[int, Measured]) -> list[int]:
    """Return the candidates that lose less on half B than all that are no larger.

    >>> ones = {0: Measured(0, 1.0, 0, 1, 1), 1: Measured(0, 2.0, 0, 2, 2)}
    >>> front(ones)
    [0]
    """
    best: list[int] = []
    for i in sorted(measured, key=lambda i: (measured[i].bits, measured[i].change)):
        if not best or measured[i].change < measured[best[-1]].change:
            best.append(i)
    return best


def _below(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
