"""Safetensors files read by plain file access, tensor by tensor or a part of one.

`Checkpoint` maps files into memory, which is convenient and counts every page that was touched as
the process's own. Here only the bytes that are asked for are read, into buffers that are used
again, so that streaming a checkpoint needs as much memory as one slice.
"""

import threading
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from deltalab.weights import headers, mapping

DTYPES = {name: mapping.DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
"""The floating-point dtypes that are edited; all others, such as integers and 8-bit floats that
go with scales of their own, are carried over as they are."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        file: where it is.
        dtype: its dtype if it can be edited, else None.
        shape: its shape.
        begin: position of its first byte in the file.
        size: its bytes.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    size: int


def entries(file: Path) -> dict[str, Entry]:
    """Return the tensors of a file in the order of their bytes.

    Raises:
        ValueError: not a valid safetensors file.
    """
    return {
        name: Entry(file, DTYPES.get(e.dtype), e.shape, e.begin, e.end - e.begin)
        for name, e in headers.read(file).items()
    }


class Buffers(threading.local):
    """Memory that each thread uses again: fresh memory costs more than what is read into it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return `count` numbers of this dtype, to be overwritten by the next call for the name."""
        size = count * dtype.itemsize
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype)


def read(
    entry: Entry, start: int = 0, stop: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Return the entries `start` to `stop` of the flat tensor, or all of it in its shape.

    Args:
        entry: the tensor.
        start: first entry.
        stop: last entry, exclusive; None for all.
        out: where to put them, flat; None for a new tensor.
    """
    assert entry.dtype is not None
    whole = start == 0 and stop is None
    stop = prod(entry.shape) if stop is None else stop
    out = torch.empty(stop - start, dtype=entry.dtype) if out is None else out
    if stop > start:
        with open(entry.file, "rb", buffering=0) as handle:
            handle.seek(entry.begin + start * entry.dtype.itemsize)
            view = out.view(torch.uint8).numpy().data
            while view:
                view = view[handle.readinto(view) or _short(entry) :]
    return out.reshape(entry.shape) if whole else out


def _short(entry: Entry) -> int:
    raise OSError(f"{entry.file}: ends too early")
