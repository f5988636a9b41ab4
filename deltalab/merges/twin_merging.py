"""Twin-Merging (arXiv 2406.15479): what experts share, and of each the low-rank rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.edits.twin import Twin
from deltalab.linear.factor import svd
from deltalab.merges import Merge, number


@dataclass(frozen=True)
class TwinMerging(Merge):
    """Give every expert the weighted sum and the best low-rank approximation of its rest.

    With the shared delta S = weight sum_t D_t, expert t gets S + SVD_r(D_t - S). That is the
    paper's model for an input that its router sends to expert t alone; the router, a network that
    mixes the rests of several experts input by input, is not part of a delta. Tensors of one
    dimension are every expert's own, as in the authors' code. It costs r (d + k) numbers an expert
    and matrix, beside S for all.

    Args:
        weight: of every expert in what is shared, any number; None: 1/T, the average.
        rank: r, at least 1. Null where `rate` is set.
        rate: fraction of singular values left out, in [0, 1], as of the edit `twin`; null where
            `rank` is set.

    Raises:
        ValueError: a field is out of range, or not exactly one of rank and rate is set.

    >>> one, other = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)
    >>> TwinMerging(weight=0.5, rank=1, rate=None)([one, other])[0]
    tensor([[4.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    weight: float | None
    rank: int | None
    rate: float | None
    each: ClassVar[bool] = True
    version: ClassVar[int] = 1
    alone: ClassVar[dict[str, Any]] = {"rank": None, "rate": 0.0}

    def __post_init__(self) -> None:
        if self.weight is not None:
            number("weight", self.weight)
        try:
            self._cut()
        except ValueError as error:
            raise ValueError(str(error).replace("edit.", "merge.")) from None

    def __call__(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Return the delta of every expert."""
        if deltas[0].ndim < 2 or not deltas[0].numel():
            return [delta.clone() for delta in deltas]
        if self._cut().kept(deltas[0]) == min(deltas[0].shape[0], deltas[0][0].numel()):
            return [delta.clone() for delta in deltas]
        weight = 1 / len(deltas) if self.weight is None else self.weight
        shared = torch.stack([*deltas]).double().sum(0) * weight
        return [self._of(delta.double() - shared, shared) for delta in deltas]

    def _of(self, rest: Tensor, shared: Tensor) -> Tensor:
        narrow = rest.float()
        kept = self._cut()(narrow, svd=lambda: svd(narrow.flatten(1)))
        return (shared + kept).float()

    def kept(self, deltas: Sequence[Tensor], **needs: Any) -> float:
        """Return the entries of what is shared and of the factors of every rest."""
        first = deltas[0]
        if first.ndim < 2 or not first.numel():
            return float(first.numel() * len(deltas))
        rank = self._cut().kept(first)
        if rank == min(first.shape[0], first[0].numel()):
            return float(first.numel() * len(deltas))
        return float(first.numel() + len(deltas) * rank * (first.shape[0] + first[0].numel()))

    def _cut(self) -> Twin:
        return Twin(self.rank, self.rate)
