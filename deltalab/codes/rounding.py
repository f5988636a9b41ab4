"""Rounding to few bits on a grid that is symmetric about zero, one step a column.

With b bits the levels are (q - 2^(b-1) + 1/2) * step, q = 0 .. 2^b - 1: half a step off zero, so
that one bit is a sign. "max" lets the outermost level be the largest magnitude; with one bit, whose
two levels would both be far too large, it is the mean magnitude. "best" tries smaller steps too,
and gives the levels the factor of least squares: the error is that of the best of all tried.
"""

import torch
from torch import Tensor

SHRINKS = tuple(round(0.2 + 0.04 * i, 2) for i in range(21))
"""Shares of the largest magnitude that "best" tries as the outermost level."""
HOW = ("best", "max")
"""How a step is found."""


def steps(columns: Tensor, bits: Tensor, how: str) -> Tensor:
    """Return the step of every column.

    Args:
        columns: (n, r).
        bits: (r,), integers from 1 to 8.
        how: one of `HOW`.

    Returns:
        (r,), at least 0; 0 for a column of zeros.

    >>> steps(torch.tensor([[3.0, 3.0], [-1.0, -1.0]]), torch.tensor([1, 2]), "max")
    tensor([4., 2.])
    """
    magnitude = columns.abs()
    if not len(columns):
        return columns.new_zeros(columns.shape[1])
    widest = 2 * magnitude.amax(0) / (2.0 ** bits.to(columns.dtype) - 1)
    found = torch.where(bits == 1, 2 * magnitude.mean(0), widest)
    if how == "max":
        return found
    least = _error(columns, bits, found)
    for shrink in SHRINKS:
        step = shrink * widest
        near = levels(rounded(columns, bits, step), bits).to(columns.dtype)
        norm = (near * near).sum(0)
        fitted = (columns * near).sum(0) / norm
        error = _error(columns, bits, fitted)
        found = torch.where(error < least, fitted, found)
        least = torch.minimum(error, least)
    return found


def rounded(columns: Tensor, bits: Tensor, step: Tensor) -> Tensor:
    """Return the integer q of the nearest level of every entry, as int32.

    Args:
        columns: (n, r), or one column (n,).
        bits: (r,), or (); from 1 to 8.
        step: likewise.

    >>> rounded(torch.tensor([-9.0, -0.1, 0.0, 1.2]), torch.tensor(2), torch.tensor(1.0))
    tensor([0, 1, 2, 3], dtype=torch.int32)
    """
    half = 2.0 ** (bits.to(columns.dtype) - 1)
    near = (columns / torch.where(step > 0, step, 1.0)).floor()
    return (torch.minimum(torch.maximum(near, -half), half - 1) + half).to(torch.int32)


def levels(integers: Tensor, bits: Tensor) -> Tensor:
    """Return the levels of integers in units of a step, float32.

    >>> levels(torch.tensor([0, 1, 2, 3]), torch.tensor(2))
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """
    return integers.to(torch.float32) - (2.0 ** (bits.to(torch.float32) - 1) - 0.5)


def _error(columns: Tensor, bits: Tensor, step: Tensor) -> Tensor:
    """Return the squared error of every column, rounded with a step."""
    near = levels(rounded(columns, bits, step), bits).to(columns.dtype) * step
    return (columns - near).square().sum(0)
