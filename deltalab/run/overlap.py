"""How the edited deltas of a family lie to each other, beside what their draws lead to expect."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltalab.apply.merging import Expert, Family
from deltalab.edits import Survival
from deltalab.linear.delta import difference

ENTRIES = 1 << 20
"""Entries of every expert that are looked at together."""


@dataclass(eq=False)
class _Totals:
    """Sums over the entries of all merged tensors, in float64."""

    count: int
    entries: int = 0
    written: int = 0
    expected: float = 0.0
    spread: float = 0.0
    drawn: bool = True
    base: float = 0.0
    products: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    norms: Tensor = field(init=False)
    of_products: Tensor = field(init=False)
    of_norms: Tensor = field(init=False)
    joint: Tensor = field(init=False)

    def __post_init__(self) -> None:
        square = (self.count, self.count)
        self.products, self.mean, self.of_products, self.joint = (
            torch.zeros(square, dtype=torch.float64) for _ in range(4)
        )
        self.norms, self.of_norms = (torch.zeros(self.count, dtype=torch.float64) for _ in range(2))

    def add(self, hats: Tensor, raws: Tensor, survival: Survival | None) -> None:
        """Add some entries: edited and unedited deltas, (experts, entries)."""
        self.entries += hats.shape[1]
        self.written += int(((hats != 0).sum(0) > 1).sum())
        self.products += hats @ hats.T
        if survival is None:
            self.drawn = False
            return
        one, two = survival
        squares = raws.square()
        self.mean += two * (raws @ raws.T)
        self.norms += one * squares.sum(1)
        self.of_products += (two - two**2) * (squares @ squares.T)
        self.of_norms += (one - one**2) * squares.square().sum(1)
        self.joint += (two - one * two) * ((squares * raws) @ raws.T)
        chances = torch.tensor([_several(n, survival) for n in range(self.count + 1)]).double()
        each = chances[(raws != 0).sum(0)]
        self.expected += float(each.sum())
        self.spread += float((each * (1 - each)).sum())


def _several(writers: int, survival: Survival) -> float:
    """Return how likely two or more of so many entries stay: 1 - p^n - n (1 - p) p^(n-1).

    >>> round(_several(10, Survival(0.1, 0.01)), 3), _several(5, Survival(0.2, 0.0))
    (0.264, 0.0)
    """
    one, two = survival
    if not two or writers < 2:
        return 0.0
    return 1 - (1 - one) ** writers - writers * one * (1 - one) ** (writers - 1)


def overlap(family: Family) -> dict[str, Any]:
    """Return cosines, sizes and collisions of a family's edited deltas, over all merged tensors.

    With masks m_s drawn independently, each entry kept with probability q,

        cos(m_s D_s, m_t D_t) = q cos(D_s, D_t) up to chance,
        P(an entry has several writers) = 1 - p^n - n q p^(n-1), p = 1 - q,

    of n experts that move the entry at all; where masks are disjoint both are 0. The errors are
    standard errors of what one draw gives: of a cosine by the first order of N / sqrt(A B).

    Returns:
        `cosine` by pair of experts, `size` by expert as |D_hat| / |W_pre|, `collisions` as a share
        of entries; and where an edit draws its entries by itself (`Edit.survival`), `expected` and
        `expected_error` with the same of cosine and collisions.
    """
    experts = [*family.experts.values()]
    totals = _Totals(len(experts))
    for name in family.names:
        pre = experts[0].pre[name].to(family.device)
        raws = [difference(pre, each.post[name].to(family.device)) for each in experts]
        hats = [each.of(name, raw) for each, raw in zip(experts, raws, strict=True)]
        totals.base += float(pre.double().square().sum())
        survival = _of(experts, name)
        rows = [torch.stack([t.flatten() for t in side]) for side in (hats, raws)]
        for start in range(0, rows[0].shape[1], ENTRIES):
            hat, raw = (side[:, start : start + ENTRIES].double().cpu() for side in rows)
            totals.add(hat, raw, survival)
    return _told([*family.experts], totals)


def _of(experts: list[Expert], name: str) -> Survival | None:
    """Return how entries of one tensor stay; all of them where the edit does not touch it."""
    found = {each.survival(name) for each in experts}
    return found.pop() if len(found) == 1 else None


def _told(names: list[str], totals: _Totals) -> dict[str, Any]:
    sizes = totals.products.diagonal().sqrt()
    norms = {n: _over(float(s), math.sqrt(totals.base)) for n, s in zip(names, sizes, strict=True)}
    found: dict[str, Any] = {"cosine": {}, "size": norms}
    means: dict[str, float] = {}
    errors: dict[str, float] = {}
    for s, one in enumerate(names):
        for t in range(s + 1, len(names)):
            pair = f"{one} {names[t]}"
            product = float(totals.products[s, t])
            found["cosine"][pair] = _over(product, float(sizes[s] * sizes[t]))
            means[pair], errors[pair] = _cosine(totals, s, t)
    found["collisions"] = _over(totals.written, totals.entries)
    if totals.drawn:
        share = _over(totals.expected, totals.entries)
        spread = _over(math.sqrt(totals.spread), totals.entries)
        found["expected"] = {"cosine": means, "collisions": share}
        found["expected_error"] = {"cosine": errors, "collisions": spread}
    return found


def _cosine(totals: _Totals, s: int, t: int) -> tuple[float, float]:
    """Return a cosine's mean and standard error over the draws, to first order."""
    a, b = float(totals.norms[s]), float(totals.norms[t])
    if not a or not b:
        return 0.0, 0.0
    root = math.sqrt(a * b)
    mean = float(totals.mean[s, t]) / root
    apart = float(totals.of_norms[s]) / a**2 + float(totals.of_norms[t]) / b**2
    both = float(totals.joint[s, t]) / a + float(totals.joint[t, s]) / b
    variance = float(totals.of_products[s, t]) / root**2 + mean**2 / 4 * apart - mean / root * both
    return mean, math.sqrt(max(0.0, variance))


def _over(value: float, whole: float) -> float:
    return value / whole if whole else 0.0
