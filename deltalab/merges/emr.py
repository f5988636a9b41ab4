"""EMR-Merging (arXiv 2405.17461): one unified delta, and a mask and a scale for every expert."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.merges import Merge


@dataclass(frozen=True)
class Emr(Merge):
    """Elect one delta for all; every expert takes those entries of it that have its own sign.

    With g = sign(sum_t D_t), zero counting as negative: the unified delta is u = g times the
    largest |D_t| of those with the sign g, the mask of expert t is where D_t has the sign of u, and
    its scale s_t = sum |D_t| / sum |mask_t u| over the whole model. Expert t gets s_t mask_t u, so
    that the sum of magnitudes stays what it was. It costs an expert one bit an entry and one
    number, beside u for all.

    >>> one, other = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0])
    >>> Emr()([one, other], total=lambda sums: sums([one, other]))
    [tensor([4., 0.]), tensor([1.8000, 1.2000])]
    """

    each: ClassVar[bool] = True
    version: ClassVar[int] = 1

    def __call__(
        self, deltas: Sequence[Tensor], *, total: Callable[[Callable[..., Tensor]], Tensor]
    ) -> list[Tensor]:
        """Return the delta of every expert."""
        own, kept = total(_sums)
        scales = torch.where(kept > 0, own / kept.clamp(min=1e-300), 1.0).float()
        return [scales[index] * each for index, each in enumerate(_masked(deltas))]

    def kept(self, deltas: Sequence[Tensor], **needs: Any) -> float:
        """Return u's entries and one bit an entry and expert, in numbers of 16 bits."""
        return deltas[0].numel() * (1 + len(deltas) / 16)


def _masked(deltas: Sequence[Tensor]) -> list[Tensor]:
    """Return the unified delta under the mask of every expert."""
    summed = torch.zeros_like(deltas[0])
    for delta in deltas:
        summed += delta
    positive = summed > 0
    agrees = [torch.where(positive, delta > 0, delta < 0) for delta in deltas]
    largest = torch.zeros_like(summed)
    for delta, own in zip(deltas, agrees, strict=True):
        largest = torch.maximum(largest, torch.where(own, delta.abs(), 0.0))
    unified = torch.where(positive, largest, -largest)
    return [torch.where(own, unified, 0.0) for own in agrees]


def _sums(deltas: Sequence[Tensor]) -> Tensor:
    """Return sum |D_t| and sum |mask_t u| of one tensor, (2, experts)."""
    sides = deltas, _masked(deltas)
    return torch.stack([torch.stack([d.double().abs().sum() for d in side]) for side in sides])
