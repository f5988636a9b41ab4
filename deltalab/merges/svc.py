"""Singular value calibration (arXiv 2602.05536): the sum, less what experts say in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.merges import Merge, mean, number, total


@dataclass(frozen=True)
class Svc(Merge):
    """Shrink those singular values of the sum that several experts add up to.

    With sum_t D_t = U S V' and a_r^t = u_r' D_t, the part of expert t along the r-th left
    direction, and s_r^t = <sum_t a_r^t, a_r^t> / ||a_r^t||^2, how often the sum says what the
    expert says: S_r is multiplied by T / sum_t max(alpha, s_r^t). Experts that are the same come
    back as they are, those that share no column are added up, and so it goes from one to the other
    by itself. Experts without a part along a direction (up to rounding) do not count there; the
    paper leaves that open. Tensors of one dimension are averaged.

    Args:
        alpha: the least that s_r^t counts for, above 0, so that experts that contradict the sum do
            not blow it up; None: 1/T. The paper takes 1/T or 0.1.
        weight: what the result for matrices is multiplied by, any number.

    Raises:
        ValueError: a field is out of range.

    >>> one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> merge = Svc(alpha=None, weight=1.0)
    >>> merge([one, other]), merge([one, one])
    (tensor([[2., 1.]]), tensor([[2., 0.]]))
    """

    alpha: float | None
    weight: float
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.alpha is not None:
            number("alpha", self.alpha, lambda x: x > 0, "above 0, or null")
        number("weight", self.weight)

    def __call__(self, deltas: Sequence[Tensor]) -> Tensor:
        """Return the merged delta, computed in float64."""
        if deltas[0].ndim < 2 or not deltas[0].numel():
            return mean(deltas)
        least = 1 / len(deltas) if self.alpha is None else self.alpha
        left = torch.linalg.svd(total(deltas).flatten(1).double(), full_matrices=False)[0]
        parts = [left.T @ delta.flatten(1).double() for delta in deltas]
        whole = torch.stack(parts).sum(0)
        said, count = torch.zeros_like(left[0]), torch.zeros_like(left[0])
        for part in parts:
            length = part.square().sum(1)
            there = length > length.sum() * torch.finfo(torch.float32).eps ** 2
            overlap = (whole * part).sum(1) / torch.where(there, length, 1.0)
            said += torch.where(there, overlap.clamp(min=least), 0.0)
            count += there
        gamma = count / torch.where(count > 0, said, 1.0)
        found: Tensor = (left * (self.weight * gamma)) @ whole
        return found.float().reshape(deltas[0].shape)
