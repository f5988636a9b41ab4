"""What lies in a store of artefacts, and which of it can go: the least recently used first.

A store is a directory with a marker file. In it a store knows its own names alone: directories of
`KINDS`, in them `<key>.json`, `<key>/` with data and manifest, and temporaries `.<key>.*`, a key
being 16 hexadecimal digits; beside them `locks/`. It touches no other name and follows no link:
what somebody else has put there stays. Removing goes by handles of directories, name by name.

Reading touches an artefact's manifest, so that its time is that of the last use. A writer holds a
lock file; what is being written stays. What is read is in memory, so that it may go meanwhile, on
whichever machine.
"""

import errno
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deltalab.store import files, locks

KINDS = ("calibration", "curvature", "gradient", "line", "reference")
"""What artefacts there are; also the names of their directories."""
DATA, MANIFEST, LOCKS = "data.safetensors", "manifest.json", "locks"
MARKER, FORMAT = "deltalab-store.json", 1
MOST_BYTES = 50 * 10**9
"""Size of a store, in bytes, beyond which artefacts are removed."""
ABANDONED = 24 * 3600.0
"""Seconds after which a temporary file belongs to nobody."""
_KEY = r"[0-9a-f]{16}"
_TEMPORARY = re.compile(rf"\.{_KEY}\..+")
_FORMER = re.compile(rf"{_KEY}(\.json)?|\.{_KEY}\..+|\.\w+\.tmp|\.nfs\w+")
"""Names in a directory of a store from before there were markers."""


@dataclass(frozen=True)
class Entry:
    """One artefact: its kind, its size in bytes, and when it was used last (seconds since 1970)."""

    path: Path
    kind: str
    size: int
    used: float


def check(root: Path) -> bool:
    """Tell whether a directory is a store; a new or an empty one is none yet.

    Raises:
        ValueError: it holds what no store holds, or is the store of a newer version.
        OSError: it cannot be looked into.
    """
    try:
        with open(own(root, MARKER), encoding="utf-8") as file:
            number = json.load(file)["format"]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"artifacts={root}: {MARKER} there is damaged, remove it") from None
    else:
        if number != FORMAT:
            raise ValueError(
                f"artifacts={root}: a store of format {number!r}, this version of deltalab knows"
                f" format {FORMAT}; name another directory"
            )
        return True
    with suppress(FileNotFoundError), os.scandir(root) as found:
        for entry in found:
            if entry.name == MARKER:  # another process has just made it a store
                return True
            if not _former(entry):
                raise ValueError(
                    f"artifacts={root}: holds {entry.name!r}, which is none of deltalab's"
                    " artefacts; name a new or an empty directory"
                )
    return False


def claim(root: Path) -> None:
    """Make a directory a store: a new or an empty one, or a store from before there were markers.

    Raises:
        ValueError: as for `check`; nothing was touched.
        OSError: it cannot be written.
    """
    if not check(root):
        files.write(root / MARKER, json.dumps({"store": "artifacts", "format": FORMAT}) + "\n")


def own(root: Path, *names: str) -> Path:
    """Return a path below a store.

    Raises:
        OSError: a part of it is a link.
    """
    path = root
    for name in names:
        path = path / name
        if path.is_symlink():
            raise OSError(errno.ELOOP, "is a link, and a store follows none", str(path))
    return path


