"""Files and directories that appear whole: a reader sees the earlier one or the new one.

What gets a final name has reached the disk itself, and so has the name: after a power cut there is
no name without its bytes.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deltalab.store import locks


def write(path: Path, text: str) -> Path:
    """Write a text to a temporary name, to the disk itself, and rename it into place.

    Raises:
        OSError: naming the file, where it cannot be written; an earlier one is left as it was.
    """
    made = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(made, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            made.unlink()  # there only where writing failed
    return path


def join(path: Path, header: bytes, data: Sequence[IO[bytes]]) -> None:
    """Write a safetensors file of a header and what some files hold, to the disk itself.

    Args:
        path: its name, which nothing has.
        header: the JSON; blanks are added so that what follows is aligned.
        data: open files, each taken from its begin to its end.

    Raises:
        OSError: the disk failed or is full, or something has the name; there is no new file then.
    """
    made = temporary(path)
    text = header + b" " * (-len(header) % 8)
    try:
        with open(made, "xb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.flush()
            for each in data:
                each.flush()
                size, at = os.fstat(each.fileno()).st_size, 0
                while at < size:
                    at += os.sendfile(out.fileno(), each.fileno(), at, size - at)
            os.fsync(out.fileno())
        os.link(made, path)  # never over a file that has come meanwhile
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        made.unlink(missing_ok=True)
    sync(path.parent)


def publish(made: Path, path: Path) -> None:
    """Write a directory of files to the disk itself, and rename it into place.

    Args:
        made: the directory, beside `path`.
        path: its final name, which nothing has.

    Raises:
        OSError: something has that name, or the disk failed; `made` is left where it was.
    """
    for file in made.rglob("*"):
        sync(file)
    sync(made)
    os.rename(made, path)
    sync(path.parent)


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Yield a new directory to put files into, which becomes `path` when the body is done.

    Where the body fails or is stopped, nothing is left. One process at a time may build a path.

    Raises:
        ValueError: another process is at it.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made = temporary(path)
    try:
        with locks.held(hidden(path)):
            try:
                made.mkdir()
                yield made
                publish(made, path)
            finally:
                shutil.rmtree(made, ignore_errors=True)  # there only where something failed
    except locks.Busy as busy:
        raise ValueError(f"{path}: {busy.owner} is writing it") from None


def leftovers(path: Path) -> list[tuple[Path, int]]:
    """Return the directories that killed processes have left of `path`, and their sizes in bytes.

    None while a process builds it.
    """
    if not path.parent.is_dir() or locks.owner(hidden(path)) is not None:
        return []
    form = re.compile(rf"{re.escape(hidden(path).name)}\.\w{{8}}")
    with os.scandir(path.parent) as found:
        names = [one.name for one in found if one.is_dir(follow_symlinks=False)]
    left = [path.parent / name for name in sorted(names) if form.fullmatch(name)]
    return [(one, sum(file.lstat().st_size for file in one.rglob("*"))) for one in left]


def hidden(path: Path) -> Path:
    """Return the name that what belongs to `path` begins with, beside it: `.NAME`."""
    return path.parent / ("." + os.fsencode(path.name)[:200].decode(errors="ignore"))


def temporary(path: Path) -> Path:
    """Return a new name beside `path` that tells what it belongs to: `.NAME.<8 digits>`."""
    return path.parent / f"{hidden(path).name}.{secrets.token_hex(4)}"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk itself.

    Raises:
        OSError: the disk failed, or is full.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # no disk: some network file systems
            raise
    finally:
        os.close(handle)
