"""What an artefact's points say: checks, a verdict, tables, figures.

A check is a claim about some cases, each of which is shown to hold, shown not to hold, or neither,
at a level of 5 % for the check as a whole. What chance makes of the points it must not take for the
claim: `experiments.paper.nulls` declares for every check what that is, and a test draws it.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deltalab.report.outcomes import by_pair, pair_names
from deltalab.report.tables import is_lenient, is_score
from deltalab.statistics.means import Mean, holm, variance
from deltalab.store.record import Outcome

NEAR = 0.02
"""How far from the post-trained model's a score may be to count as kept."""

LEVEL = 0.05
"""How often a check may agree, or disagree, by chance."""

LOSSES = ("nats",)
"""Metrics that are losses: shown beside the scores, the lower the better, and not checked."""

PRIMARY = ("exact_match_strict", "acc_norm", "pass@1", "prompt_level_strict_acc", "acc", "accuracy")


VERDICTS = ("agrees", "undecided", "partly", "disagrees")
"""From the best to the worst: a claim is worth what the worst of its checks is."""


@dataclass(frozen=True)
class Cell:
    """One case of a check.

    Attributes:
        holds: how likely points that speak so much for the claim are where it is just not true.
        fails: how likely points that speak so much against it are where it is just true.
    """

    holds: float
    fails: float


@dataclass(frozen=True)
class Check:
    """One part of a claim, and in how many of its cases it is shown to hold and not to hold."""

    name: str
    claim: str
    verdict: str
    held: int
    failed: int
    cases: int


def every(name: str, claim: str, cells: Iterable[Cell], overall: Cell | None = None) -> Check:
    """Check a claim that is made of every case.

    It agrees where each case is shown to hold: as all must, no case profits from their number. It
    disagrees where it is shown not to hold of the average over the cases, or of at least half of
    them, partly where of fewer. Holm's correction keeps chance at the level where single cases are
    counted.

    Args:
        name: of the check.
        claim: in words.
        cells: the cases.
        overall: the case of their average, where they have one.

    >>> every("a", "small", [Cell(0.01, 0.9)] * 3).verdict
    'agrees'
    >>> every("a", "small", [Cell(0.01, 0.9), Cell(0.3, 0.3)]).verdict
    'undecided'
    >>> every("a", "small", [Cell(0.01, 0.9), Cell(0.01, 0.9), Cell(1.0, 0.001)]).verdict
    'partly'
    """
    found = list(cells)
    failed = sum(p <= LEVEL / 2 for p in holm([c.fails for c in found]))
    if found and all(c.holds <= LEVEL for c in found):
        return Check(name, claim, "agrees", len(found), failed, len(found))
    held = sum(p <= LEVEL for p in holm([c.holds for c in found]))
    against = overall is not None and overall.fails <= LEVEL / 2
    against = against or (bool(failed) and 2 * failed >= len(found))
    kind = "disagrees" if against else "partly" if failed else "undecided"
    return Check(name, claim, kind, held, failed, len(found))


def average(means: Sequence[Mean]) -> Mean:
    """Return the mean of some means, its error an upper bound: as if all erred together.

    >>> average([Mean(1.0, 0.1), Mean(2.0, 0.3)])
    Mean(value=1.5, error=0.2, freedom=inf)
    """
    count = len(means)
    inverse = sum(1 / m.freedom for m in means) / count
    error = sum(m.error for m in means) / count
    return Mean(mean([m.value for m in means]), error, 1 / inverse if inverse else math.inf)


def some(name: str, claim: str, cells: Iterable[Cell]) -> Check:
    """Check a claim that is made of some case.

    It agrees where a case is shown to hold, by Holm's correction for their number, and disagrees
    where each is shown not to.

    >>> some("a", "gains", [Cell(0.01, 0.9), Cell(0.4, 0.3)]).verdict
    'agrees'
    >>> some("a", "gains", [Cell(0.03, 0.9), Cell(0.4, 0.3)]).verdict
    'undecided'
    >>> some("a", "gains", [Cell(0.9, 0.01), Cell(0.9, 0.02)]).verdict
    'disagrees'
    """
    found = list(cells)
    held = sum(p <= LEVEL for p in holm([c.holds for c in found]))
    failed = sum(c.fails <= LEVEL for c in found)
    none = bool(found) and failed == len(found)
    kind = "agrees" if held else "disagrees" if none else "undecided"
    return Check(name, claim, kind, held, failed, len(found))


def above(value: Mean, bound: float = 0.0) -> Cell:
    """Return the case that a mean lies above a bound."""
    return Cell(value.above(bound), value.below(bound))


def fisher(rank: float, count: int, most: float = 0.999) -> Mean:
    """Return Fisher's transform of a rank correlation of so many pairs, with its standard error.

    atanh(r), of error sqrt((1 + r^2 / 2) / (n - 3)) for Spearman's coefficient (Bonett and Wright,
    Psychometrika 65, 2000); 1.06 in place of 1 + r^2 / 2 is too little where r is high.

    Args:
        rank: the correlation.
        count: n.
        most: what its size is taken for at most.
    """
    inside = max(-most, min(most, rank))
    return Mean(math.atanh(inside), math.sqrt((1 + inside**2 / 2) / max(1, count - 3)))


