"""Locks as files, for processes on one machine or on many that share a file system.

A lock NAME is held by the highest generation among the files `NAME.0.lock`, `NAME.1.lock`, ... Each
is created exclusively, names its owner, and is touched every few seconds. Whoever finds the highest
one dead creates the next, so that of several takers one succeeds, and an owner that was only
stopped for a while sees that it has lost the lock.

No lock of the operating system is used: many cluster file systems have none that reach other nodes.
"""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

BEAT = 10.0
"""Seconds between two touches of a held lock."""
STALE = 180.0
"""Seconds without a touch after which an owner on another machine counts as dead; network file
systems show times that are up to a minute old."""
_held: dict[str, Path] = {}


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        token: unique to one holding of one lock.
        host: the machine's name, for people.
        space: the machine's boot and process namespace, within which `pid` means something.
        pid: process.
        start: the process's start in clock ticks, since numbers of processes are used again.
        since: seconds since 1970 when the lock was taken, by the owner's clock.
    """

    token: str
    host: str
    space: str
    pid: int
    start: int
    since: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


UNKNOWN = Owner("", "an unknown machine", "", 0, 0, 0.0)
"""An owner that has created its file and not yet written to it."""


class Busy(Exception):
    """A live process holds the lock.

    Attributes:
        path: the lock.
        owner: who holds it.
    """

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        super().__init__(f"{path.name}: held by {owner}")


@contextmanager
def held(path: Path) -> Iterator["Lock"]:
    """Hold a lock while the body runs; it is touched by a thread meanwhile.

    Args:
        path: directory and name of the lock, without the generation; the directory is created.

    Raises:
        Busy: a live process holds it.
    """
    lock = _acquire(path)
    with _touching:
        _held[lock.owner.token] = lock.file
    _beat()
    try:
        yield lock
    finally:
        with _touching:
            del _held[lock.owner.token]
        _remove(lock.file, lock.owner)


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    path: Path
    file: Path
    owner: Owner

    def lost(self) -> bool:
        """Whether another process has taken the lock, having found this one dead."""
        return _read(self.file) != self.owner


def owner(path: Path) -> Owner | None:
    """Return the live process that holds a lock, None if none does."""
    files = _generations(path)
    return _alive(files[-1]) if files else None


def all_held(directory: Path) -> dict[str, Owner]:
    """Return the live owners of all locks in a directory, by the locks' names."""
    with suppress(FileNotFoundError):
        names = {f.name.rsplit(".", 2)[0] for f in directory.iterdir() if f.suffix == ".lock"}
        found = {name: owner(directory / name) for name in sorted(names)}
        return {name: one for name, one in found.items() if one is not None}
    return {}


def wait(paths: Iterable[Path], poll: float = 1.0) -> list[Path]:
    """Wait until at least one of some locks is free, and return all that are.

    >>> wait([Path("/nonexistent/lock")])
    [PosixPath('/nonexistent/lock')]
    """
    paths = list(paths)
    while not (free := [path for path in paths if owner(path) is None]):
        time.sleep(poll)
    return free


def _acquire(path: Path) -> Lock:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        files = _generations(path)
        dead = {}
        for file in files:
            state = _state(file)
            if live := _alive(file):
                raise Busy(path, live)
            dead[file] = state
        if None in dead.values():
            continue  # released meanwhile
        number = int(files[-1].suffixes[-2][1:]) + 1 if files else 0
        lock = Lock(path, path.parent / f"{path.name}.{number}.lock", _myself())
        try:
            with open(lock.file, "x") as handle:
                handle.write(json.dumps(asdict(lock.owner)))
        except FileExistsError:
            continue  # another process was faster: look who
        except OSError:  # a full disk: a file without an owner would count as held
            lock.file.unlink(missing_ok=True)
            raise
        # Between looking and creating, the dead lock may have been taken, released and taken anew.
        others = [f for f in _generations(path) if f != lock.file]
        if all(f in dead and _state(f) == dead[f] for f in others):
            for file in others:
                file.unlink(missing_ok=True)
            return lock
        _remove(lock.file, lock.owner)
        time.sleep(0.01 * (1 + os.getpid() % 7))


def _state(file: Path) -> tuple[int, int, str] | None:
    """Return what is different in every other file of this name; None if there is none."""
    try:
        found = file.stat()
        return found.st_ino, found.st_mtime_ns, file.read_text()
    except OSError:
        return None


def _generations(path: Path) -> list[Path]:
    """Return the files of one lock, the highest generation last."""
    prefix, found = f"{path.name}.", {}
    with suppress(FileNotFoundError):
        for entry in os.scandir(path.parent):
            number = entry.name.removeprefix(prefix).removesuffix(".lock")
            if entry.name == f"{prefix}{number}.lock" and number.isdigit():
                found[int(number)] = path.parent / entry.name
    return [found[number] for number in sorted(found)]


def _alive(file: Path) -> Owner | None:
    """Return the owner if it lives: on this machine by its process, elsewhere by its last touch."""
    found = _read(file)
    if found and found.space == _space():
        return found if _start_of(found.pid) == found.start else None
    try:
        return found or UNKNOWN if _now(file.parent) - file.stat().st_mtime < STALE else None
    except FileNotFoundError:
        return None


def _read(file: Path) -> Owner | None:
    try:
        return Owner(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remove(file: Path, owner: Owner) -> None:
    if _read(file) == owner:
        file.unlink(missing_ok=True)


def _now(directory: Path) -> float:
    """Return the file system's time, which touches are stamped with, whatever the clock here."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".clock") as file:
            return os.stat(file.name).st_mtime
    except OSError:  # who may only read there asks the clock here
        return time.time()


def _myself() -> Owner:
    pid = os.getpid()
    return Owner(
        uuid.uuid4().hex, socket.gethostname(), _space(), pid, _start_of(pid) or 0, time.time()
    )


@cache
def _space() -> str:
    """Return what tells apart machines, their boots, and containers with processes of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: the touches decide
        return uuid.uuid4().hex


def _start_of(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


_touching = threading.Lock()
_thread: threading.Thread | None = None


def _beat() -> None:
    """Start the thread that touches held locks, once a process; a fork starts its own."""
    global _thread
    with _touching:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_touch, name="locks", daemon=True)
            _thread.start()


def _touch() -> None:
    while True:
        with _touching:
            for file in _held.values():
                with suppress(OSError):
                    os.utime(file)
        time.sleep(BEAT)


os.register_at_fork(after_in_child=_held.clear)  # a child holds nothing
