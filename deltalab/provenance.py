"""Where a result comes from: versions, commit, device, memory."""

import resource
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch


def peak_memory() -> int:
    """Return the peak memory of the process so far, in bytes; of the GPU where one is used."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    packages = ("deltalab", "torch", "timm", "hydra-core", "omegaconf", "safetensors", "numpy")
    return {name: version(name) for name in packages}


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Return the commit of this checkout, `+` appended where files differ, or None outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@lru_cache(maxsize=4)
def device_name(device: str) -> str:
    """Return what the point ran on, for instance `cpu, 2 threads` or the name of the GPU."""
    if device != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(None if device == "auto" else device))
    return f"cpu, {torch.get_num_threads()} threads"
