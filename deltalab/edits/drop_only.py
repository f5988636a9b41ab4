"""Drop-only: DARE without the rescale, the biased reference of arXiv 2410.13841, Fig. 3."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes.kept import Kept
from deltalab.edits import Edit, Moments, Survival, Unit, one_of, within
from deltalab.rng import Rng

EXACT = 1e-9
"""How far above its share of the entries what an expert keeps may be by rounding."""


@dataclass(frozen=True)
class DropOnly(Edit):
    """Drop entries at random and leave the rest as they are.

    D_hat = (1 - M) D with M ~ Bernoulli(p), the mask of DARE under the same seed.
    E[D_hat] = (1 - p) D: a noisy interpolation with alpha = -p.

    Summed over the experts of a family this is SoTU (arXiv 2411.02813), whose rule of thumb is
    1 - p = 1/T for T experts. `masks` says how their masks are drawn:

    * null: each by itself, so that an entry has several writers with probability
      1 - p^T - T (1 - p) p^(T-1), and cosines between the deltas shrink to (1 - p) of what they
      were, up to chance;
    * "disjoint": expert t = 0, 1, ... keeps the entries whose one uniform number u lies in
      [t/T, t/T + 1 - p), so that no entry has two writers and cosines are exactly 0.

    Args:
        p: drop probability, in [0, 1]; with disjoint masks of T experts at least 1 - 1/T.
        masks: null or "disjoint"; of a pair they are the same.

    Raises:
        ValueError: p or masks is out of range.

    >>> import torch
    >>> DropOnly(p=1.0)(torch.tensor([1.0, -2.0]), rng=Rng(0, "w")).abs()
    tensor([0., 0.])
    """

    p: float
    masks: str | None = None
    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "p"
    choices: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)

    def __post_init__(self) -> None:
        within("p", self.p, "[0, 1]")
        one_of("masks", self.masks, (None, "disjoint"))

    def __call__(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the delta with the masked entries set to zero."""
        return delta.masked_fill(rng.below(delta, self.p), 0.0)

    def encode(self, delta: Tensor, *, rng: Rng, post: Tensor | None = None) -> Kept:
        """Return the entries that are kept."""
        return Kept.drawn(delta, post, rng, self.p)

    def held(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the entries that are kept."""
        return ~rng.below(delta, self.p)

    def outline(
        self, shape: tuple[int, ...], dtype: torch.dtype, held: tuple[float, ...], *, rng: Rng
    ) -> Kept:
        """Return the code by how many entries are kept."""
        return Kept.outline(shape, dtype, int(held[0]), rng, self.p)

    def moments(self) -> Moments:
        """The shift is -M D: those of a Bernoulli number with its sign turned."""
        return Moments(-self.p, self.p * (1 - self.p))

    def survival(self) -> Survival:
        """An entry stays with probability 1 - p."""
        return Survival(1 - self.p, (1 - self.p) ** 2)

    def among(self, place: int, count: int) -> "Part | None":
        """Return the part of the entries that one of several experts keeps, if masks are so.

        >>> DropOnly(p=0.5, masks="disjoint").among(0, 4)
        Traceback (most recent call last):
        ValueError: edit.p=0.5: 4 experts with disjoint masks keep 0.25 each; must be at least 0.75
        """
        if self.masks is None or count == 1:
            return None
        if 1 - self.p > 1 / count + EXACT:
            raise ValueError(
                f"edit.p={self.p}: {count} experts with disjoint masks keep {1 / count:g} each;"
                f" must be at least {1 - 1 / count:g}"
            )
        return Part(self.p, self.masks, place, count)


@dataclass(frozen=True)
class Part(DropOnly):
    """Keep the entries that are one expert's, of random numbers that all experts share.

    Args:
        p: as for `DropOnly`.
        masks: likewise.
        place: the expert's, from 0.
        count: of experts.

    >>> import torch
    >>> parts = [Part(0.75, "disjoint", t, 4)(torch.ones(99), rng=Rng(0, "w")) for t in range(4)]
    >>> bool((sum(parts) == 1).all())
    True
    """

    place: int = 0
    count: int = 1
    version: ClassVar[int] = 1

    def __call__(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the delta with all other entries set to zero."""
        low, next_ = self.place / self.count, (self.place + 1) / self.count
        mine = rng.below(delta, min(low + 1 - self.p, next_)) & ~rng.below(delta, low)
        return delta.masked_fill(~mine, 0.0)

    def survival(self) -> Survival:
        """No entry stays in two experts' deltas."""
        return Survival(1 - self.p, 0.0)
