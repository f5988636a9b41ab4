"""Singular vectors rounded to few bits: what the edits that quantise factors of a delta share."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from deltalab.codes import Setting
from deltalab.codes.factors import FLOATS, Factors, masks
from deltalab.codes.rounding import levels, rounded, steps
from deltalab.linear.columnwise import columnwise
from deltalab.linear.factor import Factors as Svd
from deltalab.statistics.knapsack import Array, knapsack

REFERENCE = 4096
"""The rank at which the counts of components of arXiv 2406.08903 are given."""


def paper_widths(shape: tuple[int, int], total: float) -> Tensor:
    """Return the bits of every component by the fixed plan of 8, 3 and 2 bits (arXiv 2406.08903).

    Of a matrix of rank 4096 two components have 8 bits and 32 have 3, of another rank as many in
    proportion and at least one; 2 bits each for those that follow, as many as the total allows.

    Args:
        shape: (d, k).
        total: bits of all entries of U and V, for each entry of the matrix.

    Returns:
        (min(d, k),) int64, 0 for components that are left out.

    >>> widths = paper_widths((4096, 4096), 1.0)
    >>> [int((widths == bits).sum()) for bits in (8, 3, 2)]
    [2, 32, 968]
    """
    rank, units = min(shape), int(total * shape[0] * shape[1] / sum(shape))
    widths = torch.zeros(rank, dtype=torch.int64)
    at = 0
    for bits, count in ((8, 2), (3, 32), (2, REFERENCE)):
        wanted = max(1, round(count * rank / REFERENCE))
        many = min(wanted, units // bits, rank - at)
        widths[at : at + many] = bits
        at, units = at + many, units - many * bits
    return widths


def quantised(
    shape: tuple[int, ...],
    factors: Svd,
    widths: Tensor,
    how: str,
    gram: Tensor | None = None,
    target: Tensor | None = None,
    drop: Tensor | None = None,
    rescale: Tensor | None = None,
    settings: Mapping[str, Setting] | None = None,
) -> Factors:
    """Return the code of a delta's singular components, each with its own bits.

    V is rounded first, then U. With a gram H = X'X / n both are rounded column by column, each made
    good by those that follow (GPTQ): V' as a layer of inputs X, largest input first, U as one of
    inputs S V_hat' X. Entries that are left out keep what they are made to make good out of it.

    Args:
        shape: of the delta.
        factors: its singular value decomposition.
        widths: (n,), bits of every component; 0 leaves it out.
        how: how steps are found (`rounding.HOW`).
        gram: (k, k), or None for rounding to the nearest level.
        target: the delta (d, k), to have U be that of least squares for the rounded V:
            U = D H Y' (Y H Y')^-1, Y = S V_hat', H = I without a gram (arXiv 2506.11087). None to
            have it be the singular vectors.
        drop: (n,), shares of the entries of each component that are left out, for `Factors`.
        rescale: (n,), what components are multiplied by to make up for that.
        settings: of the code; with `drop` those from which the masks are found again.
    """
    u, s, vh = factors
    chosen = (widths > 0).to(s.device)
    u, s, v = u[:, chosen], s[chosen], vh[chosen].T
    bits = widths.to(s.device)[chosen]
    scale = s if rescale is None else s * rescale.to(s.device)[chosen]
    keep_u = keep_v = None
    if drop is not None:
        drop = drop.to(s.device)[chosen]
        keep_u, keep_v = masks((u, v), drop, settings or {})
    v, v_step = _side(v, bits, how, gram, keep_v, rows=True)
    y = s[:, None] * (v if keep_v is None else v * keep_v).T
    inner = None if gram is None else (y.double() @ gram.double() @ y.double().T).float()
    if target is not None:
        u = left_factor(target, y, gram)
    u, u_step = _side(u, bits, how, inner, keep_u, rows=False)
    return Factors.of_columns(shape, (u, v), (u_step, v_step), scale, bits, drop, settings)


def left_factor(delta: Tensor, y: Tensor, gram: Tensor | None) -> Tensor:
    """Return U = D H Y' (Y H Y')^-1, which makes ||(D - U Y) X|| least; H = I without a gram.

    Args:
        delta: D (d, k).
        y: Y (r, k).
        gram: H (k, k), or None.
    """
    d, right = delta.double(), y.double()
    weighted = right if gram is None else right @ gram.double()
    inverse = torch.linalg.pinv(weighted @ right.T, hermitian=True)
    left: Tensor = (d @ weighted.T @ inverse).float()
    return left


def _side(
    columns: Tensor, bits: Tensor, how: str, gram: Tensor | None, keep: Tensor | None, rows: bool
) -> tuple[Tensor, Tensor]:
    """Return one side's columns rounded, and their steps.

    Args:
        columns: (n, r).
        bits: (r,).
        how: how steps are found.
        gram: of the rows (n, n) or of the columns (r, r), as `rows` says; None: to the nearest.
        keep: (n, r), where entries are kept; None: everywhere.
        rows: whether it is rounded row by row.
    """
    few = torch.where(bits <= 8, bits, 8)
    step = steps(columns if keep is None else columns * keep, few, how)
    step = torch.where(bits <= 8, step, 1.0)

    def near(values: Tensor, width: Tensor, by: Tensor) -> Tensor:
        grid = torch.where(width <= 8, width, 8)
        found = levels(rounded(values, grid, by), grid) * by
        for wide, dtype in FLOATS.items():
            found = torch.where(width == wide, values.to(dtype).float(), found)
        return found

    if gram is None:
        return near(columns, bits, step), step
    if rows:

        def fix(index: int, column: Tensor) -> Tensor:
            new = near(column, bits, step)
            return new if keep is None else torch.where(keep[index], new, column)

        order = gram.diagonal().argsort(descending=True, stable=True)
        start = columns if keep is None else columns * keep
        return columnwise(start.T.contiguous(), gram, fix, order=order).T, step

    def fix_column(index: int, column: Tensor) -> Tensor:
        new = near(column, bits[index], step[index])
        return new if keep is None else torch.where(keep[:, index], new, column)

    start = columns if keep is None else columns * keep
    return columnwise(start, gram, fix_column), step


def allocated(
    shape: tuple[int, int],
    factors: Svd,
    total: float,
    how: str,
    gram: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """Return the bits of every component for which the expected error is least within a total.

    With u_i and v_i rounded to u_i + du_i and v_i + dv_i, component i adds to ||(D_hat - D) X||^2

        s_i^2 (dv_i' H dv_i + |du_i|^2 v_hat_i' H v_hat_i),   s_i^2 v_i' H v_i at no bits,

    the first term of which is exact (arXiv 2506.11087); the components' errors are taken to be
    orthogonal. The 0/1 program over all components and widths is solved exactly.

    Args:
        shape: (d, k).
        factors: the singular value decomposition.
        total: bits of all entries of U and V, for each entry of the matrix.
        how: how steps are found.
        gram: H (k, k); None for the identity.
        most: how many different widths there may be beside 0; None: as many as there are.

    Returns:
        (min(d, k),) int64.
    """
    widths = [*range(9)]
    losses = component_losses(factors, widths, how, gram)
    budget = int(total * shape[0] * shape[1] / sum(shape))
    best, least = np.zeros(len(losses), dtype=np.int64), float("inf")
    for bound, own in _bounded(losses, budget, min(most or 8, 8)):
        if bound >= least:
            break  # nor can any that follows be better
        costs = np.broadcast_to(own, (len(losses), len(own)))
        found = knapsack(costs, losses[:, own], budget)
        loss = float(np.take_along_axis(losses[:, own], found[:, None], 1).sum())
        if loss < least:
            best, least = own[found], loss
    return torch.from_numpy(best)


def _bounded(losses: Array, budget: int, most: int) -> list[tuple[float, Array]]:
    """Return every choice of widths, 0 among them, with a bound from below of what it loses.

    For any price of a bit, sum_i min_b (loss_ib + price b) - price * budget is one (Lagrange).

    Args:
        losses: (r, 9), of every width from 0 to 8.
        budget: bits that all components together may have.
        most: how many widths beside 0.
    """
    first = float(losses[:, 0].max(initial=0)) or 1.0
    prices = first * np.geomspace(1e-9, 1.0, 40)
    priced = losses[:, :, None] + np.arange(9)[:, None] * prices
    found = []
    for few in combinations(range(1, 9), most):
        own = np.array([0, *few])
        bound = float((priced[:, own].min(1).sum(0) - prices * budget).max())
        found.append((bound, own))
    return sorted(found, key=lambda each: each[0])


def component_losses(factors: Svd, widths: list[int], how: str, gram: Tensor | None) -> Array:
    """Return what every component adds to the squared error at every width, as `allocated` says.

    Returns:
        (r, widths), float64.
    """
    u, s, v = factors[0], factors[1].double(), factors[2].T
    wide = None if gram is None else gram.double()

    def weighted(columns: Tensor) -> Tensor:
        if wide is None:
            return columns.double().square().sum(0)
        return (columns.double() * (wide @ columns.double())).sum(0)

    found = []
    for width in widths:
        if not width:
            found.append(s.square() * weighted(v))
            continue
        bits = torch.full((len(s),), width, device=s.device)
        (near_u, _), (near_v, _) = (_side(x, bits, how, None, None, rows=False) for x in (u, v))
        error = (near_u - u).double().square().sum(0)
        found.append(s.square() * (weighted(near_v - v) + error * weighted(near_v)))
    return torch.stack(found, 1).cpu().numpy()
