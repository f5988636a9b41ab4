"""One GPU for every worker: found without starting CUDA, and held by a lock of the machine.

The locks lie in the machine's directory for temporary files, by the GPU's own name, so that the
workers of two sweeps, also of two users, never share a GPU by accident. The system releases them
when a worker ends, however it ends. (`nvidia-smi` rather than NVML's own package: one question a
worker is not worth a dependency that every machine without a GPU would install too.)
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from deltalab.terminal import console

QUERY = ("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader")
_claimed: dict[str, FileLock] = {}  # the GPU of this process, and its lock


def visible() -> list[str]:
    """Return the names of the GPUs that this process may use, in their order.

    `CUDA_VISIBLE_DEVICES` chooses among them by number, in the order of `nvidia-smi`, or by name.
    """
    try:
        listed = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines()]
    names = {row[0]: row[1] for row in rows}
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(names.values())
    entries = [part.strip() for part in chosen.split(",")]
    valid = takewhile(lambda entry: entry not in ("", "-1"), entries)  # CUDA stops there too
    return [names.get(entry, entry) for entry in valid]


def claim(devices: Sequence[str]) -> str:
    """Hold one of the devices for the life of this process and make CUDA see it alone.

    Waits, and says so, while other workers hold all of them.

    Args:
        devices: names as of `visible`.

    Returns:
        The device's name.
    """
    if _claimed:
        return next(iter(_claimed))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("CUDA has started before this process has claimed a GPU")
    told = False
    while True:
        for name in devices:
            if (handle := _lock(name)) is not None:
                _claimed[name] = handle
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                return name
        if not told:
            console.fail(f"waiting for a GPU: others hold {', '.join(devices)}")
            told = True
        time.sleep(1.0)


def _lock(name: str) -> FileLock | None:
    """Return a device's lock, held, or None if another process holds it."""
    path = Path(tempfile.gettempdir()) / f"deltalab-{name.replace('/', '-')}.lock"
    lock = FileLock(path, mode=0o666)  # which every user of the machine may take
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
