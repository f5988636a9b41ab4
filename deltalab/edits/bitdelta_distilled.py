"""BitDelta with distilled scales, its second step (arXiv 2402.10193)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.raw import Raw
from deltalab.codes.signs import Signs
from deltalab.edits import Edit, whole, within


@dataclass(frozen=True)
class BitDeltaDistilled(Edit):
    """Keep the signs and one learned scale a matrix.

    D_hat = alpha sign(D), sign(0) = +1, with the scales of all matrices learned together so that
    the model's outputs match those of W_post on the objective's inputs; no labels are used. They
    start from mean |D|, BitDelta's own, and end there where learning gained nothing. Tensors of
    fewer than two dimensions are returned as they are. Half A of the objective's examples is
    learned from; the edit is judged on half B (`deltalab.data.splits`).

    Args:
        steps: gradient steps, each on some of the objective's examples; 0 is BitDelta.
        lr: first step size relative to each scale, above 0; it falls to 0 along a cosine.

    Raises:
        ValueError: a field is out of range.

    >>> edit = BitDeltaDistilled(steps=10, lr=0.01)
    >>> edit(torch.tensor([[1.0, -3.0]]), scale=lambda steps, lr: torch.tensor(1.5))
    tensor([[ 1.5000, -1.5000]])
    """

    steps: int
    lr: float
    version: ClassVar[int] = 2  # learned on half A of the objective, without padding
    axes: ClassVar[bool] = False
    whole_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole("steps", self.steps, 0)
        within("lr", self.lr, "(0, inf)")

    def __call__(self, delta: Tensor, *, scale: Callable[[int, float], Tensor | None]) -> Tensor:
        """Return the signs times the learned scale."""
        if delta.ndim < 2 or (alpha := scale(self.steps, self.lr)) is None:
            return delta.clone()
        return torch.where(delta < 0, -alpha, alpha)

    def encode(
        self,
        delta: Tensor,
        *,
        scale: Callable[[int, float], Tensor | None],
        post: Tensor | None = None,
    ) -> Code:
        """Return signs and the learned scale."""
        if delta.ndim < 2 or (alpha := scale(self.steps, self.lr)) is None:
            return Raw.holding(delta, post)
        return Signs.of_delta(delta, alpha, "tensor")
