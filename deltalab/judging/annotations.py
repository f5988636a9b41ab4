"""Win rates of pairwise annotations: raw and length-controlled, with standard errors.

A preference is the probability in [0, 1] that the judge prefers the model's output to the
reference's; NaN where there is no verdict. The length-controlled win rate is that of Dubois et al.,
"Length-Controlled AlpacaEval" (arXiv 2404.04475): a logistic model of the preference with a term
for the length difference, which is then set to zero.
"""

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltalab.judging.difficulties import Array, Difficulty

FOLDS = 5
STRENGTHS = tuple(float(10.0 ** (-4 + 8 * i / 9)) for i in range(10))
"""Inverse penalties tried: ten, from 1e-4 to 1e4, evenly spaced in their logarithm."""
SEED = 123
"""Of the solver, whose last digits depend on the order in which it visits the coefficients."""
GROUPS = 50
"""Of judged instructions that the jackknife leaves out one by one."""
GAMED_WEIGHT = 0.1
"""What a row of a gamed baseline counts for; there are two baselines, of weight 0.2 together."""


def win_rate(preferences: Array) -> tuple[float, float]:
    """Return the mean preference and its standard error, std / sqrt(n), over what was judged.

    The error of fewer than two judgements is NaN, as is the mean of none.

    >>> win_rate(np.array([1.0, 0.0, 0.5, np.nan]))[0]
    0.5
    """
    judged = preferences[~np.isnan(preferences)]
    if len(judged) == 0:
        return math.nan, math.nan
    return float(judged.mean()), _error(judged)


def length_controlled(
    preferences: Array, lengths: Array, reference: Array, difficulty: Difficulty | None = None
) -> tuple[float, float, float]:
    """Return the length-controlled win rate, its standard error, and its spread's.

    With d the difference of lengths (reference minus model) over its standard deviation, g the
    difficulty, the preference is modelled as sigmoid(a tanh(d) + b g + c), fitted with an L1
    penalty chosen by five-fold cross-validation (equation 2 of the paper, whose model term is c and
    whose penalty towards the gamed baselines is their rows). The win rate is the mean over all
    instructions, judged or not, of sigmoid(b g + c). Without difficulties b g is left out.

    Two errors: the first is that of the estimate, by the jackknife over at most fifty groups of
    judged instructions with the weakest penalty, since a strong one pulls all towards a half; the
    second is the standard deviation of the predictions over sqrt(n) alone, which the leaderboard
    calls `lc_standard_error`, and which is zero where no difficulty is given.

    Args:
        preferences: (n,), NaN where there is no verdict.
        lengths: (n,) characters of the model's outputs.
        reference: (n,) characters of the reference's outputs.
        difficulty: of every instruction by position; None leaves the term out.

    Raises:
        ValueError: an instruction without a difficulty.
    """
    judged = ~np.isnan(preferences)
    if judged.sum() < 2:
        return math.nan, math.nan, math.nan
    rows = _features(np.asarray(reference - lengths, np.float64), difficulty)
    level = rows.copy()
    level[:, 0] = 0.0
    gamed = np.zeros((0, rows.shape[1] + 1)) if difficulty is None else difficulty.gamed
    weights = np.concatenate([np.full(len(gamed), GAMED_WEIGHT), np.ones(int(judged.sum()))])
    x = np.concatenate([gamed[:, :-1], rows[judged]])
    y = np.concatenate([gamed[:, -1], preferences[judged]])
    predicted = _sigmoid(level @ _fitted(x, y, weights, chosen_strength(x, y, weights)))

    def without(number: int) -> float:
        kept = ours != number
        beta = _fitted(x[kept], y[kept], weights[kept], STRENGTHS[-1])
        return float(_sigmoid(level[group != number] @ beta).mean())

    group = np.full(len(rows), -1)
    group[judged] = np.arange(int(judged.sum())) % GROUPS
    ours = np.concatenate([np.full(len(gamed), -1), group[judged]])
    count = int(group.max()) + 1
    error = math.sqrt((count - 1) * float(np.var([without(g) for g in range(count)])))
    return float(predicted.mean()), error, _error(predicted)


def chosen_strength(x: Array, y: Array, weights: Array) -> float:
    """Return the inverse penalty with the least cross-validated log loss."""
    from sklearn.model_selection import GroupKFold

    double, label, weight = _doubled(x, y, weights)
    group = np.tile(np.arange(len(y)), 2)
    losses = np.zeros(len(STRENGTHS))
    for train, test in GroupKFold(min(FOLDS, len(y))).split(double, label, group):
        held, draws = group[test], np.random.RandomState(SEED)  # one sequence for all strengths
        for index, strength in enumerate(STRENGTHS):
            beta = _penalised(double[train], label[train], weight[train], strength, draws)
            q = np.clip(_sigmoid(double[test] @ beta), 1e-15, 1 - 1e-15)
            loss = y[held] * np.log(q) + (1 - y[held]) * np.log(1 - q)
            losses[index] -= np.mean(loss * weights[held])
    best: float = STRENGTHS[int(losses.argmin())]
    return best


def _features(differences: Array, difficulty: Difficulty | None) -> Array:
    """Return rows (tanh of the standardised length difference[, difficulty], 1)."""
    deviation = differences.std(ddof=1)
    scaled = np.tanh(differences / deviation) if deviation > 0 else np.zeros(len(differences))
    ones = np.ones(len(differences))
    if difficulty is None:
        return np.stack([scaled, ones], 1)
    hard = np.array([difficulty.of[position] for position in range(len(differences))])
    return np.stack([scaled, hard, ones], 1)


def _doubled(x: Array, y: Array, weights: Array) -> tuple[Array, NDArray[np.int64], Array]:
    """Return a target between 0 and 1 as two rows, of label 1 with weight y and 0 with 1 - y."""
    labels = np.repeat(np.array([1, 0]), len(y))
    return np.concatenate([x, x]), labels, np.concatenate([y * weights, (1 - y) * weights])


def _fitted(x: Array, y: Array, weights: Array, strength: float) -> Array:
    return _penalised(*_doubled(x, y, weights), strength, np.random.RandomState(SEED))


def _penalised(
    x: Array,
    label: NDArray[np.int64],
    weight: Array,
    strength: float,
    draws: np.random.RandomState,
) -> Array:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    for value in (0, 1):  # a label without any weight would be unknown to the solver, and win half
        if not weight[label == value].any():
            weight = np.where(label == value, 1e-12, weight)
    penalty: dict[str, Any] = {"l1_ratio": 1.0}
    if LogisticRegression().penalty != "deprecated":  # before scikit-learn 1.8
        penalty = {"penalty": "l1"}
    model = LogisticRegression(
        **penalty, C=strength, solver="liblinear", fit_intercept=False, random_state=draws
    )
    with warnings.catch_warnings():  # where lengths decide nothing it may stop early: see the error
        warnings.simplefilter("ignore", ConvergenceWarning)
        coefficients: Array = model.fit(x, label, sample_weight=weight).coef_[0]
    return coefficients


def _sigmoid(x: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)), np.float64)


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
