"""Digests of file contents, by tensor where there are tensors, remembered between processes.

A file is read once: what was found is kept with its size, time of change (in nanoseconds) and
inode in `$XDG_CACHE_HOME/deltalab/digests`, a table a directory, and holds as long as these three
stand. That trusts the file system to give a file that is written to another time or inode; a file
that changed less than two seconds ago is never trusted, since its time may be too coarse to tell.
`full=True` reads everything again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from deltalab.store import files

SETTLED = 2.0
"""Seconds for which a file must have stood unchanged before its digest is remembered."""
Stamp = tuple[int, int, int]
"""A file's size, time of change in nanoseconds and inode."""
_BLOCK = 1 << 22
_tables: dict[Path, dict[str, Any]] = {}
_alone = Lock()


def of_text(text: str, digits: int = 16) -> str:
    """Return the digest of a text in hexadecimal digits.

    >>> of_text("a") == of_text("a") != of_text("b")
    True
    """
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def key_of(determinants: Mapping[str, Any]) -> str:
    """Return the digest of nested data, serialisable as JSON, in whose mappings order is nothing.

    Returns:
        16 hexadecimal digits.

    >>> key_of({"a": 1, "b": 0.5}) == key_of({"b": 0.5, "a": 1}) != key_of({"a": 2, "b": 0.5})
    True
    """
    return of_text(json.dumps({"schema": 1, **determinants}, sort_keys=True, allow_nan=False))


def of_file(path: Path, full: bool = False) -> str:
    """Return the digest of a file's content, 32 hexadecimal digits.

    Args:
        path: a file; of a link, what it leads to.
        full: read it again although its digest is remembered.
    """
    return of_files([path], full)[0]


def of_files(paths: Iterable[Path], full: bool = False) -> list[str]:
    """Return the digests of several files' contents, read in parallel."""
    found: list[str] = remembered(list(paths), "", _hashed, full)
    return found


def of_tensor(dtype: str, shape: Iterable[int], content: str) -> str:
    """Return the digest of one tensor, given that of its bytes in their dtype."""
    return of_text(f"{dtype} {list(shape)} {content}", 32)


def combined(tensors: Mapping[str, str]) -> str:
    """Return one digest of a whole checkpoint's tensors, whatever their order.

    >>> combined({"a": "1", "b": "2"}) == combined({"b": "2", "a": "1"})
    True
    """
    return of_text(json.dumps(sorted(tensors.items())))


def remembered(
    paths: list[Path], kind: str, read: Callable[[Path], Any], full: bool = False
) -> list[Any]:
    """Return what `read` finds in files, in parallel, or what it found before.

    Args:
        paths: the files.
        kind: what is looked for; empty for the whole content.
        read: gives what is ready for JSON, and depends on the file's content alone.
        full: read again what is remembered.
    """
    stamps = [stamp(path) for path in paths]
    found: dict[int, Any] = {}
    if not full:
        for index, path in enumerate(paths):
            if (held := recalled(path, kind)) is not None:
                found[index] = held
    missing = [index for index in range(len(paths)) if index not in found]
    with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1) or 1) as pool:
        values = pool.map(read, (paths[index].resolve() for index in missing))
        found |= dict(zip(missing, values, strict=True))
    remember({paths[i]: (stamps[i], found[i]) for i in missing}, kind)
    return [found[index] for index in range(len(paths))]


def recalled(path: Path, kind: str) -> Any:
    """Return what was found in a file before, of this kind; None if nothing holds any more."""
    real = path.resolve()
    held = _table(real.parent).get(kind + real.name)
    if not isinstance(held, list) or len(held) != 4 or held[:3] != list(stamp(real)):
        return None
    return held[3]


def remember(found: Mapping[Path, tuple[Stamp, Any]], kind: str) -> None:
    """Keep what was found in files.

    Args:
        found: by file, its stamp before the first byte of it was read, and what was found.
        kind: as for `remembered`.
    """
    settled = {path.resolve(): e for path, e in found.items() if _settled(e[0])}
    _keep({path: [*its, value] for path, (its, value) in settled.items()}, kind)


def stamp(path: Path) -> Stamp:
    """Return what tells a file that was written to from one that was not."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


def _settled(its: Stamp) -> bool:
    return time.time() - its[1] / 1e9 > SETTLED


def _hashed(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:32]


def of_bytes(descriptor: int, position: int, size: int) -> str:
    """Return the digest of `size` bytes of an open file, mostly without the interpreter's lock."""
    digest = hashlib.sha256()
    end = position + size
    while position < end:
        block = os.pread(descriptor, min(_BLOCK, end - position), position)
        if not block:
            break
        digest.update(block)
        position += len(block)
    return digest.hexdigest()


def place() -> Path:
    """Return the directory of the remembered digests."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "deltalab" / "digests"


def _table(directory: Path) -> dict[str, Any]:
    with _alone:
        if directory not in _tables:
            try:
                table = json.loads((place() / f"{of_text(str(directory))}.json").read_text("utf-8"))
            except (OSError, ValueError):
                table = {}
            _tables[directory] = table if isinstance(table, dict) else {}
        return _tables[directory]


def _keep(found: Mapping[Path, list[Any]], kind: str) -> None:
    """Remember digests; where nothing can be written they are known to this process alone."""
    by_directory: dict[Path, dict[str, Any]] = {}
    for path, entry in found.items():
        by_directory.setdefault(path.parent, {})[kind + path.name] = entry
    for directory, entries in by_directory.items():
        table = _table(directory)
        with _alone:
            table |= entries
            text = json.dumps(table)
        try:
            files.write(place() / f"{of_text(str(directory))}.json", text + "\n")
        except OSError:
            continue
