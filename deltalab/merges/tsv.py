"""TSV-Merge (arXiv 2412.00081): the leading singular triplets of every expert, made orthogonal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.merges import Merge, mean, number


@dataclass(frozen=True)
class Tsv(Merge):
    """Put the experts' leading singular directions side by side, none in another's way.

    Of every matrix (out, rest) the floor(r/T) leading triplets of each expert, r being the smaller
    side and at least one, that are not zero to rounding: their U, S and V are put side by side, U
    and V replaced by the nearest orthogonal matrices, their polar factors, and D = weight U S V'.
    Tensors of one dimension are averaged. Experts whose spaces are orthogonal, and of rank at most
    r/T, are added up exactly.
    The polar factor is not unique where experts share a direction exactly.

    Args:
        weight: what the result for matrices is multiplied by, any number.

    Raises:
        ValueError: a field is out of range.

    >>> one, other = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    >>> Tsv(weight=1.0)([one, other]).abs()
    tensor([[2., 0.],
            [0., 3.]])
    """

    weight: float
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        number("weight", self.weight)

    def __call__(self, deltas: Sequence[Tensor]) -> Tensor:
        """Return the merged delta, computed in float64."""
        if deltas[0].ndim < 2 or not deltas[0].numel():
            return mean(deltas)
        matrices = [delta.flatten(1).double() for delta in deltas]
        rank = max(1, min(matrices[0].shape) // len(deltas))
        left, values, right = [], [], []
        for matrix in matrices:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            least = s[0] * max(matrix.shape) * torch.finfo(torch.float32).eps
            some = s[:rank] > least
            left.append(u[:, :rank][:, some])
            values.append(s[:rank][some])
            right.append(vh[:rank][some].T)
        found = (_polar(torch.cat(left, 1)) * torch.cat(values)) @ _polar(torch.cat(right, 1)).T
        return (self.weight * found).float().reshape(deltas[0].shape)


def _polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, or rows where it has more columns."""
    if not matrix.shape[1]:
        return matrix
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found: Tensor = u @ vh
    return found
