"""Cards: what is to be told of an artefact or a study, read from `DIR/paper/*.json`.

A card is data of whoever wrote it, so that nothing in it is trusted: every field may be absent or
of a wrong kind, and a file that it names must lie beside it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalab.outcomes import number, plain

VERDICTS = ("agrees", "partly", "disagrees", "finding")
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """A picture beside its card, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Grid:
    """A table as it stands in a card: cells are numbers or text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[float | str, ...], ...]


@dataclass(frozen=True)
class Card:
    """One artefact of the paper, a study, or (without `kind`) an experiment of which no card tells.

    Attributes:
        facts: what else is known, by its title, such as `seeds` and `hardware`.
        commands: title -> shell command.
        csv: the file of its points, if there is one.
        experiments: whose points it tells of.
        page: the report that lists every point.
    """

    name: str
    title: str
    kind: str = ""
    claim: str = ""
    verdict: str = ""
    sentence: str = ""
    notes: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    minutes: float | None = None
    hardware: str = ""
    date: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Grid, ...] = ()
    csv: Path | None = None
    experiments: tuple[str, ...] = ()
    page: str = ""

    @property
    def label(self) -> str:
        """The name as the paper writes it.

        >>> Card("fig12", "").label, Card("table1", "").label, Card("my_sweep", "").label
        ('Fig. 12', 'Table 1', 'my_sweep')
        """
        found = re.fullmatch(r"(fig|table)(\d+)", self.name)
        if not found:
            return self.name.capitalize() if self.kind == "study" else self.name
        return f"{'Fig.' if found[1] == 'fig' else 'Table'} {found[2]}"

    @property
    def order(self) -> tuple[Any, ...]:
        """Where the card stands: tables, figures by number, studies, plain experiments.

        >>> names = ("fig10", "rules", "fig2", "table1")
        >>> sorted(names, key=lambda name: Card(name, "", "").order)
        ['table1', 'fig2', 'fig10', 'rules']
        """
        kinds = {"artefact": 0, "study": 1}
        found = re.fullmatch(r"(table|fig)(\d+)", self.name)
        place = (("table", "fig").index(found[1]), int(found[2])) if found else (2, 0)
        return kinds.get(self.kind, 2), *place, self.name


def read_cards(directory: Path, warn: Warn) -> list[Card]:
    """Read all cards of a results directory, in the order of the paper.

    Args:
        directory: holds `paper/*.json`; no such folder is no mistake.
        warn: told in one line of every file that cannot be read.
    """
    cards = []
    for path in sorted((directory / "paper").glob("*.json")):
        try:
            cards.append(parse(json.loads(path.read_text(encoding="utf-8")), path, warn))
        except (OSError, ValueError, RecursionError) as problem:
            warn(f"skipped {path}: {' '.join(str(problem).split())}")
    return sorted(cards, key=lambda card: card.order)


def parse(card: Any, path: Path, warn: Warn) -> Card:
    """Turn the JSON of one card into a `Card`; what it names must lie beside `path`.

    Raises:
        ValueError: if it is no card.
    """
    if not isinstance(card, dict):
        raise ValueError(f"not a card but a {type(card).__name__}")
    name = text(card.get("name")) or path.stem
    commands = [
        ("command", text(card.get("command"))),
        ("at the paper's scale", text(card.get("paper_command"))),
    ]
    versions = card.get("versions")
    if isinstance(versions, dict):
        versions = ", ".join(f"{text(key)} {text(value)}" for key, value in versions.items())
    facts = {
        "stand-ins": card.get("stand_ins"),
        "points": card.get("points"),
        "seeds": card.get("seeds"),
        "minutes": card.get("minutes"),
        "hardware": card.get("hardware"),
        "cost at the paper's scale": card.get("paper_hours"),
        "versions": versions,
        "commit": card.get("commit"),
        "date": card.get("date"),
    }
    verdict = text(card.get("verdict"))
    if verdict and verdict not in VERDICTS:
        warn(f"{path}: verdict {verdict!r}, must be one of {', '.join(VERDICTS)}")
    return Card(
        name=name,
        title=text(card.get("title")) or name,
        kind=text(card.get("kind")) or "artefact",
        claim=text(card.get("claim")),
        verdict=verdict,
        sentence=text(card.get("sentence")),
        notes=tuple(text(note) for note in items(card.get("notes")) if text(note)),
        commands=tuple((title, command) for title, command in commands if command),
        facts=tuple((title, text(fact)) for title, fact in facts.items() if text(fact)),
        minutes=number(card.get("minutes")),
        hardware=text(card.get("hardware")),
        date=text(card.get("date")),
        figures=tuple(_figures(items(card.get("figures")), path.parent, warn)),
        tables=tuple(_grid(table) for table in items(card.get("tables")) if table),
        csv=beside(path.parent, card.get("csv"), (".csv",), warn),
        experiments=(name, *(text(each) for each in items(card.get("experiments")))),
    )


def text(value: Any) -> str:
    """Write any value of JSON as text; null and what is empty are nothing.

    >>> text([0, 1, 2]), text(7.10), text(None), text([])
    ('0, 1, 2', '7.1', '', '')
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(text(each) for each in value)
    return " ".join(plain(value).split())


def items(value: Any) -> list[Any]:
    """Return a list of JSON as it is, and anything else as a list of one or of none."""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def beside(folder: Path, name: Any, endings: Sequence[str], warn: Warn) -> Path | None:
    """Return the file of this name in a folder, or None if it is not one, or none of its own."""
    if not name:
        return None
    path = folder / str(name)
    try:
        inside = path.resolve().parent == folder.resolve() and path.is_file()
    except (OSError, ValueError):
        inside = False
    if not inside or path.suffix.lower() not in endings:
        warn(f"{folder}: no file {str(name)!r} here (must be {', '.join(endings)})")
        return None
    return path


MOST_BYTES = 400_000
"""Beyond this the smaller of a figure's two files is shown, be it pixels."""


def _figures(figures: Sequence[Any], folder: Path, warn: Warn) -> list[Figure]:
    found = []
    for figure in figures:
        if not isinstance(figure, Mapping):
            figure = {"file": figure}
        paths = [beside(folder, figure.get(key), (".svg", ".png"), warn) for key in ("file", "png")]
        path = lighter([path for path in paths if path])
        if path:
            found.append(Figure(path, text(figure.get("caption"))))
    return found


def lighter(paths: Sequence[Path]) -> Path | None:
    """Choose among a figure's files the first one, unless it is heavy and another is lighter."""
    sizes = [path.stat().st_size for path in paths]
    return paths[0 if sizes[0] <= MOST_BYTES else sizes.index(min(sizes))] if paths else None


def _grid(table: Any) -> Grid:
    if not isinstance(table, Mapping):
        raise ValueError(f"table {table!r}, must be an object")
    columns = tuple(text(column) for column in items(table.get("columns")))
    rows = []
    for row in items(table.get("rows")):
        cells = [_cell(value) for value in items(row)][: len(columns)]
        rows.append((*cells, *("",) * (len(columns) - len(cells))))
    return Grid(text(table.get("title")), columns, tuple(rows))


def _cell(value: Any) -> float | str:
    found = number(value)
    return text(value) if found is None else found
