"""Terms of edits whose shifts lie on one line through W_post, from shared slopes along it.

DARE with fixed p and seed shifts by (k-1)(M-p)/(1-p) D: all k lie on one line. So does ExPO's
alpha D. An edit says so itself (`Edit.line`). The slope <grad L(W(s)), dW/ds> is evaluated at few
s, and the change to any point of the line is its integral. Which s, is decided once for the whole
line, by cutting the interval where the error estimate stands worst against what is wanted: a
point's value does not depend on which points came before it.

Any other edit has its straight path from W_post, and Radau's rule on it, whose first node all edits
of a pair share. So have BitDelta's multiples: they too lie on a line, but it passes W_post by, and
the way over it (to multiple 1, then along) cost 16 evaluations for eight points and missed by 9 and
28 % where its two parts nearly cancel; two nodes on the path of each cost as much and do not.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from deltalab.artifacts import Store
from deltalab.edits import Line
from deltalab.loss.objectives import Loss
from deltalab.loss.passes import checkpointing, inner, move, probing, slopes, targets
from deltalab.loss.quadrature import Rule, interpolation, local_weights
from deltalab.loss.riemann import Riemann, Term, check_finite, terms
from deltalab.store.digests import key_of
from deltalab.weights.mapping import Weights

Slopes = dict[float, dict[str, float]]
"""Coordinate on the line -> <grad L, dW/ds> by tensor."""

RELATIVE, ABSOLUTE = 0.01, 2e-4
"""The error wanted of a change: this part of it, or this much in the objective's unit."""

PESSIMISM = 4.0
"""By how much Radau's rule overestimates its error, at least."""

NODES = (3, 6, 12)
"""Of Radau's rules that are taken in turn, the last where two are compared alone."""

CARRY = 0.25
"""How much of the surprise at an interval's middle is expected to remain in either half."""


@dataclass(frozen=True)
class Lines:
    """The lines of one pair under one objective, as far as they have been evaluated.

    Args:
        store: keeps the evaluations on disk, for other processes and later sweeps.
    """

    store: Store
    _known: dict[str, Slopes] = field(default_factory=dict, init=False)

    def term(
        self,
        module: nn.Module,
        post: Weights,
        shift: Weights,
        loss: Loss,
        line: Line,
        selection: Mapping[str, Any],
        first: Weights | None = None,
    ) -> Term:
        """Return the term of the edit at `line.at`, making only the evaluations that are missing.

        Args:
            module: the live module, holding `post`.
            post: the post-trained weights.
            shift: W_edit - W_post of this edit.
            loss: the opened objective.
            line: where the edit lies.
            selection: what else determines the shift, ready for JSON: select, seed, dtype.
            first: the gradient at W_post, where it is known.

        Raises:
            ValueError: as for `riemann.terms`.
        """
        key = {"line": line.family, **selection}
        known = self._load(key)
        found = along(module, post, shift, loss, line, known, first)
        if found.gradient_evaluations:
            held = {"slopes": {repr(s): values for s, values in known.items()}}
            self.store.keep_numbers("line", key, held)
        return found

    def _load(self, key: Mapping[str, Any]) -> Slopes:
        """Return the slopes known along a line, from this process or from disk."""
        name = key_of(key)
        if name not in self._known:
            held = self.store.numbers("line", key) or {"slopes": {}}
            self._known[name] = {float(s): values for s, values in held["slopes"].items()}
        return self._known[name]


def approximate(
    settings: Riemann,
    lines: Lines,
    module: nn.Module,
    post: Weights,
    shift: Weights,
    loss: Loss,
    line: Line | None,
    selection: Mapping[str, Any],
    first: Weights | None = None,
    compared: bool = False,
) -> dict[str, Term]:
    """Return every term that the settings ask for, by rule, the main one first.

    Args:
        settings: the rules.
        lines: what is known of the pair's lines.
        module: the live module, holding `post` before and after.
        post: the post-trained weights.
        shift: W_edit - W_post, in memory.
        loss: the opened objective.
        line: the line that the edit shares with others, if it does.
        selection: what else determines the shift, ready for JSON: select, seed.
        first: the gradient at W_post, where it is known.
        compared: as for `alone`.
    """
    found = {}
    if settings.adaptive:
        with checkpointing(module) if settings.checkpoint else nullcontext():
            if line is None:
                found["adaptive"] = alone(module, post, shift, loss, first, compared)
            else:
                found["adaptive"] = lines.term(module, post, shift, loss, line, selection, first)
    return found | terms(
        module, post, shift, loss, settings.rules, first, settings.engine, settings.checkpoint
    )


def alone(
    module: nn.Module,
    post: Weights,
    shift: Weights,
    loss: Loss,
    first: Weights | None = None,
    compared: bool = False,
) -> Term:
    """Return the term of an edit on its own path: Radau's rule, with more nodes where it asks.

    The estimate of Radau's rule, the difference to two of its three nodes, is larger than its error
    by 4 to 20 times as measured over edits, so `PESSIMISM` times what is wanted is let pass. On the
    long way from an expert to merged weights it was a fifth of the error: there rules of twice the
    nodes are made until two agree, and their difference is the error.

    Args:
        module: the live module, holding `post` before and after.
        post: the post-trained weights.
        shift: W_edit - W_post.
        loss: the opened objective.
        first: the gradient at W_post, where it is known.
        compared: whether rules are compared.
    """
    made, before = 0, math.inf
    for points in NODES if compared else NODES[:2]:
        found = terms(module, post, shift, loss, [Rule("radau", points)], first)["radau"]
        made += found.gradient_evaluations
        error = abs(found.value - before) if compared else (found.error or 0.0) / PESSIMISM
        before = found.value
        if error <= wanted(found.value):
            break
    return replace(
        found,
        rule="adaptive",
        gradient_evaluations=made,
        error=error,
        converged=error <= wanted(found.value),
    )


