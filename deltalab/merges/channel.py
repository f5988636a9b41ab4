"""Channel Merging (arXiv 2412.15283): experts share the rows of a matrix in which they agree."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.merges import Merge, number, one_of

EXACT = 6
"""Up to so many experts the best grouping of a row is found by trying all, 203 for six."""
HEADED = re.compile(
    r"(^|[._])((qkv|query_key_value|q|k|v|query|key|value)(_?proj)?([._]weight)?|in_proj_weight)$"
)
"""Tensors whose rows are those of attention heads, by their names."""
_BITS = 15
"""Of the 31 bits of a cost's magnitude those that the second count is of."""

Total = Callable[[Callable[..., Tensor]], Tensor]


@dataclass(frozen=True)
class Channel(Merge):
    """Group the experts for every output channel, and give each the mean of its group.

    Row i of every matrix (out, rest): the N experts' rows are put into groups, D_hat_t[i] = weight
    times the mean of D_u[i] over the experts u in the group of t. What is kept is one row for each
    group, and a table of who belongs where; an expert is looked up in it. Tensors of one dimension
    are every expert's own.

    With `groups`, every row has at most so many: the grouping of least squared error, by trying all
    for up to six experts, beyond that by Ward's method. With `budget`, Ward's method joins groups
    in order of their cost, n_a n_b / (n_a + n_b) ||m_a - m_b||^2 for each number that it saves,
    until no more than the budget is kept: over the whole model, or in every matrix by itself. Over
    the model the matrices of small deltas are shared first, whatever hangs on them. The paper
    leaves open how many groups there are, by which similarity, and how a group is merged.

    Args:
        groups: groups of a row, at least 1; as many as experts keep them apart. Null where `budget`
            is set.
        budget: share of the numbers of all matrices that is kept, of those of separate experts, in
            [1/N, 1]. Null where `groups` is set.
        spread: "model", or "tensor" for the same share of every matrix; where `budget` is set.
        granularity: "channel", or "head" to group the rows of an attention head of queries, keys or
            values as one; other tensors are grouped by channel.
        head: rows of an attention head, where `granularity` is head; else null.
        similarity: "distance" of rows, or "cosine", of rows brought to length 1, zero staying zero.
        weight: what the means are multiplied by, any number.

    Raises:
        ValueError: a field is out of range, or not exactly one of groups and budget is set.

    >>> merge = Channel(groups=2, budget=None, spread="model", granularity="channel", head=None,
    ...                 similarity="distance", weight=1.0)
    >>> [d.tolist() for d in merge([torch.tensor([[x]]) for x in (1.0, 3.0, 9.0)])]
    [[[2.0]], [[2.0]], [[9.0]]]
    """

    groups: int | None
    budget: float | None
    spread: str
    granularity: str
    head: int | None
    similarity: str
    weight: float
    each: ClassVar[bool] = True
    version: ClassVar[int] = 1
    alone: ClassVar[dict[str, Any]] = {"weight": 1.0}

    def __post_init__(self) -> None:
        if (self.groups is None) == (self.budget is None):
            raise ValueError(
                f"merge.groups={self.groups} merge.budget={self.budget}: set one and leave the"
                " other null"
            )
        one_of("spread", self.spread, ("model", "tensor"))
        one_of("granularity", self.granularity, ("channel", "head"))
        one_of("similarity", self.similarity, ("distance", "cosine"))
        number("weight", self.weight)
        if self.budget is not None:
            number("budget", self.budget, lambda x: 0 < x <= 1, "in (0, 1], or null")
        for field, value in (("groups", self.groups), ("head", self.head)):
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f"merge.{field}={value}: must be a whole number from 1, or null")
        if (self.granularity == "head") != (self.head is not None):
            raise ValueError(
                f"merge.head={self.head}: goes with merge.granularity=head, the rows of one head"
            )
        if self.spread == "tensor" and self.budget is None:
            raise ValueError("merge.spread=tensor: goes with merge.budget, which it spreads")

    @property
    def needs(self) -> tuple[str, ...]:
        """The tensor's name where heads matter, a sum over the model where it has a budget."""
        over = self.budget is not None and self.spread == "model"
        return (*(("name",) if self.head else ()), *(("total",) if over else ()))

    def check(self, experts: Sequence[str]) -> None:
        """Raise `ValueError` where the budget is less than one model for all."""
        if self.budget is not None and self.budget * len(experts) < 1:
            raise ValueError(
                f"merge.budget={self.budget}: of {len(experts)} experts at least"
                f" {1 / len(experts):.4g} is kept"
            )

    def __call__(
        self, deltas: Sequence[Tensor], *, name: str = "", total: Total | None = None
    ) -> list[Tensor]:
        """Return the delta of every expert, averaged in float64 and rounded once."""
        if deltas[0].ndim < 2 or not deltas[0].numel():
            return [delta.clone() for delta in deltas]
        rows = self._rows(deltas, name)
        same = self._same(rows, self._total(deltas, name, total))
        shares = self.weight * same / same.sum(2, keepdim=True)
        found = []
        for own in shares.unbind(1):
            mean = torch.zeros_like(rows[0], dtype=torch.float64)
            for row, share in zip(rows, own.unbind(1), strict=True):
                mean.addcmul_(row.double(), share[:, None])
            found.append(mean.float().reshape(deltas[0].shape))
        return found

    def kept(self, deltas: Sequence[Tensor], **needs: Any) -> float:
        """Return the entries of all groups' rows, and log2 N bits a row and expert of the table."""
        count = len(deltas)
        if deltas[0].ndim < 2 or not deltas[0].numel():
            return float(deltas[0].numel() * count)
        rows = self._rows(deltas, name := needs.get("name", ""))
        same = self._same(rows, self._total(deltas, name, needs.get("total")))
        groups = float((1 / same.sum(2)).sum())
        bits = (count - 1).bit_length() * count * len(same)
        return round(groups) * rows[0].shape[1] + bits / 16

    def costs(self, deltas: Sequence[Tensor], name: str = "") -> tuple[Tensor, int]:
        """Return what Ward's N - 1 joins of every row cost for each number that they save.

        Returns:
            (rows, N - 1) float32, not falling along a row, and how many numbers a join saves.
        """
        rows = self._rows(deltas, name)
        costs, _ = ward(self._products(rows))
        return (costs / rows[0].shape[1]).float(), rows[0].shape[1]

    def _total(self, deltas: Sequence[Tensor], name: str, over: Total | None) -> Total | None:
        """Return what adds up over all that shares a budget."""
        return over if self.spread == "model" else lambda part: part(deltas, name=name)

    def _rows(self, deltas: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return every expert's rows, those of a head as one, (units, entries)."""
        size, rows = 1, deltas[0].shape[0]
        if self.head is not None and HEADED.search(name):
            size = self.head
            if rows % size:
                raise ValueError(f"merge.head={size}: {name} has {rows} rows, which are no heads")
        return [delta.reshape(rows // size, -1) for delta in deltas]

    def _products(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the inner products of the experts' rows, (units, N, N) float64."""
        count = len(rows)
        found = torch.zeros(len(rows[0]), count, count, dtype=torch.float64, device=rows[0].device)
        for one in range(count):
            for other in range(one + 1):
                product = (rows[one].double() * rows[other].double()).sum(1)
                found[:, one, other] = found[:, other, one] = product
        if self.similarity == "cosine":
            lengths = found.diagonal(dim1=1, dim2=2).sqrt()
            scale = torch.where(lengths > 0, 1 / lengths, 0.0)
            found = found * scale[:, :, None] * scale[:, None, :]
        return found

    def _same(self, rows: Sequence[Tensor], total: Total | None) -> Tensor:
        """Return which experts share a group, (units, N, N) float64 of ones and zeros."""
        products, count = self._products(rows), len(rows)
        if self.groups is None:
            assert total is not None
            costs, labels = ward(products)
            keys = (costs / rows[0].shape[1]).float().view(torch.int32)
            joins = (keys <= _limit(self, total)).sum(1)
        else:
            groups = min(self.groups, count)
            if count <= EXACT:
                return _best(products, groups)
            _, labels = ward(products)
            joins = torch.full_like(labels[:, 0, 0], count - groups)
        own = labels.gather(1, joins[:, None, None].expand(-1, 1, count))[:, 0]
        return (own[:, :, None] == own[:, None, :]).double()


@dataclass(frozen=True)
class Savings:
    """How many numbers joins save over the model, by their costs, for `total`.

    A cost's magnitude orders like its bit pattern, of which first the high bits are counted, then
    the low ones of those that have the pivot's high bits.
    """

    of: Channel
    pivot: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The tensor's name where heads matter."""
        return tuple(need for need in self.of.needs if need == "name")

    def __call__(self, deltas: Sequence[Tensor], *, name: str = "") -> Tensor:
        """Return the numbers saved by word, and how many numbers separate experts have."""
        found = torch.zeros((1 << 31 - _BITS) + 1, dtype=torch.int64)
        if deltas[0].ndim < 2 or not deltas[0].numel():
            return found
        costs, width = self.of.costs(deltas, name)
        keys = costs.cpu().view(torch.int32).flatten()
        if self.pivot is not None:
            keys = keys[keys >> _BITS == self.pivot] & (1 << _BITS) - 1
        else:
            keys = keys >> _BITS
        found[:-1] = width * torch.bincount(keys, minlength=len(found) - 1)
        found[-1] = deltas[0].numel() * len(deltas)
        return found


def _limit(merge: Channel, total: Total) -> int:
    """Return the bit pattern of the greatest cost at which joins bring the model to its budget."""
    assert merge.budget is not None
    high = total(Savings(merge)).cpu()
    most = int(high[-1])
    wanted = most - int(round(merge.budget * most, 6))
    if wanted <= 0:
        return -1
    pivot, before = _reached(high[:-1], wanted)
    low = total(Savings(merge, pivot)).cpu()[:-1]
    return pivot << _BITS | _reached(low, wanted - before)[0]


def _reached(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the word at which counting up reaches what is wanted, and what was before it.

    >>> _reached(torch.tensor([2, 0, 3]), 4)
    (2, 2)
    """
    sums = counts.cumsum(0)
    place = min(int(torch.searchsorted(sums, wanted)), int(counts.nonzero()[-1]))
    return place, int(sums[place - 1]) if place else 0


def ward(products: Tensor) -> tuple[Tensor, Tensor]:
    """Join the nearest groups of every row by Ward's method, one after the other.

    Args:
        products: inner products of N vectors of every row, (rows, N, N) float64.

    Returns:
        What each join adds to the squared error, (rows, N - 1), not falling along a row, and the
        groups after 0 to N - 1 joins: the least member of everyone's, (rows, N, N).

    >>> x = torch.tensor([1.0, 3.0, 8.0]).double()
    >>> costs, labels = ward((x[:, None] * x)[None])
    >>> costs[0].tolist(), labels[0].tolist()
    ([2.0, 24.0], [[0, 1, 2], [0, 0, 2], [0, 0, 0]])
    """
    rows, count, _ = products.shape
    every = torch.arange(rows, device=products.device)
    square = products.diagonal(dim1=1, dim2=2)
    apart = (square[:, :, None] + square[:, None, :] - 2 * products).clamp(min=0) / 2
    later = torch.ones(count, count, dtype=torch.bool, device=products.device).triu(1)
    alive = torch.ones(rows, count, dtype=torch.bool, device=products.device)
    sizes = torch.ones(rows, count, dtype=torch.float64, device=products.device)
    label = torch.arange(count, device=products.device).repeat(rows, 1)
    costs, labels = products.new_zeros(rows, count - 1), [label]
    for step in range(count - 1):
        open_ = later & alive[:, :, None] & alive[:, None, :]
        best = torch.where(open_, apart, torch.inf).flatten(1).min(1)
        one, other = best.indices // count, best.indices % count
        costs[:, step] = best.values
        a, b = sizes[every, one][:, None], sizes[every, other][:, None]
        near = ((sizes + a) * apart[every, one] + (sizes + b) * apart[every, other]
                - sizes * best.values[:, None]) / (sizes + a + b)  # fmt: skip
        apart[every, one] = near
        apart[every, :, one] = near
        sizes[every, one] += sizes[every, other]
        alive[every, other] = False
        label = torch.where(label == other[:, None], one[:, None], label)
        labels.append(label)
    return costs.cummax(1).values if count > 1 else costs, torch.stack(labels, 1)


def _best(products: Tensor, groups: int) -> Tensor:
    """Return the grouping of least squared error of every row; of equals, that of fewest groups."""
    every = _groupings(products.shape[1], groups).to(products.device)
    means = every / every.sum(2, keepdim=True)
    kept = products.flatten(1) @ means.flatten(1).T  # what of the squares is not error
    rounding = 1e-12 * products.diagonal(dim1=1, dim2=2).sum(1)
    good = kept >= (kept.max(1).values - rounding)[:, None]
    return every[good.to(torch.uint8).argmax(1)]


@cache
def _groupings(count: int, groups: int) -> Tensor:
    """Return who is with whom in all groupings of at most so many groups, those of fewest first."""

    def grown(labels: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(labels) == count:
            yield labels
            return
        for label in range(min(max(labels, default=-1) + 2, groups)):
            yield from grown((*labels, label))

    found = torch.tensor(sorted(grown(()), key=lambda labels: (max(labels), labels)))
    return (found[:, :, None] == found[:, None, :]).double()
