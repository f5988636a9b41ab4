"""What an edit did to a pair's weights, counted in the pass that edits.

`terms` is what is added up of every entry, recorded with the edit where that is compiled
(`kernels`), `summed` slice by slice elsewhere: in float64, in an order that no number of threads
changes.
"""

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from deltalab.codes import Bits
from deltalab.linear.delta import difference
from deltalab.weights.mapping import ModelPair, meta

TERMS = 5
"""How many sums there are of a tensor."""
_CHUNK = 1 << 15
"""Entries that PyTorch adds up with one thread."""


def terms(pre: Tensor, post: Tensor, delta: Tensor, hat: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    """Return what is added up: entries with W_pre's value, then those whose squares count.

    Args:
        pre: pre-trained weights.
        post: post-trained weights.
        delta: their difference D.
        hat: the edited delta F(D).
        out: the edited weights as they are stored.

    Returns:
        Of every entry whether it is as pre-trained; shift, delta, F(D) - D, and how much of the
        last the shift has lost.
    """
    shift, ideal = difference(post, out), hat - delta
    return out == pre, shift, delta, ideal, shift - ideal


def summed(found: Sequence[Tensor]) -> list[float]:
    """Return the sums of the squares of terms.

    >>> summed([torch.tensor([True, True, False]), torch.tensor([1.0, -2.0, 0.0])])
    [2.0, 5.0]
    """
    sums = [0.0] * len(found)
    size = found[0].numel()
    step = _CHUNK if found[0].device.type == "cpu" and size > _CHUNK else max(1, size)
    for at in range(0, size, step):
        parts = [t.reshape(-1)[at : at + step] if step < size else t for t in found]
        now = torch.stack([_squared(part) for part in parts]).cpu().tolist()
        sums = [one + other for one, other in zip(sums, now, strict=True)]
    return sums


def _squared(term: Tensor) -> Tensor:
    wide = term.double()
    return (wide if term.dtype == torch.bool else wide.mul_(wide)).sum()


class Audit:
    """What an edit did to every tensor of a pair, each counted as it is edited."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[float], Bits | None]] = {}

    def add(self, name: str, entries: int, sums: list[float], bits: Bits | None = None) -> None:
        """Note one tensor: its entries, what `terms` of them add up to, and what its code takes.

        One that is edited again takes the place of what it was.
        """
        self._found[name] = entries, sums, bits

    def said(self, pair: ModelPair) -> dict[str, Any]:
        """Say what the edit did: what it touched, how far it moved, how much of that storage lost.

        `relative_shift` is |shift| / |delta| and `lost_in_storage` |shift - (F(D) - D)| /
        |F(D) - D|, Frobenius norms over the touched tensors; `sparsity` is the share of touched
        entries that have the pre-trained value. For edits that have a code `bytes` is what the
        codes of the touched tensors take, and `bits_per_weight` the same for every touched entry:
        `payload`, `metadata`, and `bound`, both with places entropy coded; `model` is for every
        parameter, those that are not touched as they are stored.
        """
        each = zip(*(sums for _, sums, _ in self._found.values()), strict=True)
        same, shift, delta, ideal, lost = map(sum, each) if self._found else [0.0] * TERMS
        entries = sum(count for count, _, _ in self._found.values())
        return {
            **self._size(pair, entries),
            "tensors": len(self._found),
            "parameters": entries,
            "of_parameters": sum(t.numel() for t in pair.module.parameters()),
            "relative_shift": math.sqrt(shift / delta) if delta else 0.0,
            "sparsity": same / entries if entries else 0.0,
            "lost_in_storage": math.sqrt(lost / ideal) if ideal else 0.0,
        }

    def _size(self, pair: ModelPair, entries: int) -> dict[str, Any]:
        """Say what the codes take; nothing where a tensor has none."""
        bits = [found for *_, found in self._found.values() if found is not None]
        if not entries or len(bits) < len(self._found):
            return {}
        total = sum(bits, Bits(0, 0, 0.0))
        untouched = [meta(pair.post, name) for name in pair.post if name not in self._found]
        others = sum(prod(each.shape) for each in untouched)
        stored = sum(8 * prod(each.shape) * each.dtype.itemsize for each in untouched)
        return {
            "bytes": -(-total.total // 8),
            "bits_per_weight": {
                "payload": total.payload / entries,
                "metadata": total.metadata / entries,
                "bound": total.bound / entries,
                "model": (total.total + stored) / (entries + others),
            },
        }
