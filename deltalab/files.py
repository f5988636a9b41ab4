"""Files and directories that appear whole: a reader sees the earlier one or the new one.

What gets a final name has reached the disk itself, and so has the name: after a power cut there is
no name without its bytes.
"""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path


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


def publish(made: Path, path: Path) -> None:
    """Write a directory of files to the disk itself, and rename it into place.

    Args:
        made: the directory, with files alone in it, beside `path`.
        path: its final name, which nothing has.

    Raises:
        OSError: something has that name, or the disk failed; `made` is left where it was.
    """
    for file in made.iterdir():
        sync(file)
    sync(made)
    os.rename(made, path)
    sync(path.parent)


def temporary(path: Path) -> Path:
    """Return a new hidden name beside `path` that tells what it belongs to: `.NAME.<8 digits>`."""
    return path.parent / f".{path.name[:60]}.{secrets.token_hex(4)}"


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
