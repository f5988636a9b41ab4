"""Discard: the pre-trained model, the lower reference line of every figure."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes.raw import Zero
from deltalab.edits import Edit, Unit


@dataclass(frozen=True)
class Discard(Edit):
    """Discard the delta: D_hat = 0.

    >>> Discard()(torch.tensor([1.0, -2.0]))
    tensor([0., 0.])
    """

    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1

    def __call__(self, delta: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(delta)

    def encode(self, delta: Tensor, *, post: Tensor | None = None) -> Zero:
        """Return nothing but the shape."""
        return Zero(tuple(delta.shape), {}, {})
