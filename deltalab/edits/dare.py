"""DARE with the k extension (arXiv 2311.03099; arXiv 2410.13841, Eqs. 2-6)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes.kept import Kept
from deltalab.edits import Edit, Line, Moments, Survival, Unit, within
from deltalab.rng import Rng


@dataclass(frozen=True)
class Dare(Edit):
    """Drop entries at random and rescale the rest, without bias.

    D_hat = k M D + (1 - k p) / (1 - p) (1 - M) D with M ~ Bernoulli(p) per entry, so that
    E[D_hat] = D and Var[D_hat_ij] = (1 - k)^2 p / (1 - p) D_ij^2. k = 0 is DARE, k = 1 the
    identity, k < 0 flips the signs of a fraction p of the entries.

    Args:
        p: drop probability, in [0, 1).
        k: multiplier of the dropped entries, any number.

    Raises:
        ValueError: p or k is out of range.

    >>> edit, rng = Dare(p=0.75, k=0.0), Rng(0, "w")
    >>> sorted(edit(torch.ones(1000), rng=rng).unique().tolist())
    [0.0, 4.0]
    """

    p: float
    k: float
    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "p"
    choices: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)

    def __post_init__(self) -> None:
        within("p", self.p, "[0, 1)")
        within("k", self.k, "(-inf, inf)")

    def __call__(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the delta times k where the mask is set, times (1 - kp)/(1 - p) elsewhere."""
        kept = (1 - self.k * self.p) / (1 - self.p)
        return torch.where(rng.below(delta, self.p), self.k * delta, kept * delta)

    def encode(self, delta: Tensor, *, rng: Rng, post: Tensor | None = None) -> Kept | None:
        """Return the entries that are kept; for k other than 0, where all are, there is no code."""
        return Kept.drawn(delta, post, rng, self.p, 1 / (1 - self.p)) if self.k == 0 else None

    def held(self, delta: Tensor, *, rng: Rng) -> Tensor | None:
        """Return the entries that are kept, where there is a code."""
        return ~rng.below(delta, self.p) if self.k == 0 else None

    def outline(
        self, shape: tuple[int, ...], dtype: torch.dtype, held: tuple[float, ...], *, rng: Rng
    ) -> Kept | None:
        """Return the code by how many entries are kept."""
        if not held:
            return None
        return Kept.outline(shape, dtype, int(held[0]), rng, self.p, 1 / (1 - self.p))

    def line(self) -> Line | None:
        """At fixed p and mask the shift is (1 - k) (p - M) / (1 - p) D: all k lie on one line."""
        if -1 <= self.k <= 1:
            return Line(f"dare p={self.p!r}", 1.0 - self.k, 0.0, 2.0, most=9)
        if 1 < self.k <= 3:
            return Line(f"dare p={self.p!r} beyond", 1.0 - self.k, -2.0, 0.0, most=9)
        return None

    def moments(self) -> Moments:
        """Unbiased, with variance (1 - k)^2 p / (1 - p)."""
        return Moments(0.0, (1 - self.k) ** 2 * self.p / (1 - self.p))

    def survival(self) -> Survival | None:
        """At k = 0 an entry stays with probability 1 - p; else none is set to zero."""
        return None if self.k else Survival(1 - self.p, (1 - self.p) ** 2)