def room(root: Path, name: str) -> Path:
    """Return a directory of a store, which is made if need be; raises as `own` does."""
    path = own(root, name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def lock_of(root: Path, kind: str, key: str) -> Path:
    """Return the lock under which an artefact is made (`deltalab.store.locks`)."""
    return root / LOCKS / f"{kind}-{key}"


def entries(root: Path) -> Iterator[Entry]:
    """Yield all complete artefacts of a store."""
    for kind in KINDS:
        found = []
        with suppress(OSError), _opened(root, kind) as place:
            for name in os.listdir(place):
                with suppress(OSError):  # somebody else may be removing it
                    if found_one := _entry(place, name):
                        found.append(Entry(root / kind / name, kind, *found_one))
        yield from found


def evict(root: Path, most_bytes: float, kind: str | None = None) -> list[Entry]:
    """Remove the least recently used artefacts of a store until the rest fits.

    Args:
        root: the store's directory; one without a marker is left alone.
        most_bytes: size that may stay; 0 removes all that nobody writes.
        kind: look at artefacts of this kind alone.

    Returns:
        What was removed.

    Raises:
        ValueError: as for `check`.
    """
    if not check(root):
        return []
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
        os.utime(file, follow_symlinks=False)


def discard(directory: Path, name: str) -> None:
    """Remove an artefact or a temporary from a directory, and nothing else that lies in it.

    Raises:
        OSError: it is not there, or holds more than a store puts there, which then stays.
    """
    with _opened(directory) as place:
        _discard(place, name)


def _former(entry: "os.DirEntry[str]") -> bool:
    """Whether a store without a marker may hold this: names of our own form, and no links."""
    if entry.name.startswith(f".{MARKER}."):  # somebody is making it a store
        return entry.is_file(follow_symlinks=False)
    if entry.name not in (LOCKS, *KINDS) or not entry.is_dir(follow_symlinks=False):
        return False
    with os.scandir(entry.path) as found:
        if entry.name == LOCKS:
            return all(one.name.endswith(".lock") or one.name[0] == "." for one in found)
        return all(_FORMER.fullmatch(one.name) and not one.is_symlink() for one in found)


def _entry(place: int, name: str) -> tuple[int, float] | None:
    """Return an artefact's size and time, None for what is none."""
    if re.fullmatch(rf"{_KEY}\.json", name):
        about = os.lstat(name, dir_fd=place)
        return (about.st_size, about.st_mtime) if stat.S_ISREG(about.st_mode) else None
    if not re.fullmatch(_KEY, name):
        return None
    with _opened(name, dir_fd=place) as inner:
        if sorted(os.listdir(inner)) != [DATA, MANIFEST]:
            return None
        data, manifest = (os.lstat(file, dir_fd=inner) for file in (DATA, MANIFEST))
    return data.st_size + manifest.st_size, manifest.st_mtime


def _remove(root: Path, entry: Entry) -> bool:
    key = entry.path.name.removesuffix(".json")
    with suppress(OSError, locks.Busy):
        room(root, LOCKS)
        with locks.held(lock_of(root, entry.kind, key)), _opened(root, entry.kind) as place:
            _discard(place, entry.path.name)
            return True
    return False


def _discard(place: int, name: str) -> None:
    """Remove a file, or the files that an artefact has and their directory; never by a link."""
    if not stat.S_ISDIR(os.lstat(name, dir_fd=place).st_mode):
        os.unlink(name, dir_fd=place)  # a link itself, not what it leads to
        return
    with _opened(name, dir_fd=place) as inner:
        for file in (MANIFEST, DATA):  # without a manifest the artefact does not exist
            with suppress(FileNotFoundError):
                os.unlink(file, dir_fd=inner)
    os.rmdir(name, dir_fd=place)


@contextmanager
def _opened(*names: str | Path, dir_fd: int | None = None) -> Iterator[int]:
    """Open a directory by its names one after the other, all but a first path without links."""
    handle: int | None = dir_fd
    opened = []
    try:
        for number, name in enumerate(names):
            follow = os.O_NOFOLLOW if number or dir_fd is not None else 0
            handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | follow, dir_fd=handle)
            opened.append(handle)
        yield opened[-1]
    finally:
        for one in opened:
            os.close(one)


def _sweep_temporaries(root: Path) -> None:
    """Remove what writers that died have left."""
    for kind in KINDS:
        with suppress(OSError), _opened(root, kind) as place:
            for name in filter(_TEMPORARY.fullmatch, os.listdir(place)):
                with suppress(OSError):
                    about = os.lstat(name, dir_fd=place)
                    if time.time() - about.st_mtime > ABANDONED and not stat.S_ISLNK(about.st_mode):
                        _discard(place, name)
