"""Safetensors files read by plain file access, tensor by tensor or a part of one.

`Checkpoint` maps files into memory, which is convenient and counts every page that was touched as
the process's own. Here only the bytes that are asked for are read, into buffers that are used
again, so that streaming a checkpoint needs as much memory as one slice.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deltalab.weights import headers, mapping

DTYPES = {name: mapping.DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
"""The floating-point dtypes that are edited; all others, such as integers and 8-bit floats that
go with scales of their own, are carried over as they are."""


SLICE = 1 << 22
"""Entries read, edited and written at once."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        file: where it is.
        dtype: its dtype if it can be edited, else None.
        shape: its shape.
        begin: position of its first byte in the file, or where one is to be written.
        size: its bytes.
        load: gives its flat entries `start` to `stop` where they do not lie in the file as such.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    size: int
    load: Callable[[int, int], Tensor] | None = None


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
    if entry.load is not None:
        out.copy_(entry.load(start, stop))
    elif stop > start:
        with open(entry.file, "rb", buffering=0) as handle:
            handle.seek(entry.begin + start * entry.dtype.itemsize)
            view = out.view(torch.uint8).numpy().data
            while view:
                view = view[handle.readinto(view) or _short(entry) :]
    return out.reshape(entry.shape) if whole else out


def _short(entry: Entry) -> int:
    raise ValueError(f"{entry.file}: ends too early")


def pieces(
    count: int, width: int, size: int | None = None, at: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield the entries of every piece of this size or so, `width` of which stay together."""
    step = max(1, (size or SLICE) // width) * width
    for start in range(at, at + count, step):
        yield start, min(start + step, at + count)


def keep(source: BinaryIO, target: BinaryIO, entry: Entry, start: int) -> None:
    """Write the entries from `start` on as they are."""
    if entry.load is None:
        copy(source, target, entry.begin + start * item(entry), entry.begin + entry.size)
        return
    for first, last in pieces(prod(entry.shape) - start, 1, at=start):
        put(target, entry.load(first, last), entry.begin + first * item(entry))


def item(entry: Entry) -> int:
    """Return the bytes of one number."""
    return entry.size // max(1, prod(entry.shape))


def put(target: BinaryIO, data: Tensor, place: int) -> None:
    """Write a tensor's bytes at a place in a file, whatever else is being written to it."""
    view = data.contiguous().reshape(-1).view(torch.uint8).numpy().data
    while view:
        count = os.pwrite(target.fileno(), view, place)
        view, place = view[count:], place + count


def copy(source: BinaryIO, target: BinaryIO, begin: int, end: int | None) -> None:
    """Copy bytes to the same place; to the end of the source if `end` is None."""
    end = os.fstat(source.fileno()).st_size if end is None else end
    while begin < end:
        block = os.pread(source.fileno(), min(end - begin, 1 << 22), begin)
        if not block:
            raise ValueError(f"{source.name}: ends too early, at byte {begin} of {end}")
        begin += os.pwrite(target.fileno(), block, begin)
