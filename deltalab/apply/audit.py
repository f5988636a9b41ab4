"""What an edit did to a pair's weights, counted in the pass that edits.

`terms` is what is added up of every entry, recorded with the edit where that is compiled
(`kernels`), `summed` slice by slice elsewhere: in float64, in an order that no number of threads
changes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltalab.weights.mapping import ModelPair, difference

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
        self._found: dict[str, tuple[int, list[float]]] = {}

    def add(self, name: str, entries: int, sums: list[float]) -> None:
        """Note one tensor: its entries, and what `terms` of them add up to.

        One that is edited again takes the place of what it was.
        """
        self._found[name] = entries, sums

    def said(self, pair: ModelPair) -> dict[str, Any]:
        """Say what the edit did: what it touched, how far it moved, how much of that storage lost.

        `relative_shift` is |shift| / |delta| and `lost_in_storage` |shift - (F(D) - D)| /
        |F(D) - D|, Frobenius norms over the touched tensors; `sparsity` is the share of touched
        entries that have the pre-trained value.
        """
        each = zip(*(sums for _, sums in self._found.values()), strict=True)
        same, shift, delta, ideal, lost = map(sum, each) if self._found else [0.0] * TERMS
        entries = sum(count for count, _ in self._found.values())
        return {
            "tensors": len(self._found),
            "parameters": entries,
            "of_parameters": sum(t.numel() for t in pair.module.parameters()),
            "relative_shift": math.sqrt(shift / delta) if delta else 0.0,
            "sparsity": same / entries if entries else 0.0,
            "lost_in_storage": math.sqrt(lost / ideal) if ideal else 0.0,
        }
