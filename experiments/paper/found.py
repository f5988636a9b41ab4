"""What an artefact's points say: checks, a verdict, tables, figures."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltalab.report.outcomes import by_pair, pair_names
from deltalab.report.tables import is_lenient, is_score
from deltalab.store.record import Outcome

NEAR = 0.02
"""How far from the post-trained model's a score may be to count as kept."""

ENOUGH = 0.95
"""The share of a check's cases that must hold for the check to hold."""

LOSSES = ("nats",)
"""Metrics that are losses: shown beside the scores, the lower the better, and not checked."""

PRIMARY = ("exact_match_strict", "acc_norm", "pass@1", "prompt_level_strict_acc", "acc", "accuracy")


@dataclass(frozen=True)
class Check:
    """One part of a claim, and in how many of its cases it holds.

    >>> Check("DARE's term is smaller", 3, 4).share
    0.75
    """

    claim: str
    held: int
    cases: int

    @property
    def share(self) -> float:
        """The share of cases that hold."""
        return self.held / self.cases if self.cases else 0.0


def check(claim: str, cases: Iterable[bool]) -> Check:
    """Count the cases of a check."""
    found = list(cases)
    return Check(claim, sum(found), len(found))


def verdict(checks: Sequence[Check]) -> str:
    """Judge a claim: it agrees where every check holds, and disagrees where none does.

    >>> verdict([Check("a", 10, 10), Check("b", 5, 10)])
    'partly'
    """
    held = [each.share >= ENOUGH for each in checks]
    if all(held):
        return "agrees"
    return "partly" if any(held) or any(c.share >= 0.5 for c in checks) else "disagrees"


@dataclass(frozen=True)
class Table:
    """A table for people: cells are texts or numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        sentence: the verdict in one sentence, with its numbers.
        checks: the parts of the claim; a study has none and no verdict.
        notes: further sentences.
        figures: the end of the file's name, the figure, its caption.
    """

    sentence: str
    checks: Sequence[Check] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str, Any, str]] = field(default=())

    @property
    def verdict(self) -> str:
        """The verdict of all checks, or `finding` for a study."""
        return verdict(self.checks) if self.checks else "finding"


def mean(values: Sequence[float]) -> float:
    """Return the mean of a point's repetitions."""
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """Return their standard deviation, 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


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
