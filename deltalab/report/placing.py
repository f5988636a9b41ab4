"""Where a report goes: beside the records, but over no file that git tracks.

What is committed is written by who says so, with `into=DIR`.
"""

import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

BESIDE = "report"


def place(directory: Path, names: Collection[str]) -> Path:
    """Return the directory that a report of a results directory goes to, unless told.

    Args:
        directory: the results directory.
        names: the files that the report consists of.

    Returns:
        The results directory itself, or `DIR/report` where git tracks one of the names in it, or
        might: in a checkout that cannot be asked.

    Raises:
        ValueError: git tracks one in `DIR/report` too.
    """
    if tracked(directory, names) is False:
        return directory
    if not tracked(directory / BESIDE, names):
        return directory / BESIDE
    raise ValueError(
        f"results={directory}: git tracks the report there and in {directory / BESIDE}; name"
        " another directory with into=DIR, or this one to overwrite what is committed"
    )


def tracked(directory: Path, names: Collection[str]) -> bool | None:
    """Tell whether git tracks one of some files of a directory; None in a checkout without git.

    >>> tracked(Path("/"), ["index.html"])
    False
    """
    if not directory.is_dir():
        return False
    place = directory.resolve()
    if not any((parent / ".git").exists() for parent in (place, *place.parents)):
        return False
    command = ["git", "-C", str(place), "ls-files", "-z"]
    try:
        found = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return not {name.decode(errors="replace") for name in found.split(b"\0")}.isdisjoint(names)


def refusal(directory: Path) -> str | None:
    """Return why a directory, made if need be, cannot be written; None where it can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as problem:
        return problem.strerror or str(problem)
