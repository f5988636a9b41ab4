"""Magnitude thresholds that keep an exact number of entries, of a tensor or of a whole model."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltalab.weights import mapping
from deltalab.weights.mapping import Weights


@dataclass(frozen=True)
class Threshold:
    """What survives a magnitude cut in one tensor, with ties settled.

    Attributes:
        value: entries of larger magnitude survive.
        ties: of the entries whose magnitude equals `value`, this many survive, the first in
            row-major order.

    >>> Threshold(2.0, 1).survivors(torch.tensor([2.0, -3.0, -2.0]))
    tensor([ True,  True, False])
    """

    value: float
    ties: int

    def survivors(self, delta: Tensor) -> Tensor:
        """Return the boolean mask of the surviving entries, of delta's shape."""
        magnitude = delta.abs()
        mask = magnitude > self.value
        if self.ties:
            equal = (magnitude == self.value).flatten()
            last = equal.nonzero()[self.ties - 1]
            equal[last + 1 :] = False
            mask |= equal.reshape(mask.shape)
        return mask

    def cut(self, delta: Tensor) -> "Cut":
        """Return what parts of this tensor meet."""
        if not self.ties:
            return Cut(self.value, -1)
        equal = (delta.abs() == self.value).flatten()
        return Cut(self.value, int(equal.nonzero()[self.ties - 1]))


@dataclass(frozen=True)
class Cut:
    """What survives a magnitude cut in a part of a tensor.

    Attributes:
        value: as of `Threshold`.
        last: the flat index in the part up to which entries of magnitude `value` survive.

    >>> Threshold(2.0, 1).cut(torch.tensor([2.0, -3.0, -2.0])).at(2).survivors(torch.tensor([-2.0]))
    tensor([False])
    """

    value: float
    last: int

    def at(self, start: int) -> "Cut":
        """Return what the part meets that starts so many entries further."""
        return Cut(self.value, self.last - start)

    def survivors(self, delta: Tensor) -> Tensor:
        """Return the boolean mask of the surviving entries, of the part's shape."""
        magnitude = delta.abs()
        mask = magnitude > self.value
        if self.last >= 0:
            equal = (magnitude == self.value).flatten()
            equal[self.last + 1 :] = False
            mask |= equal.reshape(mask.shape)
        return mask


def kept_count(keep: float, total: int) -> int:
    """Return floor(keep * total), with keep read as the decimal fraction that was meant.

    >>> kept_count(0.29, 100), kept_count(0.2, 2048)
    (29, 409)
    """
    return int(round(keep * total, 6))


def tensor_threshold(delta: Tensor, count: int) -> Threshold:
    """Return the threshold that keeps exactly `count` entries of largest magnitude.

    Args:
        delta: any shape.
        count: entries to keep, from 0 to the number of entries.

    >>> tensor_threshold(torch.tensor([1.0, -3.0, 2.0, -2.0]), 2)
    Threshold(value=2.0, ties=1)
    """
    assert 0 <= count <= delta.numel()
    if count == 0:
        return Threshold(float("inf"), 0)
    magnitude = delta.abs().flatten()
    place = delta.numel() - count
    if magnitude.device.type == "cpu":  # NumPy selects with vector instructions, PyTorch does not
        parted = torch.from_numpy(np.partition(magnitude.numpy(), place))
        value = float(parted[place])
        return Threshold(value, count - int((parted[place:] > value).sum()))
    value = float(magnitude.kthvalue(place + 1).values)
    return Threshold(value, count - int((magnitude > value).sum()))


