"""What a sweep leaves for those who ask how far it is: its points, and the key of each begun one.

A sweep's folder holds `points.json`, the overrides of every point in their order, and beside the
log of every point that was begun its key, or in one line why it has none.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from deltalab.store import shown

POINTS, KEY, FAILURE = "points.json", "key", "failure"


@dataclass(frozen=True)
class Listed:
    """A sweep as its folder tells it.

    Attributes:
        folder: where it lies, below `DIR/logs`.
        began: seconds since 1970.
        command: what was typed after `deltalab -m`.
        points: the overrides of every point.
        keys: the keys of points that were begun, by number.
        failures: why points failed before they had a key, by number.
    """

    folder: Path
    began: float
    command: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]
    keys: dict[int, str] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def write(folder: Path, command: Sequence[str], points: Sequence[Sequence[str]]) -> None:
    """Write the points of a sweep into its folder."""
    text = json.dumps({"command": list(command), "points": [list(point) for point in points]})
    (folder / POINTS).write_text(text + "\n")


def note(folder: str | Path, name: str, text: str) -> None:
    """Write a point's `key`, or its `failure` in one line, into the point's own folder."""
    with suppress(OSError):  # who asks will learn less, and the point goes on
        (Path(folder) / name).write_text(shown.line(text), "utf-8")


def setting(override: str) -> str:
    """Return the name of the setting that an override gives.

    >>> setting("+edit.p=0.5")
    'edit.p'
    """
    return override.lstrip("+").partition("=")[0]


@lru_cache(maxsize=1)
def varied(folder: Path) -> frozenset[str]:
    """Return the settings that are not the same in all points of a sweep; none if it has no list.

    Args:
        folder: the sweep's; its list of points is written before the first of them begins.
    """
    try:
        points = json.loads((folder / POINTS).read_text("utf-8", "replace"))["points"]
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
    every = {override for point in points for override in point}
    common = every.intersection(*points)
    return frozenset(setting(override) for override in every - common)


def keys(folder: Path) -> list[str]:
    """Return the keys of all points that a sweep has begun, by number."""
    begun = [file for file in folder.glob(f"*/{KEY}") if file.parent.name.isdigit()]
    return [
        file.read_text("utf-8", "replace").strip()
        for file in sorted(begun, key=lambda f: int(f.parent.name))
    ]


def begun(folder: Path) -> int:
    """Return how many points of a sweep have begun, those that failed before their key included."""
    return len({file.parent for name in (KEY, FAILURE) for file in folder.glob(f"*/{name}")})


def listed(results: Path) -> Iterator[Listed]:
    """Yield all sweeps of a results directory, the latest first."""
    files = []
    for file in (results / "logs").glob(f"*/{POINTS}"):
        with suppress(OSError):
            files.append((file.stat().st_mtime, file))
    for began, file in sorted(files, reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(file.read_text("utf-8", "replace"))
            points = tuple(tuple(map(str, point)) for point in found["points"])
            command = tuple(map(str, found["command"]))
            sweep = Listed(file.parent, began, command, points)
            for number in range(len(points)):
                _read(sweep, number)
            yield sweep


def _read(sweep: Listed, number: int) -> None:
    with suppress(OSError):
        sweep.keys[number] = (
            (sweep.folder / f"{number}" / KEY).read_text("utf-8", "replace").strip()
        )
        return
    with suppress(OSError):
        sweep.failures[number] = (
            (sweep.folder / f"{number}" / FAILURE).read_text("utf-8", "replace").strip()
        )
