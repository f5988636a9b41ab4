"""Which directories and files of an image folder count, for what reads it and for its key.

Nothing here imports torch, so that a finished point is recognised at once.
"""

from pathlib import Path


def is_hidden(name: str) -> bool:
    """Whether a file or directory is hidden, or one that programs leave behind."""
    return name.startswith((".", "__")) or name in ("@eaDir", "lost+found", "$RECYCLE.BIN")


def directories(root: Path) -> list[str]:
    """Return the names of the directories in a directory, those that are hidden aside."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))


def of_all_splits(root: Path) -> list[str]:
    """Return every split's classes below a directory, as `train/cat`."""
    return [f"{split}/{name}" for split in directories(root) for name in directories(root / split)]
