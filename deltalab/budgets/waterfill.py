"""The same last unit of error everywhere: what is best for the squared error of all tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deltalab.budgets import Budget, Tensors, check, in_bits, refused


@dataclass(frozen=True)
class Waterfill(Budget):
    """Spread ranks, or bits a weight, so that the squared error of all deltas is least.

    For edits that spend a rank: singular values are taken from all tensors in the order of s^2 for
    each bit that they take, as far as the total goes, at least one of each. For edits that spend
    bits a weight, reverse water-filling: b_l = log2(sigma_l^2 / theta) / 2, within what the edit
    allows, with the one theta for which sum_l n_l b_l is the total (optimal where the error of n
    entries at b bits is n sigma^2 4^-b).

    Args:
        total: null, bits a weight, or megabytes.
        unit: "bits" or "megabytes".

    Raises:
        ValueError: a field is out of range.

    >>> a, b = Tensors(10, 2.0, 4.0, limits=(0, 16)), Tensors(10, 2.0, 1.0, limits=(0, 16))
    >>> found = Waterfill(None, "bits")({"a": a, "b": b}, "total")
    >>> {name: round(bits, 4) for name, bits in found.items()}
    {'a': 3.0, 'b': 1.0}
    """

    total: float | None
    unit: str
    version: ClassVar[int] = 1
    spends: ClassVar[tuple[str, ...]] = ("rank", "total")

    def __post_init__(self) -> None:
        check(self.total, self.unit)

    def wants(self, spends: str) -> tuple[str, ...]:
        """Return spectra and what choices take, for a rank; spreads, for bits."""
        return ("energies", "choices") if spends == "rank" else ("std",)

    def __call__(self, tensors: Mapping[str, Tensors], spends: str) -> dict[str, Any]:
        """Return every tensor's rank, or its bits."""
        if spends == "rank":
            return self._ranks(tensors)
        if self.unit == "megabytes" and self.total is not None:
            total = float(in_bits(self.total, self.unit, tensors))
        else:
            own = [self.total or one.own for one in tensors.values()]
            total = sum(b * one.entries for b, one in zip(own, tensors.values(), strict=True))
        least = sum(one.limits[0] * one.entries for one in tensors.values())
        if total < least:
            raise refused(int(total), int(least), tensors)
        return dict(zip(tensors, _levelled([*tensors.values()], total), strict=True))

    def _ranks(self, tensors: Mapping[str, Tensors]) -> dict[str, int]:
        """Return as many components of every tensor as are worth their bits."""
        total, gains, found = in_bits(self.total, self.unit, tensors), [], {}
        spent = 0
        for name, one in tensors.items():
            first, each = _affine(one)
            spent += first + each
            found[name] = 1
            gains += [(float(e) / each, each, name) for e in one.energies[1:]]
        if spent > total:
            raise refused(total, spent, tensors)
        for _, each, name in sorted(gains, key=lambda gain: -gain[0]):
            if (spent := spent + each) > total:
                break
            found[name] += 1
        return found


def _affine(one: Tensors) -> tuple[int, int]:
    """Return what a code of no component takes at most, and every component, in bits."""
    known = sorted((int(c.share), c.bits) for c in one.choices if c.share is not None)
    (low, bits), (high, more) = known[0], known[1]
    each = -(-(more - bits) // (high - low)) if high > low else bits
    return max(bits - each * low, 0) + 64, each  # numbers of more digits take a few bytes


def _levelled(tensors: Sequence[Tensors], total: float) -> list[float]:
    """Return the bits of every tensor, which come to the total or to what the limits allow."""
    sizes = np.array([one.entries for one in tensors], dtype=float)
    low, high = np.array([one.limits for one in tensors]).reshape(-1, 2).T
    spread = np.log2(np.maximum([one.std for one in tensors], 1e-30))

    def at(level: float) -> "np.ndarray[Any, Any]":
        return np.clip(spread - level, low, high)

    under, over = spread.min(initial=0) - high.max(initial=0), spread.max(initial=0)
    for _ in range(100):
        middle = (under + over) / 2
        if float((sizes * at(middle)).sum()) > total:
            under = middle
        else:
            over = middle
    return [float(bits) for bits in at(over)]
