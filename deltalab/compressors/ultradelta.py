"""UltraDelta: few levels, pruned at random level by level (arXiv 2505.13563)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.levelled import Levelled
from deltalab.edits import one_of, whole, within
from deltalab.edits.coded import Coded
from deltalab.rng import Rng


@dataclass(frozen=True)
class Ultradelta(Coded):
    """Round entries to an even grid, drop a share of every level's at random, rescale the rest.

    q = round((D - min) / (max - min) (2^b - 1)); of the n entries of one level, (1 - rate) n are
    kept, to within one, so that the survivors have the delta's histogram, and their total is exact.
    Levels that are zero anyway count as dropped. D_hat = gamma / (1 - rate) times the survivors.
    With a budget (`budget=thirds`) tensors have rates of their own; `rescale=global`, as in the
    authors' code, then still divides by 1 - rate of the whole model, which is biased tensor by
    tensor; `per_layer` is not.

    Args:
        rate: share of the entries that is dropped, in [0, 1).
        bits: b, from 1 to 16.
        gamma: above 0; 1 is unbiased, 1 - rate the least expected error.
        rescale: "global", "per_layer", or what survivors are multiplied by.

    Raises:
        ValueError: a field is out of range.

    >>> edit = Ultradelta(rate=0.5, bits=1, gamma=1.0, rescale="per_layer")
    >>> edit(torch.tensor([1.0, 1.0, -1.0, -1.0]), rng=Rng(0, "w")).sort().values
    tensor([-2.,  0.,  0.,  2.])
    """

    rate: float
    bits: int
    gamma: float
    rescale: str | float
    version: ClassVar[int] = 1
    axes: ClassVar[bool] = False
    spends: ClassVar[str] = "rate"
    choices: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97)

    def __post_init__(self) -> None:
        within("rate", self.rate, "[0, 1)")
        whole("bits", self.bits, 1)
        within("bits", self.bits, "[1, 16]")
        within("gamma", self.gamma, "(0, inf)")
        if isinstance(self.rescale, str):
            one_of("rescale", self.rescale, ("global", "per_layer"))
        else:
            within("rescale", self.rescale, "(0, inf)")

    def encode(self, delta: Tensor, *args: Any, rng: Rng, **needs: Any) -> Code:
        """Return the code of the surviving levels and their places."""
        low, high = (float(x) for x in delta.aminmax()) if delta.numel() else (0.0, 0.0)
        step = (high - low) / (2**self.bits - 1)
        integers = ((delta - low) / (step or 1.0)).round().clamp_(0, 2**self.bits - 1).int()
        places = survivors(integers, self._zero(low, step), self.rate, rng)
        scale = self.gamma / (1 - self.rate)
        if not isinstance(self.rescale, str):
            scale = float(self.rescale)
        return Levelled.on_grid(integers, places, self.bits, low, step, scale)

    def _zero(self, low: float, step: float) -> int:
        """Return the level that is exactly zero; -1 where there is none."""
        if not step:
            return 0 if not low else -1
        near = round(-low / step)
        return near if low + near * step == 0 else -1

    def with_share(self, share: float) -> "Ultradelta":
        """Return the edit of a tensor that a budget gives a rate of its own."""
        if self.rescale == "global":
            return replace(self, rate=share, rescale=self.gamma / (1 - self.rate))
        return replace(self, rate=share)


def survivors(integers: Tensor, zero: int, rate: float, rng: Rng) -> Tensor:
    """Return which entries are kept: of every level the same share, chosen at random.

    Args:
        integers: the level of every entry.
        zero: the level that is zero and has no survivors; its entries count among the dropped. -1
            where there is none.
        rate: the share of all entries that is dropped.
        rng: the random numbers of the tensor.

    >>> survivors(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), -1, 0.5, Rng(0, "w"))[:4].sum()
    tensor(2)
    """
    flat = integers.reshape(-1).long()
    if not flat.numel():
        return integers.bool()
    counts = torch.bincount(flat)
    if zero >= 0:
        counts[zero] = 0
    there = int(counts.sum())
    share = min(1.0, (1 - rate) * flat.numel() / there) if there else 0.0
    ends = (counts.cumsum(0).double() * share + 0.5).floor().long()
    kept = torch.diff(ends, prepend=ends.new_zeros(1))
    draws = rng.bits(integers).reshape(-1).long() + (1 << 31)
    order = (flat << 32 | draws).argsort(stable=True)
    sorted_levels = flat[order]
    starts = torch.bincount(flat).cumsum(0) - torch.bincount(flat)
    place = torch.arange(flat.numel(), device=flat.device) - starts[sorted_levels]
    found = torch.empty_like(flat, dtype=torch.bool)
    found[order] = place < kept[sorted_levels]
    return found.reshape(integers.shape)
