"""Sign flips, for the editability study of the paper's follow-up (Findings of ACL 2026)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.edits import Edit, Moments, Unit, within
from deltalab.rng import Rng


@dataclass(frozen=True)
class SignFlip(Edit):
    """Flip the signs of entries chosen at random.

    D_hat = (1 - 2 M) D with M ~ Bernoulli(f): relative to the delta, the shift has mean -2 f and
    variance 4 f (1 - f). Balanced, the other entries are multiplied by (1 + f) / (1 - f), so that
    E[D_hat] = D: DARE with k = -1.

    Args:
        fraction: f, the probability of a flip; in [0, 1], balanced in [0, 1).
        balanced: whether the other entries make up for the flipped ones.

    Raises:
        ValueError: a field is out of range.

    >>> from deltalab.rng import Rng
    >>> SignFlip(fraction=1.0, balanced=False)(torch.tensor([1.0, -2.0]), rng=Rng(0, "w"))
    tensor([-1.,  2.])
    """

    fraction: float
    balanced: bool
    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        within("fraction", self.fraction, "[0, 1)" if self.balanced else "[0, 1]")
        if not isinstance(self.balanced, bool):
            raise ValueError(f"edit.balanced={self.balanced}: must be true or false")

    def __call__(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the delta with signs flipped where the mask is set."""
        others = (1 + self.fraction) / (1 - self.fraction) if self.balanced else 1
        return torch.where(rng.below(delta, self.fraction), -delta, others * delta)

    def moments(self) -> Moments:
        """The shift is -2 M D, or balanced the unbiased one of DARE with k = -1."""
        f = self.fraction
        if self.balanced:
            return Moments(0.0, 4 * f / (1 - f))
        return Moments(-2 * f, 4 * f * (1 - f))