def kept(difference: Mean, margin: float) -> Cell:
    """Return the case that a score is not below another by the margin; a gain is no loss."""
    return above(difference, -margin)


def nearer(distances: Sequence[tuple[float, float]]) -> Cell:
    """Return the case that the first of two distances is the smaller one, by the exact sign test.

    >>> nearer([(0.0, 1.0)] * 5)
    Cell(holds=0.03125, fails=1.0)
    """
    first, second = sum(a < b for a, b in distances), sum(a > b for a, b in distances)
    total = first + second

    def tail(count: int) -> float:
        return sum(math.comb(total, k) for k in range(count, total + 1)) / 2**total

    return Cell(tail(first), tail(second))


def deciding(checks: Sequence[Check]) -> Check:
    """Return the check that decides the verdict: the first of the worst."""
    return max(checks, key=lambda each: VERDICTS.index(each.verdict))


def verdict(checks: Sequence[Check]) -> str:
    """Judge a claim, all of whose parts it makes: by the worst of its checks."""
    return deciding(checks).verdict


def told(found: Check) -> str:
    """Say in words what came of a check.

    >>> told(Check("a", "the score is kept", "partly", 15, 3, 18))
    'the score is kept: shown in 15 of 18, not so in 3'
    """
    against = f", not so in {found.failed}" if found.failed else ""
    return f"{found.claim}: shown in {found.held} of {found.cases}{against}"


@dataclass(frozen=True)
class Table:
    """A table for people: cells are texts or numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


Figure = tuple[str, Any, str]
"""The end of a figure's file name, the figure, its caption."""


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        sentence: what was found in one sentence, with its numbers.
        checks: the parts of the claim.
        show: makes the tables and figures, which judging alone does not need.
        notes: further sentences.
    """

    sentence: str
    checks: Sequence[Check]
    show: Callable[[], tuple[Sequence[Table], Sequence[Figure]]]
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """The verdict of all checks."""
        return verdict(self.checks)

    @property
    def tables(self) -> Sequence[Table]:
        """The tables, made anew."""
        return self.show()[0]


def mean(values: Sequence[float]) -> float:
    """Return the mean of a point's repetitions."""
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """Return their standard deviation, 0 of a single one."""
    return math.sqrt(variance(values))


def cell(values: Sequence[float], metric: str = "") -> str:
    """Write a mean with the standard deviation over seeds: scores in per cent, losses as they are.

    >>> cell([0.95, 0.97]), cell([0.5]), cell([0.5], "gsm/nats")
    ('96.0 ± 1.4', '50.0', '0.500')
    """
    factor, digits = (1.0, 3) if is_loss(metric) else (100.0, 1)
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * spread(values):.{digits}f}" if len(values) > 1 else text


def is_loss(metric: str) -> bool:
    """Tell whether a metric is a loss.

    >>> is_loss("gsm/nats"), is_loss("gsm/acc")
    (True, False)
    """
    return metric.rpartition("/")[2] in LOSSES


def losses(points: Sequence[Outcome]) -> list[str]:
    """Return the metrics of some points that are losses."""
    return [n for n in dict.fromkeys(n for p in points for n in p.metrics) if is_loss(n)]


def scored(points: Sequence[Outcome]) -> list[str]:
    """Return one score a task, the one that the field reports, in the order of the tasks.

    >>> a = Outcome("m", "dare", metrics={"gsm/exact_match_strict": 1.0, "gsm/acc": 1.0})
    >>> scored([a])
    ['gsm/exact_match_strict']
    """
    names = dict.fromkeys(name for point in points for name in point.metrics)
    usable = [n for n in names if is_score(n) and not is_lenient(n) and "flexible" not in n]
    chosen: dict[str, str] = {}
    for name in usable:
        task, _, metric = name.rpartition("/")
        rank = PRIMARY.index(metric) if metric in PRIMARY else len(PRIMARY)
        best = chosen.get(task, "").rpartition("/")[2]
        if task not in chosen or rank < (PRIMARY.index(best) if best in PRIMARY else len(PRIMARY)):
            chosen[task] = name
    return list(chosen.values())


def pairs(points: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Return the points of every pair, by its name, in their order."""
    names = pair_names(points)
    return {names[own[0].of]: own for own in by_pair(points)}


def one_pair(points: Sequence[Outcome]) -> Sequence[Outcome]:
    """Return points as they are, where an artefact is of one pair: others are no repetitions.

    Raises:
        ValueError: they are of several pairs, data or objectives.
    """
    if len(found := pairs(points)) > 1:
        raise ValueError(f"points of several pairs, must be of one: {', '.join(found)}")
    return points


def end(points: Sequence[Outcome], name: str, metric: str) -> float:
    """Return a metric of the unedited model `pre` or `post`."""
    return next(p.reference[name][metric] for p in points if metric in p.reference.get(name, {}))


def grouped(points: Sequence[Outcome], *names: str) -> dict[tuple[Any, ...], list[Outcome]]:
    """Group points by hyper-parameters: what differs in the seed alone falls together."""
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for point in points:
        groups.setdefault(tuple(point.settings.get(n) for n in names), []).append(point)
    return groups


def metrics(points: Sequence[Outcome], name: str) -> list[float]:
    """Return a metric of all points that have it."""
    return [p.metrics[name] for p in points if name in p.metrics]
