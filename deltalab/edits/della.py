"""DELLA's MagPrune: drop small entries more often than large ones (arXiv 2406.11617)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.indexed import sparse
from deltalab.edits import Edit, Unit, within
from deltalab.rng import Rng


@dataclass(frozen=True)
class Della(Edit):
    """Drop entries with a probability that falls with their rank, and rescale each without bias.

    In each row the entries are ranked by |D|, r from 0 (smallest) to 1 (largest); an entry is kept
    with probability q = 1 - p - w/2 + w r and then divided by q, so that E[D_hat] = D. Tensors are
    read as (out, rest), those of one dimension as one row; w = 0 is DARE.

    Args:
        p: mean drop probability, in [0, 1).
        window: w, the difference of the keep probabilities of largest and smallest entry, at least
            0 and below 2 (1 - p), at most 2 p. (Twice the "epsilon" of some implementations.)

    Raises:
        ValueError: a field is out of range.

    >>> edit = Della(p=0.5, window=0.8)
    >>> edit(torch.full((1000,), 1.0), rng=Rng(0, "w")).mean().round(decimals=1)
    tensor(1.)
    """

    p: float
    window: float
    unit: ClassVar[Unit] = "row"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        within("p", self.p, "[0, 1)")
        within("window", self.window, "[0, 1]")
        if not (self.window / 2 < 1 - self.p and self.window / 2 <= self.p):
            widest = 2 * min(self.p, 1 - self.p)
            raise ValueError(
                f"edit.window={self.window}: must be at most 2p and below 2(1 - p), "
                f"here {widest:g}, so that all probabilities lie in (0, 1]"
            )

    def __call__(self, delta: Tensor, *, rng: Rng) -> Tensor:
        """Return the delta with entries dropped by rank and the others rescaled."""
        rows = delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)
        drop = self.p + self.window * (0.5 - relative_ranks(rows)).reshape(delta.shape)
        return torch.where(rng.below(delta, drop), 0.0, delta / (1 - drop))

    def encode(self, delta: Tensor, *, rng: Rng, post: Tensor | None = None) -> Code:
        """Return the rescaled entries, each by a factor of its own, and where they are."""
        return sparse(self(delta, rng=rng))


def relative_ranks(rows: Tensor) -> Tensor:
    """Return every entry's rank by magnitude in its row, from 0 to 1; equal ones by position.

    Args:
        rows: (rows, columns). A row of one entry has rank 1/2.

    >>> relative_ranks(torch.tensor([[3.0, -1.0, 2.0]]))
    tensor([[1.0000, 0.0000, 0.5000]])
    """
    columns = rows.shape[1]
    if columns == 1:
        return torch.full_like(rows, 0.5)
    order = rows.abs().argsort(dim=1, stable=True)
    places = torch.arange(columns, dtype=torch.float32, device=rows.device) / (columns - 1)
    return torch.empty_like(rows).scatter_(1, order, places.expand_as(rows))
