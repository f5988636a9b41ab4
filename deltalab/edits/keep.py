"""Keep: the post-trained model itself, the upper reference line of every figure."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """Keep the delta: D_hat = D.

    >>> import torch
    >>> Keep()(torch.tensor([1.0, -2.0]))
    tensor([ 1., -2.])
    """

    unit: ClassVar[str] = "entry"

    def __call__(self, delta: Tensor) -> Tensor:
        """Return a copy of the delta."""
        return delta.clone()
