"""What lies in a store of artefacts, and which of it can go: the least recently used first.

Reading touches an artefact's manifest, so that its time is that of the last use. A reader holds a
shared lock of the system on the data for the life of its process (tensors are mapped, not copied),
a writer holds a lock file; what either holds stays.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deltalab.store import locks

DATA, MANIFEST, LOCKS = "data.safetensors", "manifest.json", "locks"
MOST_BYTES = 50 * 10**9
"""Size of a store, in bytes, beyond which artefacts are removed."""
ABANDONED = 24 * 3600.0
"""Seconds after which a temporary file belongs to nobody."""
_pins: dict[str, int] = {}


@dataclass(frozen=True)
class Entry:
    """One artefact: its kind, its size in bytes, and when it was used last (seconds since 1970)."""

    path: Path
    kind: str
    size: int
    used: float


def lock_of(root: Path, kind: str, key: str) -> Path:
    """Return the lock under which an artefact is made (`deltalab.store.locks`)."""
    return root / LOCKS / f"{kind}-{key}"


def entries(root: Path) -> Iterator[Entry]:
    """Yield all complete artefacts of a store."""
    for kind in _directories(root):
        for found in os.scandir(kind):
            path = kind / found.name
            with suppress(OSError):  # somebody else may be removing it
                if found.name.startswith("."):
                    continue
                if found.is_file():
                    about = found.stat()
                    yield Entry(path, kind.name, about.st_size, about.st_mtime)
                else:
                    size = sum(file.stat().st_size for file in os.scandir(path))
                    yield Entry(path, kind.name, size, (path / MANIFEST).stat().st_mtime)


def evict(root: Path, most_bytes: float, kind: str | None = None) -> list[Entry]:
    """Remove the least recently used artefacts until the rest fits.

    Args:
        root: the store's directory.
        most_bytes: size that may stay; 0 removes all that nobody uses.
        kind: look at artefacts of this kind alone.

    Returns:
        What was removed. What is being written or read is not.
    """
    _sweep_temporaries(root)
    found = [entry for entry in entries(root) if kind in (None, entry.kind)]
    size, removed = sum(entry.size for entry in found), []
    for entry in sorted(found, key=lambda entry: entry.used):
        if size <= most_bytes:
            break
        if _remove(root, entry):
            size -= entry.size
            removed.append(entry)
    return removed


def touch(file: Path) -> None:
    """Note that an artefact is used now."""
    with suppress(OSError):
        os.utime(file)


def pin(data: Path) -> None:
    """Keep an artefact's data from being evicted while this process lives."""
    with suppress(OSError):  # no such file, or a file system without such locks
        handle = os.open(data, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError:
            os.close(handle)
            raise
        if (before := _pins.pop(str(data), None)) is not None:
            os.close(before)
        _pins[str(data)] = handle


def _remove(root: Path, entry: Entry) -> bool:
    key = entry.path.name.removesuffix(".json")
    with suppress(OSError, locks.Busy), locks.held(lock_of(root, entry.kind, key)):
        if entry.path.is_file():
            entry.path.unlink()
            return True
        with _unread(entry.path / DATA):
            (entry.path / MANIFEST).unlink()  # without it the artefact does not exist
            shutil.rmtree(entry.path, ignore_errors=True)
            return True
    return False


@contextmanager
def _unread(data: Path) -> Iterator[None]:
    """Hold the data alone; raises `BlockingIOError` while somebody reads them."""
    handle = os.open(data, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _directories(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = (path for path in root.iterdir() if path.name != LOCKS and path.is_dir())
    return sorted(path for path in found if not path.name.startswith("."))


def _sweep_temporaries(root: Path) -> None:
    """Remove what writers that died have left."""
    for kind in _directories(root):
        for path in kind.glob(".*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
