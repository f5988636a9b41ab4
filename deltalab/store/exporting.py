"""Points in files for other programs: every field, one line a point, as JSON lines or as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltalab.store import files, shown
from deltalab.store.fields import Shows, plain
from deltalab.store.record import Outcome, flat, line

ENDINGS = (".jsonl", ".csv")


def write(points: Sequence[Outcome], path: Path, figures: int | None = None) -> Path:
    """Write points into a file, which appears whole.

    Args:
        points: some points, in order.
        path: ends in `.jsonl` or `.csv`.
        figures: round numbers to so many significant figures; None leaves them as they are.

    Raises:
        ValueError: the file has another ending.
        OSError: it cannot be written.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"export={path}: must end in {' or '.join(ENDINGS)}")
    text = _csv(points) if path.suffix == ".csv" else _lines(points, figures)
    return files.write(path, text)


def _lines(points: Sequence[Outcome], figures: int | None) -> str:
    made = (json.dumps(line(point, figures), ensure_ascii=False) for point in points)
    return "".join(f"{text}\n" for text in made)


def sheet(points: Sequence[Outcome]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns that any of some points has, and a row of plain values for each point.

    >>> sheet([Outcome("vit", "dare", {"p": 0.5}), Outcome("vit", "ties", {"keep": 0.3})])[1][1][:4]
    ['vit', 'vit', 'ties', None]
    """
    every = [flat(point, Shows.EXPORT) for point in points]
    columns = list(dict.fromkeys(name for own in every for name in own))
    return columns, [[own.get(name) for name in columns] for own in every]


def _csv(points: Sequence[Outcome]) -> str:
    columns, rows = sheet(points)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(shown.cell, columns))
    for row in rows:
        cells = [plain(value) if isinstance(value, list | bool) else value for value in row]
        writer.writerow(map(shown.cell, cells))
    return text.getvalue()
