"""Points in files for other programs, every field, one line a point: JSON lines, CSV, Parquet."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltalab.store import files, shown
from deltalab.store.fields import Shows, plain
from deltalab.store.record import Outcome, flat, line

ENDINGS = (".jsonl", ".csv", ".parquet")


def write(points: Sequence[Outcome], path: Path, figures: int | None = None) -> Path:
    """Write points into a file, which appears whole.

    Args:
        points: some points, in order.
        path: ends in `.jsonl`, `.csv` or `.parquet`.
        figures: round numbers to so many significant figures; None leaves them as they are.

    Raises:
        ValueError: the file has another ending, or pyarrow, which writes Parquet, is missing.
        OSError: it cannot be written.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"export={path}: must end in {', '.join(ENDINGS)}")
    if path.suffix == ".parquet":
        return _parquet(points, path)
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


def _parquet(points: Sequence[Outcome], path: Path) -> Path:
    """Write a table of typed columns: numbers where all of a column are, else text."""
    try:
        from pyarrow import parquet, table  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"export={path}: needs pyarrow (pip install pyarrow)") from None
    columns, rows = sheet(points)
    made = {
        name: _typed(list(values))
        for name, values in zip(columns, zip(*rows, strict=True), strict=True)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = files.temporary(path)
    try:
        parquet.write_table(table(made), partial)
        files.sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _typed(values: list[Any]) -> list[Any]:
    """Return values of one type, beside None.

    >>> _typed([1, 0.5, None]), _typed([1, "fit"]), _typed([True, None])
    ([1.0, 0.5, None], ['1', 'fit'], [True, None])
    """
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and kinds <= {int, float, bool, str}:
        return values
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values]
    return [None if value is None else str(plain(value)) for value in values]
