"""What is claimed of merges, check by check, all written before the points that judge were run."""

import math
from collections.abc import Callable, Sequence

from deltalab.report.outcomes import spearman
from deltalab.statistics.means import Mean, holm
from deltalab.store.record import Outcome
from experiments.merging.families import Family
from experiments.paper.evidence import Evidence
from experiments.paper.found import LEVEL, NEAR, Cell, Check, above, every, fisher, kept, some

FOUR = ("svc", "tsv", "iso", "regmean delta")
"""Methods that are to be as good as task arithmetic."""

USUAL = 0.3
"""The weight of task arithmetic in the field's tables; beside it 1/T and 1 are tried."""

RELATIVE, ABSOLUTE, MODERATE = 0.02, 1e-4, 0.5
"""A term is accurate within 2 % of the change or 1e-4 nats, where that is below half a nat."""

SHARE = 0.95
"""Of the cells in which it must be."""

RANK = 0.9
"""The rank correlation that a prediction must have with the measured change."""

PREDICTION = "second_order"


def checks(found: Sequence[Family], evidence: Evidence) -> list[Check]:
    """Return all checks; where an experiment lacks a method, so do they."""
    merging = [f for f in found if len(f.experts) > 2]
    against = [
        gain
        for family in merging
        for name in FOUR
        if name in family.methods
        for gain in [apart(family, evidence, family.chosen(name), arithmetic(family))]
    ]
    return [
        _two(against),
        some("better", "tuned on half A, one of them scores higher than that", map(above, against)),
        every("svc", "SVC of the sum loses less than the sum, every expert",
              _less(found, evidence, ("svc", 1.0), ("sum", 1.0), 1.0)),
        every("emr", "EMR loses at most half of what the mean of the weights does, every expert",
              _less(found, evidence, ("emr", None), ("average", None), 0.5)),
        every("term", f"the term is within {RELATIVE:.0%} or {ABSOLUTE:g} nats on"
              f" {SHARE:.0%} of the ways below half a nat, and the others carry the mark",
              accurate(found)),
        every("ranks", f"{PREDICTION.replace('_', ' ')} ranks the merges by their loss change with"
              f" a Spearman correlation above {RANK}, every expert",
              [ranked(pair) for pair, _ in _ranks(found)]),
        every("beats", "it ranks them better than the size of the shift does, every expert",
              [further(*pair) for pair in _ranks(found)]),
    ]  # fmt: skip


def arithmetic(family: Family) -> Outcome:
    """Return task arithmetic at the weight of .3, 1/T and 1 that scores best, by what is judged."""
    weights = dict.fromkeys([USUAL, 1 / len(family.experts), 1.0])
    return max(family.with_weight("sum", *weights), key=family.score)


def apart(family: Family, evidence: Evidence, one: Outcome, other: Outcome) -> Mean:
    """Return how much higher the experts' mean score is with one merge than with another.

    Documents are paired, and experts have documents of their own.
    """
    total = Mean(0.0, 0.0)
    for expert in family.experts:
        sides = (1.0, [family.of(one, expert)]), (-1.0, [family.of(other, expert)])
        gain = evidence.score(family.metric[expert], *sides, least=NEAR)
        total = total - gain * (-1 / len(family.experts))
    return total


def _two(against: Sequence[Mean]) -> Check:
    """Check that two of the four are no worse than task arithmetic, by less than two points."""
    cells = [kept(gain, NEAR) for gain in against]
    claim = (
        f"tuned on half A, two of {', '.join(FOUR)} are less than {100 * NEAR:.0f} points below"
        " task arithmetic at the best of its weights"
    )
    held = sum(p <= LEVEL for p in holm([c.holds for c in cells]))
    failed = sum(p <= LEVEL / 2 for p in holm([c.fails for c in cells]))
    kind = "agrees" if held >= 2 else "disagrees" if len(cells) - failed < 2 else "undecided"
    return Check("two", claim, kind, held, failed, len(cells))


def _less(
    found: Sequence[Family],
    evidence: Evidence,
    one: tuple[str, float | None],
    other: tuple[str, float | None],
    times: float,
) -> list[Cell]:
    """Return the cases of experts that lose less by one merge than so many times by another."""
    cells = []
    for family in found:
        sides = [_at(family, *each) for each in (one, other)]
        for expert in family.experts:
            a, b = (family.of(side, expert) for side in sides)
            cells.append(above(evidence.change((times, [b]), (-1.0, [a]))))
    return cells


def _at(family: Family, name: str, weight: float | None) -> Outcome:
    own = family.methods[name] if weight is None else family.with_weight(name, weight)
    return own[0]


def near(way: Outcome) -> bool:
    """Tell whether the term of an expert's way is accurate."""
    term, change = way.terms["adaptive"].value or 0.0, way.change or 0.0
    return abs(term - change) <= max(ABSOLUTE, RELATIVE * abs(change))


def moderate(found: Sequence[Family]) -> list[Outcome]:
    """Return the experts' ways below half a nat."""
    return [w for f in found for w in f.ways() if abs(w.change or 0.0) < MODERATE]


def accurate(found: Sequence[Family]) -> list[Cell]:
    """Return whether enough terms are accurate, and whether all others are marked.

    Nothing is estimated here: all ways were measured, and both are so or are not.
    """
    ways = moderate(found)
    off = [way for way in ways if not near(way)]
    enough = len(ways) - len(off) >= SHARE * len(ways)
    marked = all(way.terms["adaptive"].converged is False for way in off)
    return [Cell(0.0, 1.0) if so else Cell(1.0, 0.0) for so in (enough, marked)]


Ranked = tuple[list[float], list[float]]
"""Predictions and what they are of."""


def ranks(family: Family, expert: str, of: Callable[[Outcome], float | None]) -> Ranked:
    """Return what is said of an expert's loss change by every merge that was not fitted, and it."""
    ways = [family.of(point, expert) for point in family.points]
    both = [(of(way), way.change) for way in ways if way.half is None]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    return [a for a, _ in known], [b for _, b in known]


def by_prediction(way: Outcome) -> float | None:
    """Return what is predicted of a way."""
    return way.prediction.get(PREDICTION)


def by_shift(way: Outcome) -> float | None:
    """Return how far a way goes."""
    return way.relative_shift


def _ranks(found: Sequence[Family]) -> list[tuple[Ranked, Ranked]]:
    return [
        (ranks(family, expert, by_prediction), ranks(family, expert, by_shift))
        for family in found
        for expert in family.experts
    ]


def ranked(pair: Ranked, bound: float = RANK) -> Cell:
    """Return the case that a rank correlation lies above a bound, by Fisher's transformation."""
    return above(_fisher(pair), math.atanh(bound))


def further(one: Ranked, other: Ranked) -> Cell:
    """Return the case that one rank correlation is higher than another, as if independent."""
    return above(_fisher(one) - _fisher(other))


def _fisher(pair: Ranked) -> Mean:
    count = len(pair[0])
    # At most less than one exchange of neighbours.
    return fisher(spearman(*pair) or 0.0, count, most=1 - 1 / (10 * count**2))
