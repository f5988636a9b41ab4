"""Safe LoRA: project deltas onto the directions in which alignment moved (arXiv 2405.16833)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.edits import Edit, within


@dataclass(frozen=True)
class SafeLora(Edit):
    """D_hat = C D, C = V V' / ||V||_F, where D is far from it: cos(C D, D) <= threshold.

    W_pre is the aligned model, and V = W_pre - W_u of each matrix, read as (out, rest), with W_u an
    unaligned model of the same base (`peers`). Other tensors, and matrices that alignment did not
    move, stay as they are. C is no projection, but what the paper takes in its place: its size is
    that of V.

    Args:
        peer: which of `peers` is the unaligned model.
        threshold: the cosine up to which a matrix is projected, in [-1, 1].

    Raises:
        ValueError: the threshold is out of range.

    >>> import torch
    >>> edit = SafeLora("unaligned", threshold=0.9)
    >>> edit(torch.ones(2, 1), peers=lambda name: torch.tensor([[2.0], [0.0]]))
    tensor([[2.],
            [0.]])
    """

    peer: str
    threshold: float
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        within("threshold", self.threshold, "[-1, 1]")

    def __call__(self, delta: Tensor, *, peers: Callable[[str], Tensor]) -> Tensor:
        """Return the delta, projected where it is far from its projection."""
        if delta.ndim < 2 or not delta.numel():
            return delta.clone()
        matrix = delta.flatten(1).double()
        vector = peers(self.peer).flatten(1).double()
        size = vector.norm()
        if not float(size) > 0:
            return delta.clone()
        hat: Tensor = vector @ (vector.T @ matrix) / size
        cosine = (hat * matrix).sum() / (hat.norm() * matrix.norm()).clamp(min=1e-300)
        if float(cosine) > self.threshold:
            return delta.clone()
        projected: Tensor = hat.to(delta.dtype).reshape(delta.shape)
        return projected
