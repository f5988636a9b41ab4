"""The points that the page draws and lists: from the records, else from the cards' own files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltalab.report.outcomes import rules
from deltalab.report.page.cards import Card, Warn
from deltalab.store import reading
from deltalab.store.fields import Field, Shows
from deltalab.store.reading import sort_key
from deltalab.store.record import Outcome, table

MOST_POINTS = 10_000
"""Points that a page holds; of more, it holds this many, evenly chosen."""
TERM = "term_"
Cell = float | str | None


@dataclass(frozen=True)
class Column:
    """A column of all points: its title, whether it holds numbers, and is left out of the table."""

    title: str
    numeric: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Points:
    """All points as rows of plain JSON, a cell for each column.

    Attributes:
        fields: name -> column, in the order of the cells; terms are called `term_<rule>`.
        total: how many points there are; `rows` are fewer where they were thinned out.
    """

    fields: Mapping[str, Column]
    rows: Sequence[Sequence[Cell]]
    total: int

    def values(self, name: str) -> list[Any]:
        """Return one field of all rows, null where there is no such column."""
        if name not in self.fields:
            return [None] * len(self.rows)
        place = list(self.fields).index(name)
        return [row[place] for row in self.rows]

    @property
    def terms(self) -> dict[str, str]:
        """Map the fields that hold terms to their titles."""
        return {n: field.title for n, field in self.fields.items() if n.startswith(TERM)}


def gather(points: Sequence[Outcome], cards: Sequence[Card], warn: Warn) -> list[Outcome]:
    """Join the records with those points of the cards' files that no record tells of.

    A point of several experiments is one point, whose experiment names them all.
    """
    found = list(points)
    seen = {point.key for point in points}
    for card in cards:
        if card.lines:
            try:
                more = reading.lines(card.lines)
            except (OSError, ValueError) as problem:
                warn(f"skipped {card.lines}: {' '.join(str(problem).split())}")
                continue
            found += [point for point in more if point.key not in seen]
    joined: dict[str, list[Outcome]] = {}
    for index, point in enumerate(found):
        joined.setdefault(point.key or str(index), []).append(point)
    merged = [replace(own[0], experiment=_names(own)) for own in joined.values()]
    return sorted(merged, key=sort_key)


def _names(points: Sequence[Outcome]) -> str:
    return ", ".join(sorted({point.experiment for point in points}))


def tabulate(points: Sequence[Outcome], most: int = MOST_POINTS) -> Points:
    """Turn points into rows; of more than `most`, keep that many, evenly spaced in their order.

    >>> found = tabulate([Outcome("vit", "dare", {"p": 0.5}, change=0.25)])
    >>> dict(zip(found.fields, found.rows[0]))["edit"]
    'dare p=0.5'
    """
    every = [points[i * len(points) // most] for i in range(most)] if len(points) > most else points
    columns: dict[str, Column] = {}
    cells: list[list[Cell]] = []
    for each in table():
        if Shows.PAGE in each.shows:
            for name, column, own in VIEWS.get(each.name, _plain)(each, every):
                columns[name] = column
                cells.append(own)
    return Points(columns, list(zip(*cells, strict=True)), len(points))


Made = list[tuple[str, Column, list[Cell]]]
"""Columns with their names and cells."""


def _plain(field: Field, points: Sequence[Outcome]) -> Made:
    """Show a field in a column, or in one for each of its names, where any point has it."""
    found = [dict(field.kind.flat(getattr(point, field.name))) for point in points]
    names = dict.fromkeys(n for own in found for n, v in own.items() if v not in (None, ""))
    made: Made = []
    for name in names:
        values = [own.get(name) for own in found]
        numeric = all(isinstance(value, int | float | None) for value in values)
        cells = [_number(value) if numeric else value or "" for value in values]
        title = f"{field.title} {name}".rstrip()
        made.append((f"{field.name}_{name}".rstrip("_"), Column(title, numeric=numeric), cells))
    return made


def _number(value: float | None) -> float | None:
    return value if isinstance(value, int) else short(value)


def _differing(field: Field, points: Sequence[Outcome]) -> Made:
    """Show a field where points differ in it."""
    return _plain(field, points) if len({getattr(p, field.name) for p in points}) > 1 else []


def _edit(field: Field, points: Sequence[Outcome]) -> Made:
    return [
        (field.name, Column(field.title), [point.label for point in points]),
        ("family", Column("kind of edit", hidden=True), [point.edit for point in points]),
    ]


def _classes(field: Field, points: Sequence[Outcome]) -> Made:
    cells: list[Cell] = [
        "failed" if point.failure is not None else point.classed or "" for point in points
    ]
    return [(field.name, Column(field.title), cells)]


def _terms(field: Field, points: Sequence[Outcome]) -> Made:
    return [
        (
            f"{TERM}{rule}",
            Column(f"{field.title} {title}", numeric=True),
            [short(p.terms[rule].value) if rule in p.terms else None for p in points],
        )
        for rule, title in rules(points).items()
    ]


VIEWS: dict[str, Callable[[Field, Sequence[Outcome]], Made]] = {
    "edit": _edit,
    "settings": lambda field, points: [],  # in the edit's label
    "classed": _classes,
    "terms": _terms,
    **dict.fromkeys(("data", "objective"), _differing),
}
"""Fields that show otherwise than their kinds do."""


def short(value: float | None) -> float | None:
    """Round to six figures, which is more than any eye needs; what is not finite is nothing.

    >>> short(0.123456789), short(float("nan")), short(-1e-12)
    (0.123457, None, -1e-12)
    """
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
