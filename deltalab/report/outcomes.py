"""What follows from the numbers of some points: classes, errors, ranks, order, unedited models.

This module needs the standard library alone, so that tables, figures and trackers start fast.
"""

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deltalab.store import pairs, shown
from deltalab.store.effects import classify
from deltalab.store.fields import plain
from deltalab.store.record import Outcome, class_of
from deltalab.store.terms import Term

RULES = ("left", "gauss")
"""The rules shown first: the paper's own (Eq. 1) and the accurate one."""


def at_margin(points: Sequence[Outcome], margin: float) -> list[Outcome]:
    """Return the points classed anew by another margin, from their numbers.

    >>> at = dict(change=0.03, error=0.001, gap=1.0, gap_error=0.1, classed="decreased")
    >>> [p.classed for p in at_margin([Outcome("vit", "dare", **at)], 0.05)]
    ['competitive']
    """
    return [replace(p, margin=margin, classed=class_of(p, p.change, margin)) for p in points]


def split_classes(point: Outcome) -> dict[str, str]:
    """Class a point on every task whose metrics hold a loss change with its standard error.

    The gap is that of the unedited models on the same task.
    """
    before, found = point.reference.get("pre", {}), dict[str, str]()
    for name, change in point.metrics.items():
        task, _, metric = name.rpartition("/")
        if metric == "loss_change":
            error, gap = point.metrics.get(f"{name}_error"), before.get(name)
            gap_error = before.get(f"{name}_error")
            if (kind := classify(change, error, gap, gap_error, point.margin)) is not None:
                found[task] = kind
    return found


def relative_error(term: Term | None, point: Outcome) -> float | None:
    """Return how far a term is from the measured change, as a fraction of that change.

    >>> relative_error(Term("left", 5, 0.75), Outcome("vit", "dare", change=1.0))
    0.25
    """
    if term is None or term.value is None or not point.change:
        return None
    return abs(term.value - point.change) / abs(point.change)


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Rank correlation, with ties at their mean rank; None where it is not defined.

    >>> spearman([1.0, 2.0, 9.0], [0.1, 0.2, 0.3]), spearman([1.0, 1.0], [1.0, 2.0])
    (1.0, None)
    """
    if len(left) < 2 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    # Rounded to what double precision holds, so that a perfect order reads 1 exactly.
    return round(statistics.correlation(_ranks(left), _ranks(right)), 12)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(bisect_left(ordered, v) + bisect_right(ordered, v) - 1) / 2 for v in values]


def rules(points: Sequence[Outcome]) -> dict[str, str]:
    """Map every rule of some points to its title: with its number of nodes if they share it.

    >>> rules([Outcome("vit", "dare", terms={"gauss": Term("gauss", 3, 0.1)})])
    {'gauss': 'gauss-3'}
    """
    found: dict[str, set[int | None]] = {}
    for point in points:
        for name, term in point.terms.items():
            found.setdefault(name, set()).add(term.points)
    order = [*(r for r in RULES if r in found), *sorted(set(found) - set(RULES))]
    titles = {}
    for name in order:
        counts = found[name]
        number = counts.pop() if len(counts) == 1 else None
        words = name.replace("_", " ")
        titles[name] = words if number is None else f"{words}-{number}"
    return titles


def by_pair(points: Sequence[Outcome]) -> list[list[Outcome]]:
    """Put points together that are of one pair and were measured alike (`Outcome.of`)."""
    found: dict[Any, list[Outcome]] = {}
    for point in points:
        found.setdefault(point.of, []).append(point)
    return list(found.values())


def references(points: Sequence[Outcome]) -> list[Outcome]:
    """Return the unedited models of points of one pair, as points called `pre` and `post`."""
    first = points[0]
    found = []
    for name in ("pre", "post"):
        metrics: dict[str, float] = {}
        for point in points:
            metrics = {**point.reference.get(name, {}), **metrics}
        measured = sorted(points, key=lambda p: p.half is not None)  # of all examples, if any is
        losses = next((p.losses for p in measured if {name, "post"} <= p.losses.keys()), None)
        if metrics or losses:
            change = None if losses is None else losses[name] - losses["post"]
            own = {each: getattr(first, each) for each in SHARED}
            found.append(type(first)(first.model, name, metrics=metrics, change=change, **own))
    return found


SHARED = ("pair", "data", "objective", "evaluator", "setup", "experiment", "unit", "config")
"""What an unedited model has in common with the edits of its pair."""


def is_reference(point: Outcome) -> bool:
    """Tell whether a point is one of `references`."""
    return point.edit in ("pre", "post") and not point.key


def pair_names(points: Sequence[Outcome], beside: Sequence[str] = ()) -> dict[Any, str]:
    """Name every pair of some points (`Outcome.of`), no two of them alike.

    Pairs of one label are told apart by their data, objective or evaluator, else by the settings
    in which they differ.

    Args:
        points: some points.
        beside: of `data`, `objective` and `evaluator` those that are shown beside the names.

    >>> some = [Outcome("vit", "dare", data=data) for data in ("mnist", "fashion")]
    >>> list(pair_names(some).values()), list(pair_names(some, ["data"]).values())
    (['vit (mnist)', 'vit (fashion)'], ['vit', 'vit'])
    """
    firsts = {point.of: point for point in points}
    found = {}
    for of, point in firsts.items():
        alike = [other for other in firsts.values() if other.pair == point.pair]
        told = [
            getattr(point, name) or "none"
            for name in ("data", "objective", "evaluator")
            if len({getattr(other, name) for other in alike}) > 1 and name not in beside
        ]
        twins = [other for other in alike if other.of[:-1] == of[:-1]]
        told += _differing(point, twins) if len(twins) > 1 else []
        found[of] = f"{point.pair} ({', '.join(told)})" if told else point.pair
    return found


def _differing(point: Outcome, twins: Sequence[Outcome]) -> list[str]:
    """Return the settings that set a point apart from others of the same names."""
    every = [pairs.settings(twin.config) for twin in twins]
    own = pairs.settings(point.config)
    keys = dict.fromkeys(name for each in every for name in each)
    apart = [name for name in keys if len({plain(each.get(name)) for each in every}) > 1]
    told = [shown.name(f"{name}={plain(own.get(name))}", 80) for name in apart[:3]]
    return told or [point.setup or "?"]
