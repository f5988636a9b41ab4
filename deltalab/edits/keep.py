"""Keep: the post-trained model itself, the upper reference line of every figure."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.codes.raw import Raw
from deltalab.edits import Edit, Unit


@dataclass(frozen=True)
class Keep(Edit):
    """Keep the delta: D_hat = D.

    >>> import torch
    >>> Keep()(torch.tensor([1.0, -2.0]))
    tensor([ 1., -2.])
    """

    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1

    def __call__(self, delta: Tensor) -> Tensor:
        """Return a copy of the delta."""
        return delta.clone()

    def encode(self, delta: Tensor, *, post: Tensor | None = None) -> Raw:
        """Return all entries."""
        return Raw.holding(delta, post)
