"""Terms of edits whose shifts lie on one line, from shared evaluations of the slope along it.

DARE with fixed p and seed shifts by (k-1)(M-p)/(1-p) D: all k lie on one line through W_post. So do
ExPO's alpha D, and all multiples of BitDelta's mean lie on a line through the edit with multiple 1.
Any other edit has the line from W_post to itself. The slope <grad L(W(s)), dW/ds> is evaluated at
few s, and the change to any point of the line is its integral. Which s, is decided once for the
whole line, by halving the interval where the error estimate stands worst against what is wanted:
a point's value does not depend on which points came before it.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from deltalab.artifacts import Store
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.expo import Expo
from deltalab.objectives import Loss
from deltalab.passes import checkpointing, inner, move, probing, slopes, targets
from deltalab.quadrature import interpolation, local_weights
from deltalab.records import key_of
from deltalab.riemann import Riemann, Term, check_finite, terms
from deltalab.weights import LazyWeights, Weights

Slopes = dict[float, dict[str, float]]
"""Coordinate on the line -> <grad L, dW/ds> by tensor."""

RELATIVE, ABSOLUTE = 0.01, 2e-4
"""The error wanted of a change: this part of it, or this much in the objective's unit."""

CARRY = 0.25
"""How much of the surprise at an interval's middle is expected to remain in either half."""


@dataclass(frozen=True)
class Line:
    """A family of edits, W(s) = W(0) + s * direction, and one edit's place in it.

    Attributes:
        family: names the line among all lines of a pair, an objective, a selection and a seed.
        at: the coordinate s of the edit.
        low: least coordinate of the family, at most 0.
        high: greatest coordinate of the family, at least 0.
        most: how many evaluations the line may cost, beside the gradient at W_post.
        anchor: the edit at s = 0; None where that is W_post.
    """

    family: str
    at: float
    low: float
    high: float
    most: int
    anchor: Any = None


def line_of(edit: Any) -> Line:
    """Return the line that an edit lies on: its family's, or its own from W_post.

    >>> line_of(Dare(p=0.5, k=-1.0)).at, line_of(Expo(alpha=0.3)).at
    (2.0, 0.3)
    """
    match edit:
        case Dare(p=p, k=k) if -1 <= k <= 1:
            return Line(f"dare p={p!r}", 1.0 - k, 0.0, 2.0, most=10)
        case Dare(p=p, k=k) if 1 < k <= 3:
            return Line(f"dare p={p!r} beyond", 1.0 - k, -2.0, 0.0, most=10)
        case Expo(alpha=alpha) if 0 < alpha <= 1:
            return Line("expo outwards", float(alpha), 0.0, 1.0, most=6)
        case Expo(alpha=alpha) if -1 <= alpha <= 0:
            return Line("expo inwards", float(alpha), -1.0, 0.0, most=5)
        case BitDelta(multiple=multiple) if 0.5 <= multiple <= 3 and multiple != 1:
            anchor = replace(edit, multiple=1.0)
            settings = {k: v for k, v in asdict(edit).items() if k != "multiple"}
            return Line(f"bitdelta {settings}", multiple - 1.0, -0.5, 2.0, 10, anchor)
        case _:
            return own_line(edit)


