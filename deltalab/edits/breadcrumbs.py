"""Model Breadcrumbs: drop the outliers and the small entries (arXiv 2312.06795)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.indexed import Indexed
from deltalab.codes.raw import Raw
from deltalab.edits import Edit, Unit, within
from deltalab.weights.threshold import kept_count


@dataclass(frozen=True)
class Breadcrumbs(Edit):
    """Keep the middle magnitudes of every row.

    Of the n entries of a row, the floor(gamma n) of largest |D| are dropped and the floor(beta n)
    next largest kept. Tensors are read as (out, rest), those of one dimension as one row; a scalar
    is returned as it is. gamma = 0 is a row-wise magnitude trim.

    Args:
        beta: fraction kept, in [0, 1].
        gamma: fraction of outliers dropped, in [0, 1 - beta].

    Raises:
        ValueError: a field is out of range.

    >>> Breadcrumbs(beta=0.5, gamma=0.25)(torch.tensor([9.0, -1.0, 3.0, -4.0]))
    tensor([ 0.,  0.,  3., -4.])
    """

    beta: float
    gamma: float
    unit: ClassVar[Unit] = "row"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        within("beta", self.beta, "[0, 1]")
        within("gamma", self.gamma, "[0, 1]")
        if self.beta + self.gamma > 1 + 1e-9:
            raise ValueError(f"edit.gamma={self.gamma}: must be at most 1 - beta, {1 - self.beta}")

    def __call__(self, delta: Tensor) -> Tensor:
        """Return the delta with all but the middle entries of every row set to zero."""
        if delta.ndim == 0 or delta.numel() == 0:
            return delta.clone()
        return torch.where(self._middle(delta), delta, 0.0)

    def _middle(self, delta: Tensor) -> Tensor:
        """Return the mask of the entries that are kept."""
        rows = delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)
        first = kept_count(self.gamma, rows.shape[1])
        last = first + kept_count(self.beta, rows.shape[1])
        order = rows.abs().argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros(rows.shape, dtype=torch.bool, device=delta.device)
        return kept.scatter_(1, order[:, first:last], True).reshape(delta.shape)

    def encode(self, delta: Tensor, *, post: Tensor | None = None) -> Code:
        """Return the entries that are kept, and where they are."""
        if delta.ndim == 0 or delta.numel() == 0:
            return Raw.holding(delta, post)
        return Indexed.at(delta, post, self._middle(delta))
