"""The Riemann approximation of a loss change, from gradients along the straight path of an edit.

    L(W_post + E) - L(W_post) = integral_0^1 <grad L(W_post + t E), E> dt
                             ~= sum_c w_c <grad L(W_post + t_c E), E>          (Eq. 1: left, C = 5)

Gradients never exist as a whole: `deltalab.loss.passes` reduces each to <g, E> within its pass, so
that above model and shift one tensor's gradient is held.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from deltalab.loss.objectives import Loss
from deltalab.loss.passes import checkpointing, inner, move, probing, slope, slopes, targets
from deltalab.loss.passes import gradient as gradient
from deltalab.loss.quadrature import Rule
from deltalab.weights.mapping import PARTS, Weights, part_of

ENGINES = ("reverse", "forward")
SPOILT = 0.1
"""The share of a path's length by which rounding may move it."""


@dataclass(frozen=True)
class Riemann:
    """Which rules to take a term by, and how.

    Args:
        rule: the main rule's name; `adaptive` for nodes chosen along the edit's line
            (`deltalab.loss.lines`); None for no term at all.
        points: the main rule's number of nodes; `adaptive` chooses its own.
        also: further rules on the same path, `{name: points}`, or None; rules share nodes.
        engine: `reverse`, split by tensor; or `forward`, total only, for half the memory.
        checkpoint: recompute activations in the backward pass (`reverse`), for long sequences.
        dtype: `float32` takes terms and predictions of a model in 16 bits with all its tensors
            widened, so that no node is rounded; None in the dtype that it is evaluated in.

    Raises:
        ValueError: an unknown dtype, rule or engine, or numbers of nodes that a rule does not have.

    >>> [rule.name for rule in Riemann("gauss", 3, also={"left": 5}).rules]
    ['gauss', 'left']
    >>> Riemann("adaptive", also={"midpoint": 1}).starts_at_post
    True
    """

    rule: str | None
    points: int = 1
    also: Mapping[str, int] | None = None
    engine: str = "reverse"
    checkpoint: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32"):
            raise ValueError(f"riemann.dtype={self.dtype}: must be float32 or null")
        if self.engine not in ENGINES:
            raise ValueError(f"riemann.engine={self.engine}: must be one of {', '.join(ENGINES)}")
        if self.rule in (self.also or {}):
            raise ValueError(f"riemann.also={self.also}: {self.rule} is the main rule")
        if self.adaptive and self.engine == "forward":
            raise ValueError("riemann.engine=forward: the adaptive rule needs engine reverse")
        assert self.rules is not None  # validates every rule

    @property
    def adaptive(self) -> bool:
        """Whether the main term is that of `deltalab.loss.lines`."""
        return self.rule == "adaptive"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules of fixed nodes, the main one first; empty where the term is off."""
        if self.rule is None:
            return ()
        main = () if self.adaptive else (Rule(self.rule, self.points),)
        return main + tuple(Rule(n, c) for n, c in (self.also or {}).items())

    @property
    def starts_at_post(self) -> bool:
        """Whether the gradient at W_post, which all edits of a pair share, is of use."""
        return self.adaptive or any(0.0 in rule.nodes for rule in self.rules)


def layer_of(name: str) -> str:
    """Return the number of the layer that a tensor belongs to, or its part outside all layers.

    >>> layer_of("blocks.11.attn.qkv.weight"), layer_of("model.layers.3.mlp.up_proj.weight")
    ('11', '3')
    >>> layer_of("patch_embed.proj.weight")
    'embedding'
    """
    found = re.search(r"(?:^|\.)(?:\w*blocks|\w*layers?|h)\.(\d+)\.", name)
    return found[1] if found else part_of(name)


@dataclass(frozen=True)
class Term:
    """A Riemann approximation of the loss change.

    Attributes:
        rule: the quadrature rule's name.
        points: its number of nodes.
        value: the approximation, in the objective's unit.
        nodes: t in [0, 1] along post + t * shift.
        inner: <grad L(post + t * shift), shift> at every node; their trend is the curvature.
        by_tensor: the value's share of every tensor, summing to `value`; empty in forward mode.
        gradient_evaluations: passes over all batches made for this term. A node that an earlier
            rule of the same call, or a gradient passed in, provided, is not counted again.
        rounding: of a path in 16 bits, how far rounding moves its middle, relative to how far that
            is from W_post; None where nothing is rounded.
    """

    rule: str
    points: int
    value: float
    nodes: tuple[float, ...]
    inner: tuple[float, ...]
    by_tensor: dict[str, float]
    gradient_evaluations: int
    error: float | None = None
    converged: bool | None = None
    rounding: float | None = None

    @property
    def spoiled(self) -> bool:
        """Whether rounding moves the path by more than `SPOILT`: then more nodes do not help."""
        return self.rounding is not None and self.rounding > SPOILT

    @cached_property
    def by_part(self) -> dict[str, float]:
        """The value's share of every part of the model (`deltalab.weights.mapping.PARTS`)."""
        parts = dict.fromkeys(PARTS, 0.0)
        for name, value in self.by_tensor.items():
            parts[part_of(name)] += value
        return parts

    @cached_property
    def by_layer(self) -> dict[str, float]:
        """The value's share of every numbered layer, then of what lies outside, by part."""
        layers: dict[str, float] = {}
        for name, value in self.by_tensor.items():
            layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + value
        numbered = sorted((k for k in layers if k.isdigit()), key=int)
        return {k: layers[k] for k in numbered + [k for k in layers if not k.isdigit()]}

    def as_record(self) -> dict[str, Any]:
        """Return the term as the record holds it, in plain JSON values."""
        rounded = {"rounding": self.rounding, "spoiled": self.spoiled}
        return {
            **({} if self.rounding is None else rounded),
            "rule": self.rule,
            "points": self.points,
            "value": self.value,
            "nodes": list(self.nodes),
            "inner": list(self.inner),
            "by_part": self.by_part,
            "by_layer": self.by_layer,
            "by_tensor": self.by_tensor,
            "error": self.error,
            "converged": self.converged,
            "gradient_evaluations": self.gradient_evaluations,
        }


