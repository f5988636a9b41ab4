"""Read the points of a results directory, doubting what it holds: anyone may write there."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from deltalab.store import shown
from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome, fault, parse
from deltalab.store.records import enrolled, path_of

Warn = Callable[[str], None]
TRACKED = "wandb/.points"
"""Where a tracker leaves what it has logged: `PROJECT/EXPERIMENT/KEY`, one record a file."""
CARDS = ("atlas", "paper", "regime", "merging", "compression", "sotu", "visionfuse", "safety")
"""Where the cards of artefacts lie, with their figures and the points that they are made of."""


def cards(directory: Path, pattern: str = "*.json") -> list[Path]:
    """Return the files of a results directory that lie where its cards do, by folder and name."""
    return [path for folder in CARDS for path in sorted((directory / folder).glob(pattern))]


def read(directory: Path, warn: Warn) -> list[Outcome]:
    """Read all records of a results directory, in the order of `sort_key`.

    A point that belongs to several experiments is there once for each of them.

    Args:
        directory: holds `records/*.json`.
        warn: told in one line of every file that is no readable record; such files are skipped.
    """
    points, further = [], enrolled(directory)
    for path in sorted((directory / "records").glob("*.json")):
        for point in _doubted(path, warn):
            also = [name for name in further.get(path.stem, ()) if name != point.experiment]
            points += [point, *(replace(point, experiment=name) for name in also)]
    return sorted(points, key=sort_key)


def _doubted(path: Path, warn: Warn) -> Iterator[Outcome]:
    """Yield the point of a record, if it can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        point = parse(record)
        if point.failure is None and (why := fault(record, needed=())):
            warn(f"{path}: {why}")
        yield point
    except (OSError, ValueError, RecursionError) as problem:
        warn(f"skipped {path}: {' '.join(str(problem).split())}")


def read_tracked(directory: Path, warn: Warn) -> list[Outcome]:
    """Read all points that a tracker has logged, in the order of `sort_key`.

    Of a point that was logged for one experiment in several projects, the latest counts. A file
    without content is of an earlier version, which left the record in `records/` alone.

    Args:
        directory: a tracker's `dir`, `results` by default.
        warn: told in one line of every file that is no readable record; such files are skipped.
    """
    latest: dict[tuple[str, str], Outcome] = {}
    files = sorted((directory / TRACKED).glob("*/*/*"), key=lambda f: (f.stat().st_mtime, str(f)))
    for path in files:
        empty = path.stat().st_size == 0
        for point in _doubted(path_of(directory, path.name) if empty else path, warn):
            if empty:
                point = replace(point, experiment=shown.name(unquote(path.parent.name)))
            latest[point.key, point.experiment] = point
    return sorted(latest.values(), key=sort_key)


def lines(path: Path) -> list[Outcome]:
    """Read a JSON lines file of points, each as `deltalab.store.record.line` writes it.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no point; the message names the line.
    """
    points = []
    with path.open(encoding="utf-8") as file:
        for count, text in enumerate(file, start=1):
            try:
                points += [parse(json.loads(text))] if text.strip() else []
            except (ValueError, RecursionError) as problem:
                raise ValueError(f"line {count}: {problem}") from None
    return points


def sort_key(point: Outcome) -> tuple[Any, ...]:
    """Order points by pair, edit, hyper-parameters (numbers by value), selection and seed."""
    settings = [(name, *_ordered(value)) for name, value in point.settings.items()]
    return *point.of, point.edit, settings, point.select or "", point.seed or 0, point.key


def _ordered(value: Any) -> tuple[int, float, str]:
    found = number(value)
    return (0, found, "") if found is not None else (1, 0.0, plain(value))
