"""`deltalab-cache`: what lies in a store of artefacts, how large it is, and removing it."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deltalab.store import eviction
from deltalab.terminal.commands import command

USAGE = """\
usage: deltalab-cache [results=DIR] [artifacts=DIR] [kind=NAME] [max-size=SIZE | clear]

Show the gradients, slopes and other artefacts that points share, by kind: how many, how large, and
when they were used last.

  results=DIR      the store is DIR/artifacts (default: results)
  artifacts=DIR    the store itself, as the setting of the same name
  kind=NAME        artefacts of this kind alone
  max-size=20GB    remove the least recently used until the rest is no larger
  clear            remove all

What a running process writes stays. Only artefacts are removed, and links are not followed; a
directory that holds anything else is refused. Whatever is removed is computed again when needed.
"""
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success and 2 on a user's mistake, told in one line."""
    return command("deltalab-cache", USAGE, cache, argv)


def cache(arguments: Sequence[str]) -> None:
    """Remove what the arguments say, then show what there is."""
    given = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in ("results", "artifacts", "kind", "max-size", "clear"):
            raise ValueError(
                f"{argument}: must be results=DIR, artifacts=DIR, kind=NAME, max-size=SIZE or clear"
            )
        if (name == "clear") == bool(value):
            raise ValueError(f"{argument}: {'takes no' if value else 'needs a'} value")
        given[name] = value
    place = given.get("artifacts") or f"{given.get('results', 'results')}/artifacts"
    root, kind = Path(place).expanduser(), given.get("kind")
    if not root.is_dir():
        raise ValueError(f"{place}: no such directory, there are no artefacts")
    eviction.check(root)
    kinds = sorted({entry.kind for entry in eviction.entries(root)})
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind={kind}: none here; there are {', '.join(kinds) or 'none at all'}")
    if "clear" in given or "max-size" in given:
        eviction.claim(root)
        most = 0 if "clear" in given else size_of(given["max-size"])
        removed = eviction.evict(root, most, kind)
        size = written(sum(entry.size for entry in removed))
        print(f"removed {len(removed)} artefacts, {size}")
    show(root, kind)


def size_of(text: str) -> float:
    """Return the bytes of a size as a person writes it.

    >>> size_of("20GB"), size_of("1.5 mb"), size_of("7")
    (20000000000.0, 1500000.0, 7.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    if not found or found[2] not in UNITS:
        raise ValueError(f"max-size={text}: must be a size as 500MB or 20GB")
    return float(found[1]) * UNITS[found[2]]


def written(size: float) -> str:
    """Write a number of bytes for a person.

    >>> written(999), written(1_500_000)
    ('999 B', '1.5 MB')
    """
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def show(root: Path, kind: str | None = None) -> None:
    """Print one line for every kind of artefact, and one for all."""
    found = [entry for entry in eviction.entries(root) if kind in (None, entry.kind)]
    rows = [("kind", "count", "size", "last used")]
    for name in sorted({entry.kind for entry in found}):
        own = [entry for entry in found if entry.kind == name]
        rows.append((name, *_columns(own)))
    if len(rows) != 2:
        rows.append(("all", *_columns(found)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def _columns(entries: Sequence[eviction.Entry]) -> tuple[str, str, str]:
    used = max((entry.used for entry in entries), default=0.0)
    ago = time.strftime("%Y-%m-%d %H:%M", time.localtime(used)) if entries else ""
    return str(len(entries)), written(sum(entry.size for entry in entries)), ago


if __name__ == "__main__":
    sys.exit(main())