def term(
    module: nn.Module,
    post: Weights,
    shift: Weights,
    loss: Loss,
    rule: Rule,
    first: Weights | None = None,
) -> Term:
    """Return one rule's term; see `terms`."""
    return terms(module, post, shift, loss, [rule], first)[rule.name]


def terms(
    module: nn.Module,
    post: Weights,
    shift: Weights,
    loss: Loss,
    rules: Sequence[Rule],
    first: Weights | None = None,
    engine: str = "reverse",
    checkpoint: bool = False,
) -> dict[str, Term]:
    """Return the terms of several rules from one walk along the path.

    Args:
        module: the live module; holds `post` before and after, whatever happens in between.
        post: the post-trained weights.
        shift: W_edit - W_post as stored, of the tensors that the edit touches. Read once a node
            and micro-batch, so hold it in memory.
        loss: the opened objective.
        rules: rules of different names; nodes that several share are evaluated once.
        first: the gradient at W_post (`gradient`), where it is known already.
        engine: `reverse` or `forward`, as for `Riemann`.
        checkpoint: recompute activations, as for `Riemann`.

    Returns:
        Rule name -> term, in the order of `rules`.

    Raises:
        ValueError: a shift for something that is no parameter, a gradient that is not finite, or
            two rules of one name.
    """
    if len({rule.name for rule in rules}) != len(rules):
        raise ValueError(f"each rule once: {[rule.name for rule in rules]}")
    touched = targets(module, shift)
    if first is not None and not all(name in first for name in touched):
        first = None
    seen: dict[float, dict[str, float]] = {}
    found = {}
    guard = checkpointing(module) if checkpoint else nullcontext()
    with guard, probing(module, touched, post):
        for rule in rules:
            made = 0
            for node in rule.nodes:
                if node in seen:
                    continue
                if node == 0 and first is not None:
                    seen[node] = {n: inner(first[n], shift[n]).item() for n in touched}
                elif touched:
                    move(touched, post, shift, node)
                    seen[node] = slopes_by(engine, module, touched, shift, loss)
                    made += 1
                else:
                    seen[node] = {}
                check_finite(seen[node], node)
            found[rule.name] = _integrated(rule, [seen[node] for node in rule.nodes], made, engine)
    return found


TOTAL = "total"
"""The one name under which the forward engine, which knows no tensors, gives its slope."""


def slopes_by(engine: str, module: nn.Module, *args: Any) -> dict[str, float]:
    """Return the slopes by tensor, or the forward engine's under `TOTAL`."""
    return slopes(module, *args) if engine == "reverse" else {TOTAL: slope(module, *args)}


def _integrated(
    rule: Rule, values: Sequence[dict[str, float]], evaluations: int, engine: str
) -> Term:
    totals = [math.fsum(v.values()) for v in values]
    value = math.fsum(w * v for w, v in zip(rule.weights, totals, strict=True))
    by_tensor = {
        name: math.fsum(w * v.get(name, 0.0) for w, v in zip(rule.weights, values, strict=True))
        for name in (values[0] if engine == "reverse" else ())
    }
    error = None
    if rule.companion is not None:
        other = math.fsum(w * v for w, v in zip(rule.companion, totals, strict=True))
        error = abs(value - other)
    return Term(
        rule=rule.name,
        points=rule.points,
        value=value,
        nodes=rule.nodes,
        inner=tuple(totals),
        by_tensor=by_tensor,
        gradient_evaluations=evaluations,
        error=error,
    )


def check_finite(values: Mapping[str, float], node: float) -> None:
    """Raise `ValueError` where a slope is not a finite number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"the gradient of {name!r} is not finite at t={node:.4g} of the path")
