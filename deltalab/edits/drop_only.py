"""Drop-only: DARE without the rescale, the biased reference of arXiv 2410.13841, Fig. 3."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.codes.kept import Kept
from deltalab.edits import Edit, Moments, Unit, within
from deltalab.rng import Rng


@dataclass(frozen=True)
class DropOnly(Edit):
    """Drop entries at random and leave the rest as they are.

    D_hat = (1 - M) D with M ~ Bernoulli(p), the mask of DARE under the same seed.
    E[D_hat] = (1 - p) D: a noisy interpolation with alpha = -p.

    Args:
        p: drop probability, in [0, 1].

    Raises:
        ValueError: p is out of range.

    >>> import torch
    >>> DropOnly(p=1.0)(torch.tensor([1.0, -2.0]), rng=Rng(0, "w")).abs()
    tensor([0., 0.])
    """

    p: float
    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "p"
    choices: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)

    def __post_init__(self) -> None:
        within("p", self.p, "[0, 1]")

    def __call__(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the delta with the masked entries set to zero."""
        return delta.masked_fill(rng.below(delta, self.p), 0.0)

    def encode(self, delta: Tensor, *, rng: Rng, post: Tensor | None = None) -> Kept:
        """Return the entries that are kept."""
        return Kept.drawn(delta, post, rng, self.p)

    def moments(self) -> Moments:
        """The shift is -M D: those of a Bernoulli number with its sign turned."""
        return Moments(-self.p, self.p * (1 - self.p))
