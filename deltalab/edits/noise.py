"""Multiplicative noise, for the study of editing intensity of the paper's follow-up."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.edits import Edit, Moments, Unit, within
from deltalab.rng import Rng


@dataclass(frozen=True)
class Noise(Edit):
    """Multiply every entry by a normal number of mean 1.

    D_hat = (1 + sigma xi) D with xi ~ N(0, 1): unbiased, of editing intensity sigma^2, to be set
    beside DARE's p / (1 - p).

    Args:
        sigma: relative standard deviation, at least 0.

    Raises:
        ValueError: sigma is out of range.

    >>> import torch
    >>> Noise(sigma=0.0)(torch.tensor([1.0, -2.0]), rng=Rng(0, "w"))
    tensor([ 1., -2.])
    """

    sigma: float
    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        within("sigma", self.sigma, "[0, inf)")

    def __call__(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the delta with its entries scaled at random."""
        return (1 + self.sigma * rng.normal(delta)) * delta

    def moments(self) -> Moments:
        """Unbiased, with variance sigma^2."""
        return Moments(0.0, self.sigma**2)
