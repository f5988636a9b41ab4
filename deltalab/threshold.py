"""Magnitude thresholds that keep an exact number of entries, of a tensor or of a whole model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltalab.weights import Weights


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
                self._high = torch.zeros(1 << 16, dtype=torch.int64)
                for name in deltas:
                    for words in _words(deltas[name]):
                        self._high += _histogram(words >> 15, 1 << 16)
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
            counts = torch.zeros(1 << 15, dtype=torch.int64)
            for words in _words(deltas[name]):
                counts += _histogram(words[(words >> 15) == pivot] & 0x7FFF, 1 << 15)
            low[name] = counts.to_sparse()
        total = torch.zeros(1 << 15, dtype=torch.int64)
        for counts in low.values():
            total += counts.to_dense()
        word, ties = _reach(total, rest)
        pattern = torch.tensor((pivot << 15) | word, dtype=torch.int32)
        value = float(pattern.view(torch.float32))
        shares = {}
        for name, counts in sorted(low.items()):
            share = min(ties, int(counts.to_dense()[word]))
            ties -= share
            shares[name] = Threshold(value, share)
        return shares


def _words(delta: Tensor) -> Iterator[Tensor]:
    """Yield the bit patterns of the magnitudes, int32, which order as the magnitudes do."""
    flat = delta.flatten()
    for start in range(0, flat.numel(), 1 << 20):
        yield flat[start : start + (1 << 20)].abs().view(torch.int32)


def _histogram(words: Tensor, size: int) -> Tensor:
    """Count words in [0, size)."""
    return torch.bincount(words, minlength=size).cpu()


def _reach(counts: Tensor, count: int) -> tuple[int, int]:
    """Return the bin where counting down from the top reaches `count`, and what is left there."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, count))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, count - before
