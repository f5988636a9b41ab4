"""The singular value decomposition of a delta, by way of its Gram matrix in float64."""

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]


def svd(matrix: Tensor) -> Factors:
    """Return the reduced singular value decomposition of a float32 matrix.

    With n = min(d, k): the eigenvectors U of the smaller Gram matrix D D' (or D' D) in float64,
    then S V' = U' D. A truncation U_r U_r' D is a projection of D itself, so that it does not
    suffer from the squared condition number of the Gram matrix: a singular value below 1e-8 of the
    largest is lost in a direction, never in the product.

    Args:
        matrix: (d, k).

    Returns:
        U (d, n), S (n,) descending and Vh (n, k), float32.

    >>> u, s, vh = svd(torch.diag(torch.tensor([1.0, 3.0])))
    >>> s, (u * s) @ vh
    (tensor([3., 1.]), tensor([[1., 0.],
            [0., 3.]]))
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = svd(matrix.T)
        return vh.T.contiguous(), s, u.T.contiguous()
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    u = vectors.flip(1)
    projected = u.T @ wide
    s = projected.norm(dim=1)
    vh = projected / torch.where(s > 0, s, 1.0)[:, None]
    return u.float(), s.float(), vh.float()
