"""What a point has found so far: kept line by line until its record is written.

A point that is killed leaves the lines below `RESULTS/unfinished/KEY/`; run again, it reads them
first. A file only grows, by whole lines; a line that a kill cut short is none.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_places: list[Path] = []


@contextmanager
def point(results: str | Path, key: str) -> Iterator[None]:
    """Say which point this process runs now; what it kept goes once the block has ended well."""
    place = Path(results).expanduser() / "unfinished" / key
    _places.append(place)
    try:
        yield
    finally:
        _places.pop()
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.parent.rmdir()  # of the last point


def lines(name: Callable[[], str]) -> "Lines | None":
    """Return the lines that the present point keeps under a name; None where there is no point."""
    return Lines(_places[-1] / f"{name()}.jsonl") if _places else None


class Lines:
    """Values by key in a file that only grows.

    Args:
        path: the file; it need not be there.

    Attributes:
        found: the values, those read and those added.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     Lines(Path(place) / "a" / "b.jsonl").add({"x": [1.5, True]})
    ...     Lines(Path(place) / "a" / "b.jsonl").get("x")
    [1.5, True]
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn = False
        self.found: dict[str, Any] = {}
        try:
            held = path.read_bytes()
        except OSError:
            return
        for line in held.split(b"\n"):
            try:
                key, value = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            self.found[key] = value
        self._torn = bool(held) and not held.endswith(b"\n")

    def get(self, key: str) -> Any:
        """Return the value of a key, None where there is none."""
        return self.found.get(key)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep values; what cannot be written is known to this object alone."""
        self.found |= found
        text = "".join(json.dumps(pair) + "\n" for pair in found.items())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.write(b"\n" * self._torn + text.encode())
            self._torn = False
        except OSError:
            return
