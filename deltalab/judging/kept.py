"""What evaluators keep on disk: JSON files that appear whole, and lines that are only added.

Several processes may write at once: a file is renamed into place, lines are added by one write.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltalab.store import files
from deltalab.store.digests import key_of


def write_json(path: Path, value: Any) -> Path:
    """Write JSON, which appears whole.

    Raises:
        OSError: naming the file; an earlier one is left as it was.
    """
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
    return files.write(path, text + "\n")


def add_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line of JSON for each row, all in one write, on a line of their own.

    A line that a killed process left half written is ended first.

    Raises:
        OSError: naming the file.
    """
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                text = text if file.read(1) == b"\n" else "\n" + text
            left = memoryview(text.encode())
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines; none where it is absent, whole lines alone."""
    try:
        held = path.read_bytes()
    except FileNotFoundError:
        return
    for line in held.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


class Verdicts:
    """A judge's answers by a hash of all that decides them: the judge and the prompt.

    Args:
        root: the directory, `<root>/<two digits>/<key>.json`.
        judge: what identifies the judge, ready for JSON; never a key or a password.
    """

    def __init__(self, root: Path, judge: Mapping[str, Any]) -> None:
        self.root, self.judge = root, dict(judge)

    def key(self, prompt: Any) -> str:
        """Return the content address of the answer to a prompt."""
        return key_of({"judge": self.judge, "prompt": prompt})

    def read(self, key: str) -> dict[str, Any] | None:
        """Return an answer, or None where there is none that can be read."""
        try:
            held = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return held if isinstance(held, dict) and "first" in held else None

    def write(self, key: str, verdict: Mapping[str, Any]) -> None:
        """Keep an answer."""
        write_json(self._path(key), {**verdict, "judge": self.judge})

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.json"
