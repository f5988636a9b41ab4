"""Read cards from `DIR/paper/*.json` and beside it, doubting what they hold.

A card is data of whoever wrote it, so that nothing in it is trusted: every field may be absent or
of a wrong kind, and a file that it names must lie beside it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltalab.report.page.cards import VERDICTS, Card, Figure, Grid, Warn, lighter
from deltalab.store import reading, shown
from deltalab.store.fields import number, plain


def read_cards(directory: Path, warn: Warn) -> list[Card]:
    """Read all cards of a results directory, in the order of the paper.

    Args:
        directory: holds `paper/*.json`, `merging/*.json`; no such folder is no mistake.
        warn: told in one line of every file that cannot be read.
    """
    cards = []
    for path in reading.cards(directory):
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
    name = shown.name(text(card.get("name")) or path.stem)
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
        lines=beside(path.parent, card.get("lines"), (".jsonl",), warn),
        experiments=(name, *(shown.name(text(e)) for e in items(card.get("experiments")))),
    )


def text(value: Any) -> str:
    """Write any value of JSON as text; null and what is empty are nothing.

    >>> text([0, 1, 2]), text(7.10), text(None), text([])
    ('0, 1, 2', '7.1', '', '')
    """
    if value is None or value == {}:
        return ""
    if isinstance(value, list):
        return ", ".join(text(each) for each in value)
    return shown.name(" ".join(plain(value).split()), shown.MESSAGE)


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
