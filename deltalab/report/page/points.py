"""The points that the page draws and lists: from the records, else from the cards' CSV files."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltalab.report.outcomes import Outcome, Term, rules, sort_key
from deltalab.report.page.cards import Card, Warn

_SETTING = re.compile(r"(\S+?)=(.*?)(?= \S+?=|$)")
MOST_POINTS = 10_000
"""Points that a page holds; of more, it holds this many, evenly chosen."""


@dataclass(frozen=True)
class Field:
    """A column of all points: its title, whether it holds numbers, and is left out of the table."""

    title: str
    numeric: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Points:
    """All points as rows of plain JSON, a cell for each field.

    Attributes:
        fields: name -> field, in the order of the cells; terms are called `term_<rule>`.
        total: how many points there are; `rows` are fewer where they were thinned out.
    """

    fields: Mapping[str, Field]
    rows: Sequence[Sequence[float | str | None]]
    total: int

    def values(self, name: str) -> list[Any]:
        """Return one field of all rows."""
        place = list(self.fields).index(name)
        return [row[place] for row in self.rows]

    @property
    def terms(self) -> dict[str, str]:
        """Map the fields that hold terms to their titles."""
        return {n: field.title for n, field in self.fields.items() if n.startswith("term_")}


def gather(points: Sequence[Outcome], cards: Sequence[Card], warn: Warn) -> list[Outcome]:
    """Join the records with those points of the cards' CSV files that no record tells of.

    A point of several experiments is one point, whose experiment names them all.
    """
    found = list(points)
    seen = {point.key for point in points}
    for card in cards:
        if card.csv:
            try:
                more = read_csv(card.csv)
            except (OSError, ValueError, csv.Error) as problem:
                warn(f"skipped {card.csv}: {' '.join(str(problem).split())}")
                continue
            found += [point for point in more if point.key not in seen]
    joined: dict[str, list[Outcome]] = {}
    for index, point in enumerate(found):
        joined.setdefault(point.key or str(index), []).append(point)
    merged = [replace(own[0], experiment=_names(own)) for own in joined.values()]
    return sorted(merged, key=sort_key)


def _names(points: Sequence[Outcome]) -> str:
    return ", ".join(sorted({point.experiment for point in points}))


def read_csv(path: Path) -> list[Outcome]:
    """Read the points of a card: one a line, empty cells for what was not computed.

    Raises:
        ValueError: if a column that every point has is missing, or a number is none.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        missing = [name for name in ("key", "model", "edit", "change") if name not in names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        return [_outcome(line) for line in reader]


def _outcome(line: Mapping[str, Any]) -> Outcome:
    def numbers(name: str) -> float | None:
        return float(line[name]) if line.get(name) else None

    terms = {name: name[len("term_") :] for name in line if name and name.startswith("term_")}
    return Outcome(
        model=line["model"] or "",
        edit=line["edit"] or "",
        settings=dict(_SETTING.findall(line.get("settings") or "")),
        experiment=line.get("experiment") or "",
        key=line["key"] or "",
        seed=int(line["seed"]) if line.get("seed") else None,
        select=line.get("select") or None,
        terms={rule: Term(rule, None, numbers(name)) for name, rule in terms.items() if line[name]},
        change=numbers("change"),
        error=numbers("error"),
        classed=line.get("class") or None,
    )


def tabulate(points: Sequence[Outcome], most: int = MOST_POINTS) -> Points:
    """Turn points into rows; of more than `most`, keep that many, evenly spaced in their order.

    >>> found = tabulate([Outcome("vit", "dare", {"p": 0.5}, change=0.25)])
    >>> dict(zip(found.fields, found.rows[0]))["edit"]
    'dare p=0.5'
    """
    every = [points[i * len(points) // most] for i in range(most)] if len(points) > most else points
    titles = rules(every)
    fields = {
        "model": Field("model"),
        "edit": Field("edit"),
        "family": Field("kind of edit", hidden=True),
        "seed": Field("seed", numeric=True),
        "change": Field("measured change", numeric=True),
        "error": Field("± error", numeric=True),
        **{f"term_{rule}": Field(f"term {title}", numeric=True) for rule, title in titles.items()},
        "class": Field("class"),
        "select": Field("tensors"),
        "experiment": Field("experiment"),
        "key": Field("record"),
    }
    return Points(fields, [_row(point, titles) for point in every], len(points))


def _row(point: Outcome, titles: Mapping[str, str]) -> list[float | str | None]:
    terms = [point.terms.get(rule) for rule in titles]
    return [
        point.model,
        point.label,
        point.edit,
        point.seed,
        short(point.change),
        short(point.error),
        *(None if term is None else short(term.value) for term in terms),
        "failed" if point.failure is not None else point.classed or "",
        point.select or "",
        point.experiment,
        point.key,
    ]


def short(value: float | None) -> float | None:
    """Round to six figures, which is more than any eye needs; what is not finite is nothing.

    >>> short(0.123456789), short(float("nan")), short(-1e-12)
    (0.123457, None, -1e-12)
    """
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