def own_line(edit: Any) -> Line:
    """Return the line from W_post to an edit, which is at 1.

    Also for an edit of a family, where weights are stored in 16 bits: rounding then moves every
    point off the common line by as much as a small delta.
    """
    return Line(repr(edit), 1.0, 0.0, 1.0, most=8)


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
        anchor: Weights | None = None,
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
            anchor: the shift of `line.anchor`, where that is not None.

        Raises:
            ValueError: as for `riemann.terms`.
        """
        base = None
        if line.anchor is not None:
            assert anchor is not None
            own = line_of(line.anchor)
            base = self.term(module, post, anchor, loss, own, selection, first)
        key = {"line": line.family, **selection}
        known = self._load(key)
        found = along(module, post, shift, loss, line, known, first, anchor)
        if found.gradient_evaluations:
            held = {"slopes": {repr(s): values for s, values in known.items()}}
            self.store.keep_numbers("line", key, held)
        return found if base is None else _after(base, found)

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
    line: Line,
    selection: Mapping[str, Any],
    first: Weights | None = None,
    anchor: Weights | None = None,
) -> dict[str, Term]:
    """Return every term that the settings ask for, by rule, the main one first.

    Args:
        settings: the rules.
        lines: what is known of the pair's lines.
        module: the live module, holding `post` before and after.
        post: the post-trained weights.
        shift: W_edit - W_post, in memory.
        loss: the opened objective.
        line: the line that the edit lies on.
        selection: what else determines the shift, ready for JSON: select, seed.
        first: the gradient at W_post, where it is known.
        anchor: the shift of the line's anchor, where it has one.
    """
    found = {}
    if settings.adaptive:
        with checkpointing(module) if settings.checkpoint else nullcontext():
            found["adaptive"] = lines.term(
                module, post, shift, loss, line, selection, first, anchor
            )
    return found | terms(
        module, post, shift, loss, settings.rules, first, settings.engine, settings.checkpoint
    )


def along(
    module: nn.Module,
    post: Weights,
    shift: Weights,
    loss: Loss,
    line: Line,
    known: Slopes,
    first: Weights | None = None,
    anchor: Weights | None = None,
) -> Term:
    """Return the term of the way from the line's coordinate 0 to `line.at`.

    Args:
        module: the live module, holding `post` before and after.
        post: the post-trained weights.
        shift: W_edit - W_post of the edit.
        loss: the opened objective.
        line: where the edit lies.
        known: slopes by coordinate; what is evaluated here is added.
        first: the gradient at W_post, where it is known; serves coordinate 0 of a line through it.
        anchor: the shift at coordinate 0, where that is not W_post.
    """
    nothing = Term("adaptive", 0, 0.0, (), (), {}, 0, error=0.0, converged=True)
    if line.at == 0:
        return nothing
    start, step = post, shift
    if anchor is not None:
        start = LazyWeights(shift, lambda n: post[n].float() + anchor[n].to(post[n].device).float())
        step = {n: shift[n] - anchor[n] for n in shift}
        first = None
    touched = targets(module, step)
    if not touched:
        return nothing
    made = 0

    def evaluate(s: float) -> float:
        nonlocal made
        if s not in known and s == 0 and first is not None:
            known[s] = {n: inner(first[n], step[n]).item() / line.at for n in touched}
        elif s not in known:
            move(touched, start, step, s / line.at)
            found = slopes(module, touched, step, loss)
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
    `wanted` of the integral up to its far end is halved. What the interpolant misses at the new
    node, times the half's width and `CARRY`, is the error then expected of either half.

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
        if settled or len(values) - 1 >= most:
            return chosen
        left, right = max(errors, key=lambda interval: errors[interval] / allowed[interval])
        middle = (left + right) / 2
        expected = float((interpolation(nodes, np.asarray([middle])) @ heights)[0])
        values[middle] = evaluate(middle)
        error = CARRY * abs(values[middle] - expected) * (right - left) / 2
        errors = {k: v for k, v in errors.items() if k != (left, right)}
        errors |= {(left, middle): error, (middle, right): error}


def _after(base: Term, found: Term) -> Term:
    """Return the term of the way over the anchor: to the anchor first, then along the line."""
    names = dict.fromkeys([*base.by_tensor, *found.by_tensor])
    error = math.hypot(base.error or 0.0, found.error or 0.0)
    value = base.value + found.value
    return replace(
        found,
        value=value,
        by_tensor={n: base.by_tensor.get(n, 0.0) + found.by_tensor.get(n, 0.0) for n in names},
        gradient_evaluations=base.gradient_evaluations + found.gradient_evaluations,
        error=error,
        converged=error <= wanted(value),
    )
