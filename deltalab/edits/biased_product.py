"""Biased drop by the sign of delta times gradient: a control of arXiv 2410.13841, Table 1."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.edits import Edit, within
from deltalab.edits.biased_sign import two_multipliers


@dataclass(frozen=True)
class BiasedProduct(Edit):
    """DARE's two multipliers, given out by the sign of the delta times the loss gradient.

    Entries with D_ij g_ij < 0, g the gradient at W_post, get k, the others (1 - k p) / (1 - p).
    The first-order term no longer averages out: (1 - k) (|S-| + p / (1 - p) S+), with S- and S+
    the sums of the negative and the positive products.

    Args:
        k: multiplier of the entries with a negative product, any number.
        p: in [0, 1), or null for the fraction of such entries of each tensor.

    Raises:
        ValueError: k or p is out of range.

    >>> import torch
    >>> BiasedProduct(k=0.0, p=0.5)(torch.tensor([1.0, -2.0]), grad=torch.tensor([1.0, 1.0]))
    tensor([2., -0.])
    """

    k: float
    p: float | None
    fuses: ClassVar[bool] = True
    version: ClassVar[int] = 1
    axes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        within("k", self.k, "(-inf, inf)")
        if self.p is not None:
            within("p", self.p, "[0, 1)")

    def __call__(self, delta: Tensor, *, grad: Tensor) -> Tensor:
        """Return the delta times the multiplier of its product's sign."""
        opposed = ((delta < 0) & (grad > 0)) | ((delta > 0) & (grad < 0))  # products underflow
        return two_multipliers(delta, opposed, self.k, self.p)
