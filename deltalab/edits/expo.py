"""ExPO, interpolation and extrapolation (arXiv 2404.16792; arXiv 2410.13841, Eqs. 13-15)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.edits import Edit, Line, Moments, Unit, within


@dataclass(frozen=True)
class Expo(Edit):
    """Move along the delta: D_hat = (1 + alpha) D.

    alpha > 0 extrapolates beyond W_post, -1 < alpha < 0 interpolates towards W_pre,
    alpha = -1 is W_pre exactly.

    Args:
        alpha: step in units of the delta, any number.

    Raises:
        ValueError: alpha is not a finite number.

    >>> import torch
    >>> Expo(alpha=0.5)(torch.tensor([1.0, -2.0]))
    tensor([ 1.5000, -3.0000])
    """

    alpha: float
    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        within("alpha", self.alpha, "(-inf, inf)")

    def __call__(self, delta: Tensor) -> Tensor:
        """Return the scaled delta."""
        return (1 + self.alpha) * delta

    def line(self) -> Line | None:
        """The shift is alpha D; inwards and outwards are two lines, each with a budget."""
        if 0 < self.alpha <= 1:
            return Line("expo outwards", float(self.alpha), 0.0, 1.0, most=6)
        if -1 <= self.alpha <= 0:
            return Line("expo inwards", float(self.alpha), -1.0, 0.0, most=5)
        return None

    def moments(self) -> Moments:
        """Nothing is random: alpha everywhere."""
        return Moments(float(self.alpha), 0.0)