def ascending(magnitude: Tensor) -> np.ndarray[Any, Any]:
    """Return all magnitudes in ascending order, as a NumPy array.

    >>> ascending(torch.tensor([[3.0, 1.0], [2.0, 0.0]])).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if magnitude.device.type == "cpu":  # NumPy sorts with vector instructions, PyTorch does not
        return np.sort(magnitude.numpy(), axis=None)
    ordered: np.ndarray[Any, Any] = magnitude.flatten().sort().values.cpu().numpy()
    return ordered


class ModelThreshold:
    """The magnitude thresholds of a whole model, exact, found without holding the model.

    A float32 magnitude orders like its bit pattern, which is split into 16 high and 15 low bits.
    The first pass counts the high words of all tensors; the second counts the low words of the
    entries that share the threshold's high word, tensor by tensor. Both read one tensor at a time.
    The first pass is kept, so that a sweep over `keep` pays it once.
    """

    def __init__(self) -> None:
        self._high: Tensor | None = None
        self._found: dict[float, dict[str, Threshold]] = {}

    def of(self, keep: float, deltas: Weights) -> dict[str, Threshold]:
        """Return every tensor's threshold so that floor(keep n) of all n entries survive.

        Equal magnitudes at the cut survive in the order of the tensors' names, then of the flat
        index: the order in which the tensors are stored does not matter.

        Args:
            keep: fraction of entries to keep, in [0, 1].
            deltas: float32 tensors, in order.
        """
        if keep not in self._found:
            if self._high is None:
                self._high = sum(
                    (_counts(deltas, name, _high, 1 << 16) for name in deltas),
                    torch.zeros(1 << 16, dtype=torch.int64),
                )
            count = kept_count(keep, int(self._high.sum()))
            self._found[keep] = self._cut(count, self._high, deltas)
        return self._found[keep]

    def _cut(self, count: int, high: Tensor, deltas: Weights) -> dict[str, Threshold]:
        """Resolve the low words below the pivot and share out the ties."""
        if count == 0:
            return {name: Threshold(float("inf"), 0) for name in deltas}
        pivot, rest = _reach(high, count)
        low: dict[str, Tensor] = {}
        for name in deltas:
            low[name] = _counts(deltas, name, partial(_low, pivot=pivot), 1 << 15).to_sparse()
        total = torch.zeros(1 << 15, dtype=torch.int64)
        for counts in low.values():
            total += counts.to_dense()
        word, ties = _reach(total, rest)
        pattern = (pivot << 15) | word
        shares = {}
        for name, counts in sorted(low.items()):
            equal = int(counts.to_dense()[word])
            share = min(ties, equal)
            ties -= share
            every = 0 < share == equal  # then those above the next number below survive
            shares[name] = Threshold(_magnitude(pattern - every), 0 if every else share)
        return shares


def _magnitude(pattern: int) -> float:
    """Return the float32 number of a bit pattern; below zero's, a negative one."""
    if pattern < 0:
        return -1.0
    return float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32))


def _counts(deltas: Weights, name: str, word: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Count the words in [0, size) of all entries of one tensor, by as many threads as PyTorch's.

    Args:
        deltas: float32 tensors.
        name: the tensor.
        word: makes words of bit patterns of magnitudes, which order as the magnitudes do.
        size: larger words are not counted.
    """
    pieces, threads = list(mapping.pieces(deltas, name)), torch.get_num_threads()

    def share(first: int) -> Tensor:
        counts = torch.zeros(size, dtype=torch.int64)
        for piece in pieces[first::threads]:
            words = word(piece().abs().view(torch.int32))
            counts += torch.bincount(words, minlength=size)[:size].cpu()
        return counts

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return sum(pool.map(share, range(threads)), torch.zeros(size, dtype=torch.int64))


def _high(patterns: Tensor) -> Tensor:
    """Return the 16 high bits of the 31 of a magnitude."""
    return patterns >> 15


def _low(patterns: Tensor, pivot: int) -> Tensor:
    """Return the 15 low bits where the high ones are the pivot, else a word beyond them."""
    return (patterns & 0x7FFF).masked_fill(patterns >> 15 != pivot, 1 << 15)


def _reach(counts: Tensor, count: int) -> tuple[int, int]:
    """Return the bin where counting down from the top reaches `count`, and what is left there."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, count))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, count - before
