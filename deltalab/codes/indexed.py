"""Entries kept at places that only the delta tells: the places are held beside the values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from deltalab.codes import Code, Setting, blank, integers
from deltalab.codes.kept import Holding, held
from deltalab.codes.raw import Zero, flat

_WIDTHS = range(1, 9)
_LONG = 256


@dataclass(frozen=True, eq=False)
class Indexed(Holding):
    """Entries at places that are held: as gaps of few bits, or as one bit an entry if that is less.

    With gaps of w bits, M = 2^w - 1: from one kept entry to the next, g dropped ones lie between;
    the word M says that M dropped ones follow, any other how many do before the next kept entry. So
    g takes floor(g / M) + 1 words. Of the widths from 1 to 8 the one of fewest bits is taken.

    Arrays beside those of `Holding`: `gaps`, packed (`integers`), or `mask`, one bit an entry.
    Settings: `width`, 0 for a mask, and `words`.

    >>> delta = torch.zeros(1000)
    >>> delta[[5, 999]] = torch.tensor([1.0, 2.0])
    >>> code = Indexed.at(delta, None, delta != 0)
    >>> code.settings["width"], code.arrays["gaps"].numel(), torch.equal(code.decode(), delta)
    (8, 5, True)
    """

    kind: ClassVar[str] = "indexed"

    @classmethod
    def at(
        cls, delta: Tensor, post: Tensor | None, places: Tensor, scale: float = 1.0
    ) -> "Indexed | Zero":
        """Return the code of `scale` D at some places; where there are none, that of zeros.

        Args:
            delta: D.
            post: W_post, to hold its own entries; None to hold those of D.
            places: boolean, of D's shape, on any device.
            scale: of these entries.
        """
        shape = tuple(delta.shape)
        mask = flat(places)
        index = torch.from_numpy(np.flatnonzero(mask.numpy()))
        values, holds = held(delta, post, index)
        if not len(values):
            return Zero(shape, {}, {})
        gaps = np.diff(index.numpy(), prepend=-1) - 1
        width, words = _width(len(mask), _spread(gaps))
        settings: dict[str, Setting] = {"scale": scale, "holds": holds}
        if not width:
            arrays = {"values": values, "mask": integers.pack(mask, 1)}
            return cls(shape, arrays, {**settings, "width": 0, "words": 0})
        made = _words(gaps, (1 << width) - 1)
        arrays = {"values": values, "gaps": integers.pack(torch.from_numpy(made), width)}
        return cls(shape, arrays, {**settings, "width": width, "words": words})

    @classmethod
    def outline(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        spread: Sequence[float],
        scale: float = 1.0,
    ) -> "Indexed | Zero":
        """Return the code of entries of W_post without them.

        Args:
            shape: of the delta.
            dtype: of W_post.
            spread: as `spread` tells of the places.
            scale: of these entries.
        """
        count = int(spread[0])
        if not count:
            return Zero(shape, {}, {})
        width, words = _width(prod(shape), spread)
        bits = integers.size(words, width) if width else integers.size(prod(shape), 1)
        arrays = {"values": blank(count, dtype), "gaps" if width else "mask": blank(bits)}
        settings: dict[str, Setting] = {"scale": scale, "holds": "weights"}
        return cls(shape, arrays, {**settings, "width": width, "words": words})

    def places(self) -> Tensor:
        """Read the places."""
        width = self._setting("width", int)
        if width == 0:
            return integers.unpack(self._array("mask"), 1, self.count).bool()
        most = (1 << width) - 1
        words = integers.unpack(self._array("gaps"), width, self._setting("words", int)).numpy()
        ends = np.flatnonzero(words != most)
        found = np.cumsum(words, dtype=np.int64)[ends] + np.arange(len(ends))
        if len(found) and not 0 <= found[-1] < self.count:
            raise ValueError(f"code {self.kind}: entry {found[-1]} of {self.count}")
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[torch.from_numpy(found)] = True
        return mask

    def _saved(self) -> float:
        places = next(a.numel() for name, a in self.arrays.items() if name in ("gaps", "mask"))
        return 8 * places - self.count * entropy(self.arrays["values"].numel() / self.count)


def spread(places: Tensor) -> tuple[float, ...]:
    """Return how many entries are kept, and of the gaps g before them sum floor(g / M), by width.

    Args:
        places: boolean.

    Returns:
        Nine whole numbers: the count, then for M = 2^w - 1, w from 1 to 8.

    >>> spread(torch.tensor([False, False, False, True, True]))
    (2.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    """
    index = np.flatnonzero(flat(places).numpy())
    return _spread(np.diff(index, prepend=-1) - 1)


def _spread(gaps: "np.ndarray[Any, Any]") -> tuple[float, ...]:
    """Return what `spread` tells, of gaps: most are short and looked up."""
    short = np.bincount(np.minimum(gaps, _LONG), minlength=_LONG + 1)[:_LONG]
    long = gaps[gaps >= _LONG]
    shares = (
        float((np.arange(_LONG) // ((1 << w) - 1)) @ short + (long // ((1 << w) - 1)).sum())
        for w in _WIDTHS
    )
    return float(len(gaps)), *shares


def _width(count: int, spread: Sequence[float]) -> tuple[int, int]:
    """Return the best width and the number of words; zeros where a mask takes no more.

    Args:
        count: of all entries.
        spread: of the kept ones.
    """
    words = {w: int(spread[0] + spread[w]) for w in _WIDTHS}
    width = min(_WIDTHS, key=lambda w: w * words[w])
    return (0, 0) if width * words[width] >= count else (width, words[width])


def _words(
    gaps: "np.ndarray[tuple[int], np.dtype[np.int64]]", most: int
) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Return the words of gaps: `most` says that so many are dropped and no kept one follows."""
    more, rest = np.divmod(gaps, most)
    words = np.full(len(gaps) + int(more.sum()), most, dtype=np.uint8)
    words[np.cumsum(more + 1) - 1] = rest
    return words


def entropy(q: float) -> float:
    """Return H2(q) = -q log2 q - (1 - q) log2 (1 - q), in bits.

    >>> entropy(0.5), entropy(0.0), round(entropy(0.03) / 0.03, 2)
    (1.0, 0.0, 6.48)
    """
    return sum(x * math.log2(1 / x) for x in (q, 1 - q) if x > 0)


def sparse(hat: Tensor) -> Code:
    """Return the code of the entries of an edited delta that are not zero, in float32."""
    return Indexed.at(hat, None, hat != 0)
