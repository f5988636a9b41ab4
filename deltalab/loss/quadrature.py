"""Quadrature rules on [0, 1], the parameter of the path from W_post to W_edit.

Everything interpolatory is computed in the Legendre basis, whose Vandermonde matrix stays well
conditioned for the few dozen nodes that a term can afford.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

RULES = ("left", "midpoint", "trapezoid", "simpson", "gauss", "radau")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """A quadrature rule: `sum_c weights[c] f(nodes[c])` approximates the integral of f over [0, 1].

    | name | nodes | exact for polynomials up to degree |
    |---|---|---|
    | `left` | c/C; with C = 5 the paper's Eq. 1 | 0 |
    | `midpoint` | (c + 1/2)/C | 1 |
    | `trapezoid` | c/(C-1) | 1 |
    | `simpson` | c/(C-1), C odd | 3 |
    | `gauss` | Gauss-Legendre, inside (0, 1) | 2C - 1 |
    | `radau` | Gauss-Radau with t = 0, whose gradient every edit of a pair shares | 2C - 2 |

    Args:
        name: one of `RULES`.
        points: the number of nodes C.

    Raises:
        ValueError: an unknown name, or a number of nodes that the rule does not have.

    >>> Rule("left", 5).nodes
    (0.0, 0.2, 0.4, 0.6, 0.8)
    >>> rule = Rule("radau", 2)                     # exact for a parabola: the integral of t^2
    >>> round(sum(w * t**2 for t, w in zip(rule.nodes, rule.weights)), 12)
    0.333333333333
    """

    name: str
    points: int

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"riemann.rule={self.name}: must be one of {', '.join(RULES)}")
        least = {"trapezoid": 2, "simpson": 3}.get(self.name, 1)
        if self.points < least or (self.name == "simpson" and self.points % 2 == 0):
            valid = "an odd number from 3 on" if self.name == "simpson" else f"at least {least}"
            raise ValueError(f"riemann.points={self.points}: rule {self.name} takes {valid}")

    @property
    def nodes(self) -> tuple[float, ...]:
        """The nodes t in [0, 1], ascending, of the path post + t * shift."""
        return _rule(self.name, self.points)[0]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights, in the order of the nodes; their sum is 1."""
        return _rule(self.name, self.points)[1]

    @property
    def companion(self) -> tuple[float, ...] | None:
        """Weights of another rule on the same nodes, whose difference estimates the error.

        For the composite rules all nodes' interpolating polynomial, which is far more accurate;
        for a rule that is that already, the polynomial without the node of least weight, so that
        the estimate is pessimistic. None for a single node.
        """
        return _companion(self.name, self.points)


