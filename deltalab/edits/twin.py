"""Twin-Merging's low-rank delta (arXiv 2406.15479; arXiv 2410.13841, Eqs. 10-12)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.lowrank import LowRank
from deltalab.codes.raw import Raw, Zero
from deltalab.edits import Edit, whole, within


@dataclass(frozen=True)
class Twin(Edit):
    """Keep the leading singular components of the delta.

    D = U S V' -> D_hat = U_r S_r V_r', the best rank-r approximation: ||D_hat - D||_F^2 is the sum
    of the squared singular values left out. Tensors of more than two dimensions are read as
    (out, rest); those of fewer are returned as they are, as in the method's code.

    Args:
        rank: r, at least 1; a rank of min(d, k) or more is the identity. Null where `rate` is set.
        rate: fraction of singular values left out, in [0, 1]: r = floor((1 - rate) min(d, k)), and
            at least 1 below rate 1. Null where `rank` is set.

    Raises:
        ValueError: a field is out of range, or not exactly one of rank and rate is set.

    >>> import torch
    >>> delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> hat = Twin(rank=1, rate=None)(delta, svd=lambda: torch.linalg.svd(delta))
    >>> hat.diagonal()
    tensor([3., 0., 0.])
    """

    rank: int | None
    rate: float | None
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "rank"
    choices: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    axes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.rate is None):
            raise ValueError(
                f"edit.rank={self.rank} edit.rate={self.rate}: set one and leave the other null"
            )
        if self.rank is not None:
            whole("rank", self.rank, 1)
        if self.rate is not None:
            within("rate", self.rate, "[0, 1]")

    def __call__(
        self, delta: Tensor, *, svd: Callable[[], tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        """Return the truncated delta."""
        if self._whole(delta):
            return delta.clone()
        rank = self.kept(delta)
        u, s, vh = svd()
        return ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(delta.shape)

    def encode(
        self,
        delta: Tensor,
        *,
        svd: Callable[[], tuple[Tensor, Tensor, Tensor]],
        post: Tensor | None = None,
    ) -> Code:
        """Return the factors U_r S_r and V_r'."""
        if self._whole(delta):
            return Raw.holding(delta, post)
        if (rank := self.kept(delta)) == 0:
            return Zero(tuple(delta.shape), {}, {})
        u, s, vh = svd()
        return LowRank.of_factors(tuple(delta.shape), u[:, :rank] * s[:rank], vh[:rank])

    def _whole(self, delta: Tensor) -> bool:
        """Whether a tensor stays as it is."""
        few = delta.ndim < 2 or delta.numel() == 0
        return few or self.kept(delta) == min(delta.shape[0], delta[0].numel())

    def kept(self, delta: Tensor) -> int:
        """Return how many singular values of a matrix are kept, of min(d, k)."""
        full = min(delta.shape[0], delta[0].numel())
        if self.rank is not None:
            return min(self.rank, full)
        assert self.rate is not None
        kept = int(round((1 - self.rate) * full, 9))
        return kept if self.rate == 1 else max(kept, 1)

    def with_share(self, share: int) -> "Twin":
        """Return the edit of a tensor that has a rank of its own."""
        return Twin(rank=share, rate=None)
