"""Iso-C (arXiv 2502.04959): the sum of the experts with all singular values made equal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.merges import Merge, mean, number, total


@dataclass(frozen=True)
class Iso(Merge):
    """Flatten the spectrum of the sum: D = weight mean(s) U V', with U diag(s) V' = sum_t D_t.

    The sum of singular values stays what it was. The mean is over the singular values that are not
    zero to rounding, whose directions alone are determined. Tensors of one dimension are averaged.

    Args:
        weight: what the result for matrices is multiplied by; the paper takes 1 to 1.5.

    Raises:
        ValueError: a field is out of range.

    >>> one, other = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> Iso(weight=1.0)([one, other]).abs()
    tensor([[2., 0.],
            [0., 2.]])
    """

    weight: float
    version: ClassVar[int] = 1
    alone: ClassVar[Mapping[str, Any] | None] = None

    def __post_init__(self) -> None:
        number("weight", self.weight)

    def __call__(self, deltas: Sequence[Tensor]) -> Tensor:
        """Return the merged delta, computed in float64."""
        if deltas[0].ndim < 2 or not deltas[0].numel():
            return mean(deltas)
        summed = total(deltas).flatten(1).double()
        u, s, vh = torch.linalg.svd(summed, full_matrices=False)
        rank = int((s > s[0] * max(summed.shape) * torch.finfo(torch.float32).eps).sum())
        flat = s[:rank].mean() if rank else s.new_zeros(())
        found: Tensor = (self.weight * flat) * (u[:, :rank] @ vh[:rank])
        return found.float().reshape(deltas[0].shape)