@lru_cache(maxsize=64)
def _rule(name: str, points: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count = np.arange(points)
    if name == "left":
        nodes, weights = count / points, np.full(points, 1 / points)
    elif name == "midpoint":
        nodes, weights = (count + 0.5) / points, np.full(points, 1 / points)
    elif name == "trapezoid":
        nodes, weights = count / (points - 1), np.full(points, 1 / (points - 1))
        weights[[0, -1]] /= 2
    elif name == "simpson":
        nodes, weights = count / (points - 1), np.where(count % 2 == 1, 4.0, 2.0)
        weights[[0, -1]] = 1.0
        weights /= 3 * (points - 1)
    elif name == "gauss":
        roots, weights = legendre.leggauss(points)
        nodes, weights = (roots + 1) / 2, weights / 2
    else:
        nodes = _radau_nodes(points)
        weights = integral_weights(nodes, 0.0, 1.0)
    return tuple(nodes.tolist()), tuple(weights.tolist())


@lru_cache(maxsize=64)
def _companion(name: str, points: int) -> tuple[float, ...] | None:
    if points < 2:
        return None
    nodes, weights = (np.asarray(values) for values in _rule(name, points))
    best = integral_weights(nodes, 0.0, 1.0)
    if np.abs(best - weights).max() > 1e-9:
        return tuple(best.tolist())
    least = int(np.argmin(weights))
    others = np.delete(nodes, least)
    return tuple(np.insert(integral_weights(others, 0.0, 1.0), least, 0.0).tolist())


def leja(low: float, high: float, count: int) -> tuple[float, ...]:
    """Return nested interpolation nodes on an interval around 0, starting with 0.

    Each node is where the product of distances to the nodes before it is largest (Leja's
    sequence), so that any beginning of the sequence interpolates stably, and adding a node keeps
    all the earlier evaluations.

    Args:
        low: lower end, at most 0.
        high: upper end, at least 0 and above `low`.
        count: how many nodes.

    >>> leja(0.0, 1.0, 3)
    (0.0, 1.0, 0.5)
    """
    grid = np.linspace(low, high, 4001)
    nodes = [0.0]
    with np.errstate(divide="ignore"):
        distance = np.log(np.abs(grid))
        for _ in range(count - 1):
            nodes.append(float(grid[int(np.argmax(distance.round(9)))]))
            distance += np.log(np.abs(grid - nodes[-1]))
    return tuple(nodes)


def _radau_nodes(points: int) -> Array:
    """Return the left Gauss-Radau nodes: zeros of P_{n-1} + P_n, of which x = -1 is one."""
    series = np.zeros(points + 1)
    series[-2:] = 1.0
    roots = np.sort(legendre.legroots(series).real)
    for _ in range(2):  # Newton, since the companion matrix loses a few digits
        roots -= legendre.legval(roots, series) / legendre.legval(roots, legendre.legder(series))
    roots[0] = -1.0
    return np.asarray((roots + 1) / 2, dtype=np.float64)


def integral_weights(nodes: Sequence[float] | Array, low: float, high: float) -> Array:
    """Return the weights that integrate the interpolating polynomial from `low` to `high`.

    Solves `sum_c w_c P_j(x_c) = integral of P_j` for j = 0 ... C-1, with the interval that holds
    nodes and limits mapped to [-1, 1].

    Args:
        nodes: distinct abscissae, in any order.
        low: lower limit of the integral; may lie outside the nodes.
        high: upper limit; below `low` the sign turns as usual.

    Returns:
        One weight a node, their sum `high - low`.

    >>> integral_weights([0.0, 0.5, 1.0], 0.0, 1.0).round(6).tolist()    # Simpson
    [0.166667, 0.666667, 0.166667]
    """
    points = np.asarray(nodes, dtype=np.float64)
    left, right = min(points.min(), low, high), max(points.max(), low, high)
    scale = 2 / (right - left) if right > left else 1.0

    def mapped(x: Array) -> Array:
        return np.asarray((x - left) * scale - 1, dtype=np.float64)

    vandermonde = legendre.legvander(mapped(points), len(points) - 1).T
    limits = mapped(np.asarray([low, high], dtype=np.float64))
    moments = np.empty(len(points))
    for degree in range(len(points)):
        series = np.zeros(degree + 1)
        series[degree] = 1.0
        ends = legendre.legval(limits, legendre.legint(series))
        moments[degree] = (ends[1] - ends[0]) / scale
    return np.asarray(np.linalg.solve(vandermonde, moments), dtype=np.float64)


def local_weights(nodes: Sequence[float], low: float, high: float) -> Array:
    """Return the weights that integrate the local interpolant, safe for nodes at any distances.

    Args:
        nodes: distinct abscissae, ascending, covering the limits.
        low: lower limit of the integral.
        high: upper limit; below `low` the sign turns as usual.

    Returns:
        One weight a node.

    >>> local_weights([0.0, 0.5, 1.0], 0.0, 1.0).round(6).tolist()    # Simpson
    [0.166667, 0.666667, 0.166667]
    """
    x = np.asarray(nodes, dtype=np.float64)
    left, right = min(low, high), max(low, high)
    edges = np.unique([left, *x[(x > left) & (x < right)], right])
    roots, weights = legendre.leggauss(2)  # the interpolant is a cubic between nodes
    half = np.diff(edges)[:, None] / 2
    at = (edges[:-1, None] + half + half * roots).ravel()
    total = (half * weights).ravel() @ interpolation(x, at)
    return np.asarray(total if high >= low else -total, dtype=np.float64)


def interpolation(nodes: Sequence[float] | Array, at: Array) -> Array:
    """Return the matrix (len(at), len(nodes)) from values at nodes to those of an interpolant.

    Between two nodes the interpolant goes over linearly from the parabola through them and the node
    before to the one through them and the node after (Overhauser): smooth, exact for parabolas, and
    local, so that neither uneven nodes nor a rough stretch make it swing elsewhere. Slopes of a
    loss along a line are rough, being means over few hundred examples that flip one by one.

    Args:
        nodes: distinct abscissae, ascending; two or more.
        at: abscissae from the first node to the last.
    """
    x = np.asarray(nodes, dtype=np.float64)
    last = len(x) - 1
    matrix = np.zeros((len(at), len(x)))
    for row, t in zip(matrix, at, strict=True):
        i = int(np.clip(np.searchsorted(x, t, side="right") - 1, 0, last - 1))
        share = (t - x[i]) / (x[i + 1] - x[i])
        for first, part in ((i - 1, 1 - share), (i, share)):
            block = np.arange(max(0, min(first, last - 2)), min(last, max(first, 0) + 2) + 1)
            for k in block:
                others = x[block[block != k]]
                row[k] += part * np.prod((t - others) / (x[k] - others))
    return matrix
