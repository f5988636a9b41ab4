"""One GPU for every worker: found without starting CUDA, and held by a lock of the machine.

The locks lie in the machine's directory for temporary files, by the GPU's own name, so that the
workers of two sweeps, also of two users, never share a GPU by accident. The system releases them
when a worker ends, however it ends.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from deltalab import console

QUERY = ("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader")
_claimed: dict[str, int] = {}  # the GPU of this process, and its lock's open file


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
    assert torch is None or not torch.cuda.is_initialized(), "CUDA has started before the claim"
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


def _lock(name: str) -> int | None:
    """Return the open file of a device's lock, or None if another process holds it."""
    path = Path(tempfile.gettempdir()) / f"deltalab-{name.replace('/', '-')}.lock"
    handle = _open(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _open(path: Path) -> int:
    """Open a lock file that every user of the machine may lock, and follow no link."""
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            pass
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            continue
        os.fchmod(handle, 0o666)
        return handle
