"""The one column-by-column solver: what was done to a column is made good by those that follow.

Whatever decides the columns of a matrix one after another (rounding them: GPTQ; dropping entries:
SparseGPT, IRR; choosing between two models: Safe Delta) leaves an error E in the layer's weights,
and its outputs E x. With the second moment H = E[x x'] of the inputs, the error of the columns that
are decided can be made good by those that are not: the best they can do is -E_S H_SU H_UU^-1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
"""Columns between two updates of all that follow."""


def columnwise(
    weight: Tensor,
    gram: Tensor,
    fix: Callable[[int, Tensor], Tensor],
    *,
    damp: float = 0.01,
    order: Tensor | None = None,
    block: int = BLOCK,
    factor: Tensor | None = None,
) -> Tensor:
    """Fix every column of a matrix in turn, each made good by those that come after it.

    With H = gram + damp mean(diag gram) I and U the upper Cholesky factor of its inverse, H^-1 =
    U'U: for each column j, w_j := fix(j, w_j), and w_k -= (error of j) / U_jj U_jk for all k after
    it. What comes out minimises ||(W - out) X||^2 + damp terms over all columns that `fix` leaves
    as they are, given those that it changed, as long as the changed come first in the order; where
    they do not, it lies between that and no compensation. A gram of c I compensates nothing: the
    result has the bits of `fix` alone. An input that is always zero takes no part.

    Args:
        weight: (d, k), floating-point.
        gram: (k, k), symmetric and positive semidefinite, such as X'X / n of the layer's inputs X.
        fix: takes a column's index and the column (d,) with what it has to make good, and returns
            what it becomes.
        damp: share of the gram's mean diagonal that is added to it, at least 0.
        order: the columns' indices in the order in which they are fixed; None: as they stand.
        block: columns between two updates of all that follow; changes no more than rounding.
        factor: `inverse_factor` of the gram in this order, where it is there already.

    Returns:
        (d, k), in weight's dtype, float32 at least.

    Raises:
        ValueError: shapes that do not fit, or a gram that cannot be inverted.

    >>> halves = torch.tensor([[0.4, 1.4]])
    >>> columnwise(halves, torch.eye(2), lambda j, column: column.round())
    tensor([[0., 1.]])
    >>> columnwise(halves, torch.ones(2, 2), lambda j, column: column.round(), damp=0.001)
    tensor([[0., 2.]])
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    columns = weight.shape[1] if weight.ndim == 2 else -1
    if tuple(gram.shape) != (columns, columns):
        raise ValueError(f"a gram of shape {tuple(gram.shape)} for a weight {tuple(weight.shape)}")
    places = torch.arange(columns) if order is None else order.cpu()
    if not torch.equal(places.sort().values, torch.arange(columns)):
        raise ValueError(f"the order must name each of the {columns} columns once")
    if factor is None:
        beside = places.to(gram.device)
        factor = inverse_factor(gram[beside][:, beside], damp)
    factor = factor.to(weight.device, exact)
    left = weight[:, places.to(weight.device)].to(exact, copy=True)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros(len(left), end - start, dtype=exact, device=left.device)
        for j in range(start, end):
            fixed = fix(int(places[j]), left[:, j].clone())
            errors[:, j - start] = (left[:, j] - fixed) / factor[j, j]
            left[:, j] = fixed
            left[:, j + 1 : end] -= torch.outer(errors[:, j - start], factor[j, j + 1 : end])
        left[:, end:] -= errors @ factor[start:end, end:]
    out = torch.empty_like(left)
    out[:, places.to(left.device)] = left
    return out


def inverse_factor(gram: Tensor, damp: float = 0.01) -> Tensor:
    """Return the upper Cholesky factor U of the damped gram's inverse, U'U = H^-1, in float64.

    U_jj^2 is the inverse's entry of column j once all columns before it are fixed: what the error
    of an entry counts for is its square divided by U_jj^2.

    Raises:
        ValueError: a negative damp, or a gram that cannot be inverted.

    >>> inverse_factor(torch.diag(torch.tensor([4.0, 1.0])), damp=0.0).diagonal().tolist()
    [0.5, 1.0]
    """
    if not damp >= 0:
        raise ValueError(f"damp={damp}: must be 0 or more")
    if not bool(gram.isfinite().all()):
        raise ValueError("a gram with NaN or infinite entries")
    wide = gram.double()
    diagonal = wide.diagonal().clone()
    dead = diagonal == 0
    added = damp * diagonal[~dead].mean() if bool((~dead).any()) else torch.zeros_like(diagonal[:1])
    wide = wide + torch.diag(torch.where(dead, 1.0, added))
    lower, problem = torch.linalg.cholesky_ex(wide)
    if int(problem):
        raise ValueError(
            f"a gram that cannot be inverted (column {int(problem) - 1}): fewer inputs than"
            f" columns, or inputs that depend on each other; damp={damp} must be larger"
        )
    inverse = torch.cholesky_inverse(lower)
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
