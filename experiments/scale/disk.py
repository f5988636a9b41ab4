"""A disk that is full in the midst of a sweep: nothing wrong is left, and the sweep completes.

    python -m experiments.scale.disk [ROUNDS] [POINTS]        (as root, for a tmpfs of its own)

In every round a sweep runs on a small tmpfs until something finds no space, each time something
else: Hydra's files, a lock, a record. Another sweep tries on the full disk. When there is space
again, the same command completes the sweep; records and report are compared with those of an
undisturbed run.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.scale.kills import Harness, command, verify

SIZE, FREE, PAGE = 8 * 2**20, 64 * 2**10, 4096
"""Bytes of the disk, and of what is left free on it in the first round; a page more in the next."""


@contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Path]:
    """Mount a small disk in memory; needs root."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def free(disk: Path) -> int:
    """Return the bytes that are free on a disk."""
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def fill(disk: Path, left: int, points: int) -> tuple[Harness, str]:
    """Run a sweep on a disk with so many bytes left, and again when it has some more.

    Returns:
        The processes, and what came of it in one line.
    """
    harness = Harness(disk / "results")
    harness.results.mkdir()
    filler = disk / "filler"
    filler.write_bytes(bytes(free(disk) - left))
    codes = [harness.ended(harness.start(command(0, points)), wait=True) for _ in range(2)]
    before = len(list((harness.results / "records").glob("*.json")))
    assert all(codes), f"a sweep on a full disk ended with {codes}"
    said = (harness.results / "output").read_text().splitlines()
    filler.unlink()
    began = time.perf_counter()
    code = harness.ended(harness.start(command(0, points)), wait=True)
    assert code == 0, (harness.results / "output").read_text()[-2000:]
    seconds = time.perf_counter() - began
    line = next((text for text in said if "no space" in text), "")
    return harness, f"{before} records, codes {codes}, completed in {seconds:.0f} s; {line}"


def main(rounds: int = 12, points: int = 4) -> None:
    """Fill the disk in every round, make room, and compare with an undisturbed run."""
    import timm  # noqa: F401  what every sweep needs is imported once, here
    import torch

    from deltalab import run  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the disk would stay mounted
    with tempfile.TemporaryDirectory() as place:
        calm = Harness(Path(place) / "calm")
        calm.results.mkdir()
        assert calm.ended(calm.start(command(0, points)), wait=True) == 0
        for number in range(rounds):
            with tmpfs(Path(place) / f"disk{number}", SIZE) as disk:
                left = FREE + number * PAGE
                harness, line = fill(disk, left, points)
                verify(harness, calm.results, points)
                print(f"{left} bytes: {line}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
