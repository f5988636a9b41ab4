"""The outcome of one point as its record tells it, and what follows from its numbers.

This module needs the standard library alone, so that tables, figures and trackers start fast.
"""

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltalab.store.effects import MARGIN, classify

RULES = ("left", "gauss")
"""The rules shown first: the paper's own (Eq. 1) and the accurate one."""


@dataclass(frozen=True)
class Term:
    """The Riemann approximation of one point's loss change by one rule, in the loss's unit."""

    rule: str
    points: int | None
    value: float | None
    by_part: Mapping[str, float] = field(default_factory=dict)
    converged: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """What a record says of one edit of one pair; what the run did not compute is None or empty.

    Attributes:
        settings: the edit's hyper-parameters, in the order of its yaml.
        terms: rule name -> term; `main` names the rule of the record's own `term`.
        change: measured loss change and `error` its standard error, in `unit`.
        gap: pre's loss minus post's on the same examples, and `gap_error` its standard error.
        half: of the objective's examples, that the losses are of; None: all.
        margin: which share of the gap `classed` takes for no change.
        metrics: `<task>/<metric>` -> value; accuracies are fractions.
        reference: metrics of the unedited models, by `pre` and `post`.
        failure: the message of a point that failed.
    """

    model: str
    edit: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    experiment: str = "runs"
    key: str = ""
    seed: int | None = None
    select: str | None = None
    terms: Mapping[str, Term] = field(default_factory=dict)
    main: str | None = None
    change: float | None = None
    error: float | None = None
    gap: float | None = None
    gap_error: float | None = None
    half: str | None = None
    margin: float = MARGIN
    losses: Mapping[str, float] = field(default_factory=dict)
    objective: str | None = None
    unit: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    classed: str | None = None
    gradient_evaluations: float | None = None
    seconds: float | None = None
    failure: str | None = None

    @property
    def label(self) -> str:
        """The edit with its hyper-parameters, as in `dare p=0.5 k=0`."""
        return label(self.edit, self.settings)


def label(edit: str, settings: Mapping[str, Any]) -> str:
    """Name an edit with its hyper-parameters, those that are set, for a person.

    >>> label("dare", {"p": 0.5, "k": 0.0}), label("twin", {"rank": 4, "rate": None})
    ('dare p=0.5 k=0', 'twin rank=4')
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return " ".join([edit, *(f"{name}={plain(value)}" for name, value in given.items())])


def plain(value: Any) -> str:
    """Write one setting as a person would.

    >>> plain(0.30000000000000004), plain(None), plain(True), plain([1, 2.0])
    ('0.3', 'none', 'true', '[1,2]')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(plain(each) for each in value) + "]"
    return str(value)


def at_margin(points: Sequence[Outcome], margin: float) -> list[Outcome]:
    """Return the points classed anew by another margin, from their numbers.

    >>> at = dict(change=0.03, error=0.001, gap=1.0, gap_error=0.1, classed="decreased")
    >>> [p.classed for p in at_margin([Outcome("vit", "dare", **at)], 0.05)]
    ['competitive']
    """
    return [replace(p, margin=margin, classed=class_of(p, p.change, margin)) for p in points]


def class_of(
    point: Outcome, change: float | None, margin: float | None = None, factor: float = 2.0
) -> str | None:
    """Class a change as if it were the point's, with the point's error and gap."""
    share = point.margin if margin is None else margin
    return classify(change, point.error, point.gap, point.gap_error, share, factor)


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


def sort_key(point: Outcome) -> tuple[Any, ...]:
    """Order points by model, edit, hyper-parameters (numbers by value), selection and seed."""
    settings = [(name, *_ordered(value)) for name, value in point.settings.items()]
    return point.model, point.edit, settings, point.select or "", point.seed or 0, point.key


def _ordered(value: Any) -> tuple[int, float, str]:
    found = number(value)
    return (0, found, "") if found is not None else (1, 0.0, plain(value))


def references(points: Sequence[Outcome]) -> list[Outcome]:
    """Return the unedited models of some points of one pair, as points called `pre` and `post`."""
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
            blank = Outcome(first.model, name, experiment=first.experiment)
            found.append(replace(blank, metrics=metrics, change=change))
    return found


def number(value: Any) -> float | None:
    """Return a value of JSON as a number, or None if it is none.

    >>> number(3), number("3"), number(True)
    (3.0, None, None)
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None
