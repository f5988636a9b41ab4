"""Means with honest errors: over examples, over random draws, and over both at once.

A random edit is one draw of many, measured on one sample of examples. The error of its mean change
counts both. Where so few draws were made that their own spread is poorly known, `factor` is what
takes the place of "two standard errors".

Needs no torch: reports read it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean
from typing import Any

TAIL = NormalDist().cdf(-2.0)
"""The one-sided tail beyond two standard errors, 2.3 %."""


@dataclass(frozen=True)
class Mean:
    """An estimate, its standard error, and the degrees of freedom that the error rests on."""

    value: float
    error: float
    freedom: float = math.inf

    def above(self, bound: float = 0.0) -> float:
        """Return how likely a mean so far above `bound` is, or farther, were `bound` the truth.

        >>> round(Mean(2.0, 1.0).above(), 4), Mean(1.0, 0.0).above(), Mean(0.0, 0.0).above()
        (0.0228, 0.0, 0.5)
        """
        distance = self.value - bound
        if distance == 0 or math.isnan(distance) or not math.isfinite(self.error):
            return 0.5
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return tail(distance / self.error, self.freedom)

    def below(self, bound: float = 0.0) -> float:
        """Return the same for a mean so far below `bound`."""
        return Mean(-self.value, self.error, self.freedom).above(-bound)

    def __sub__(self, other: "Mean") -> "Mean":
        """Return the difference of two means, their errors taken as independent."""
        variances = [self.error**2, other.error**2]
        error, freedom = _joined(variances, [self.freedom, other.freedom])
        return Mean(self.value - other.value, error, freedom)

    def __mul__(self, factor: float) -> "Mean":
        """Return a multiple."""
        return Mean(factor * self.value, abs(factor) * self.error, self.freedom)


def tail(distance: float, freedom: float = math.inf) -> float:
    """Return the probability that Student's t of so many degrees of freedom exceeds a distance.

    >>> round(tail(2.0), 4), round(tail(2.0, 2), 4), tail(0.0, 3)
    (0.0228, 0.0918, 0.5)
    """
    if math.isinf(freedom):
        return NormalDist().cdf(-distance)
    half = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + distance**2))
    return half if distance >= 0 else 1 - half


@lru_cache(maxsize=4096)
def factor(freedom: float = math.inf) -> float:
    """Return how many standard errors cover as much as two of a normal do.

    >>> factor(), round(factor(2), 2), round(factor(30), 2)
    (2.0, 4.53, 2.09)
    """
    if math.isinf(freedom):
        return 2.0
    low, high = 2.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > TAIL else (low, middle)
    return (low + high) / 2


def over_draws(changes: Sequence[float], errors: Sequence[float]) -> Mean:
    """Return the mean over draws whose single examples are not known: an upper bound of its error.

    error^2 = s^2(changes) / draws + mean of errors^2. The second part is the variance of the mean
    over examples were the examples' effects the same in every draw. As far as they differ between
    draws they average out, and are counted in the first part too: `two_way` knows.

    Args:
        changes: one for each draw.
        errors: their standard errors over the examples, which all draws share.

    >>> over_draws([1.0, 1.0], [0.5, 0.5]), over_draws([1.0, 3.0], [0.0, 0.0])
    (Mean(value=1.0, error=0.5, freedom=inf), Mean(value=2.0, error=1.0, freedom=1.0))
    """
    draws = len(changes)
    examples = fmean(e**2 for e in errors)
    if draws == 1:
        return Mean(changes[0], math.sqrt(examples))
    error, freedom = _joined([variance(changes) / draws, examples], [draws - 1, math.inf])
    return Mean(fmean(changes), error, freedom)


def variance(values: Sequence[float]) -> float:
    """Return the variance of a sample, s^2 = sum (x - mean)^2 / (n - 1), 0 of a single value.

    The standard library's own computes with fractions, at ten times the cost.

    >>> variance([1.0, 3.0]), variance([0.5])
    (2.0, 0.0)
    """
    middle = fmean(values)
    return math.fsum((v - middle) ** 2 for v in values) / max(1, len(values) - 1)


def two_way(values: Any) -> Mean:
    """Return the mean over draws and examples with the error that both make.

    Of y_de = mean + draw_d + example_e + rest_de, with s_D^2 and s_E^2 the variances of the draws'
    and of the examples' means and s_R^2 that of the rest,
    error^2 = s_D^2 / D + s_E^2 / E - s_R^2 / (D E), unbiased, and never taken below its first or
    second part alone.

    Args:
        values: (draws, examples); examples that are NaN in any draw are left out.

    Raises:
        ValueError: no example is left.

    >>> two_way([[1.0, 3.0], [1.0, 3.0]])  # the draws agree: two examples
    Mean(value=2.0, error=1.0, freedom=1.0)
    >>> two_way([[1.0, 1.0], [3.0, 3.0]])  # the examples agree: two draws
    Mean(value=2.0, error=1.0, freedom=1.0)
    """
    import numpy as np

    y = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if math.isnan(y.sum()):
        y = y[:, ~np.isnan(y).any(0)]
    draws, examples = y.shape
    if not examples:
        raise ValueError("no example was measured in every draw")
    each = y[0] if draws == 1 else y.sum(0) / draws
    middle = float(each.sum()) / examples
    if examples == 1:
        return Mean(middle, math.inf)
    of_examples = each - middle
    second = float(of_examples @ of_examples) / (examples - 1) / examples
    if draws == 1:
        return Mean(middle, math.sqrt(second), float(examples - 1))
    of_draws = y.sum(1) / examples - middle
    first = float(of_draws @ of_draws) / (draws - 1) / draws
    rest = y - middle - of_examples - of_draws[:, None]
    third = float(np.vdot(rest, rest)) / ((draws - 1) * (examples - 1)) / (draws * examples)
    both = max(first + second - third, first, second)
    if both == first > 0:
        return Mean(middle, math.sqrt(both), float(draws - 1))
    _, freedom = _joined([first, second], [draws - 1, examples - 1])
    return Mean(middle, math.sqrt(both), freedom)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Return Holm's adjusted probabilities: those below a level are shown together at that level.

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    adjusted, most = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(order) - rank) * probabilities[index]))
        adjusted[index] = most
    return adjusted


def _joined(variances: Sequence[float], freedoms: Sequence[float]) -> tuple[float, float]:
    """Return the error of a sum and its degrees of freedom, 1/f = sum of shares / freedoms.

    Welch and Satterthwaite square the shares. Of very few draws that is too kind: where their
    spread comes out small by chance, so does its share, and the interval is narrow twice. With the
    shares as they are, a mean over three draws goes beyond "two errors" in 2.9 % of all cases at
    the worst instead of 4.2 % (it should in 2.3 %).
    """
    total = math.fsum(variances)
    if total == 0 or not math.isfinite(total):
        return math.sqrt(total), math.inf
    inverse = math.fsum(v / total / f for v, f in zip(variances, freedoms, strict=True))
    return math.sqrt(total), 1 / inverse if inverse else math.inf


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d, c = 1 / (1 + step * d), 1 + step / c
            total *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * total