def along(
    module: nn.Module,
    post: Weights,
    shift: Weights,
    loss: Loss,
    line: Line,
    known: Slopes,
    first: Weights | None = None,
) -> Term:
    """Return the term of the way from the line's coordinate 0 to `line.at`.

    Args:
        module: the live module, holding `post` before and after.
        post: the post-trained weights.
        shift: W_edit - W_post of the edit.
        loss: the opened objective.
        line: where the edit lies.
        known: slopes by coordinate; what is evaluated here is added.
        first: the gradient at W_post, where it is known; it serves coordinate 0.
    """
    nothing = Term("adaptive", 0, 0.0, (), (), {}, 0, error=0.0, converged=True)
    if line.at == 0:
        return nothing
    touched = targets(module, shift)
    if not touched:
        return nothing
    made = 0

    def evaluate(s: float) -> float:
        nonlocal made
        if s not in known and s == 0 and first is not None:
            known[s] = {n: inner(first[n], shift[n]).item() / line.at for n in touched}
        elif s not in known:
            move(touched, post, shift, s / line.at)
            found = slopes(module, touched, shift, loss)
            known[s] = {name: value / line.at for name, value in found.items()}
            made += 1
        check_finite(known[s], s)
        return math.fsum(known[s].values())

    with probing(module, touched, post):
        chosen = choose(evaluate, line.low, line.high, line.most)
    nodes, weights = chosen.nodes, chosen.weights(line.at)
    by_tensor = {
        name: math.fsum(w * known[s].get(name, 0.0) for s, w in zip(nodes, weights, strict=True))
        for name in touched
    }
    error = chosen.error(line.at)
    value = math.fsum(by_tensor.values())
    return Term(
        rule="adaptive",
        points=len(nodes),
        value=value,
        nodes=tuple(s / line.at for s in nodes),
        inner=tuple(math.fsum(known[s].values()) * line.at for s in nodes),
        by_tensor=by_tensor,
        gradient_evaluations=made,
        error=error,
        converged=error <= wanted(value),
    )


def wanted(value: float) -> float:
    """Return the error that a change of this size may have."""
    return max(ABSOLUTE, RELATIVE * abs(value))


@dataclass(frozen=True)
class Chosen:
    """Where a line was evaluated, and the error expected of every interval's integral."""

    nodes: tuple[float, ...]
    errors: dict[tuple[float, float], float]

    def weights(self, at: float) -> list[float]:
        """Return the nodes' weights in the integral from 0 to `at`."""
        found: list[float] = local_weights(self.nodes, 0.0, at).tolist()
        return found

    def error(self, at: float) -> float:
        """Return the error expected of the integral from 0 to `at`, intervals as independent."""
        low, high = min(0.0, at), max(0.0, at)
        overlaps = (
            (error, max(0.0, min(high, right) - max(low, left)) / (right - left))
            for (left, right), error in self.errors.items()
        )
        return math.hypot(*(error * part for error, part in overlaps if part > 0))


def choose(evaluate: Callable[[float], float], low: float, high: float, most: int) -> Chosen:
    """Choose nodes on [low, high], evaluating the slope, until every integral from 0 is settled.

    Starting from 0 and the ends, the interval whose expected error is largest against what is
    `wanted` of the integral up to its far end is cut in two. What the interpolant misses at the new
    node, times a part's width and `CARRY`, is the error then expected of that part. The cut is half
    way in the square root of the coordinate: changes grow like its square, and so does the error
    that they may have. One surprise that happens to be small settles nothing: three evaluations
    beside the one at 0 are the least.

    Args:
        evaluate: the slope at a coordinate.
        low: lower end, at most 0.
        high: upper end, at least 0.
        most: the most evaluations beside the one at 0.
    """
    values = {s: evaluate(s) for s in sorted({low, 0.0, high})}
    ends = [(low, 0.0)] * (low < 0) + [(0.0, high)] * (high > 0)
    errors = dict.fromkeys(ends, math.inf)
    while True:
        nodes = tuple(sorted(values))
        chosen = Chosen(nodes, errors)
        heights = np.asarray([values[s] for s in nodes])
        allowed = {
            (left, right): wanted(float(local_weights(nodes, 0.0, far) @ heights))
            for left, right in errors
            for far in (right if left >= 0 else left,)
        }
        settled = all(
            chosen.error(right if left >= 0 else left) <= tolerance
            for (left, right), tolerance in allowed.items()
        )
        if (settled and len(values) >= 4) or len(values) - 1 >= most:
            return chosen
        left, right = max(errors, key=lambda at: (errors[at] / allowed[at], at[1] - at[0]))
        middle = math.copysign(((abs(left) ** 0.5 + abs(right) ** 0.5) / 2) ** 2, left + right)
        expected = float((interpolation(nodes, np.asarray([middle])) @ heights)[0])
        values[middle] = evaluate(middle)
        missed = CARRY * abs(values[middle] - expected)
        errors = {k: v for k, v in errors.items() if k != (left, right)}
        errors |= {part: missed * (part[1] - part[0]) for part in ((left, middle), (middle, right))}
