"""Random edits over their draws: the mean change, its error over draws and examples, its class.

A point of a random edit is one draw. What the edit does is the mean over draws, and two draws may
differ by more than the examples' error tells, so that a class of the edit counts both.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deltalab.report.outcomes import pair_names
from deltalab.report.tables import NONE, Column, measured
from deltalab.statistics.means import Mean, factor, over_draws, two_way
from deltalab.store.effects import CLASSES, MARGINS, classify
from deltalab.store.record import Outcome

Examples = Callable[[Outcome], Sequence[float] | None]
"""Gives what every example of the objective says of a point's loss change, where it was kept."""


@dataclass(frozen=True)
class Drawn:
    """An edit over its draws.

    Attributes:
        points: one for each draw, which differ in the seed alone.
        change: their mean change, its error that of draws and examples.
        exact: whether the error is that of the two-way table, or the bound of `over_draws`.
    """

    points: Sequence[Outcome]
    change: Mean
    exact: bool

    def classed(self, margin: float | None = None) -> str | None:
        """Return the edit's class by its mean change, at the points' own margin or another."""
        one = self.points[0]
        share = one.margin if margin is None else margin
        change, error, wide = self.change.value, self.change.error, factor(self.change.freedom)
        return classify(change, error, one.gap, one.gap_error, share, wide)


def drawn(points: Sequence[Outcome], examples: Examples = lambda point: None) -> list[Drawn]:
    """Join the points that differ in the seed alone, in their order; edits with two draws or more.

    >>> a = dict(error=0.3, gap=1.0, gap_error=0.1, losses={"post": 1.0})
    >>> two = [Outcome("vit", "dare", {"p": 0.5}, seed=s, change=0.1 * s, **a) for s in (0, 1)]
    >>> [(each.change.value, each.classed()) for each in drawn(two)]
    [(0.05, 'undecided')]
    """
    same: dict[tuple[object, ...], list[Outcome]] = {}
    for p in points:
        if p.change is not None and p.error is not None and p.seed is not None:
            at = p.of, p.label, p.select, p.half, p.losses.get("post")
            same.setdefault(at, []).append(p)
    return [_join(own, examples) for own in same.values() if len({p.seed for p in own}) > 1]


def _join(points: Sequence[Outcome], examples: Examples) -> Drawn:
    known = [examples(p) for p in points]
    values = [v for v in known if v is not None]
    if len(values) == len(points) and len({len(v) for v in values}) == 1:
        return Drawn(points, two_way(values), exact=True)
    changes, errors = [p.change or 0.0 for p in points], [p.error or 0.0 for p in points]
    return Drawn(points, over_draws(changes, errors), exact=False)


def table(found: Sequence[Drawn]) -> list[Column]:
    """Return the columns of a table of edits over their draws, classed at several margins."""
    one = [each.points[0] for each in found]
    pairs = pair_names(one)
    columns = [
        Column("model", [pairs[p.of] for p in one], right=False),
        Column("edit", [p.label for p in one], right=False),
    ]
    if len({p.select for p in one}) > 1:
        columns.append(Column("select", [p.select or NONE for p in one], right=False))
    changes = [measured(e.change.value, e.change.error) for e in found]
    both = list(zip(changes, found, strict=True))
    columns += [
        Column("draws", [str(len(e.points)) for e in found]),
        Column("mean change", [c + ("" if e.exact else " *") for c, e in both]),
        Column("class", [e.classed() or NONE for e in found], right=False),
        Column("of single draws", [_counted(e.points) for e in found], right=False),
    ]
    others = [m for m in MARGINS if m not in {p.margin for p in one}]
    columns += [
        Column(f"at {100 * m:g} %", [e.classed(m) or NONE for e in found], right=False)
        for m in others
    ]
    return columns


def _counted(points: Sequence[Outcome]) -> str:
    counts: Mapping[str, int] = Counter(p.classed for p in points if p.classed)
    return ", ".join(f"{counts[name]} {name}" for name in CLASSES if counts.get(name)) or NONE
