"""The Riemann approximation of a loss change, from gradients along the straight path of an edit.

    L(W_post + E) - L(W_post) = integral_0^1 <grad L(W_post + t E), E> dt
                             ~= sum_c w_c <grad L(W_post + t_c E), E>          (Eq. 1: left, C = 5)

Each gradient is reduced to <g, E> inside the backward pass, tensor by tensor, and freed at once:
above model and shift, a pass holds one tensor's gradient and a bounded chunk of products.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.objectives import Loss, evaluating
from deltalab.quadrature import Rule
from deltalab.weights import PARTS, Weights, part_of

CHUNK = 1 << 22
"""Entries of a tensor whose float64 products are alive at a time."""


@dataclass(frozen=True)
class Riemann:
    """Which rules to take a term by.

    Args:
        rule: the main rule's name; None for no term at all.
        points: the main rule's number of nodes.
        also: further rules on the same path, `{name: points}`; nodes are shared between rules.

    >>> [rule.name for rule in Riemann("gauss", 3, also={"left": 5}).rules]
    ['gauss', 'left']
    """

    rule: str | None
    points: int = 1
    also: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule in self.also:
            raise ValueError(f"riemann.also={dict(self.also)}: {self.rule} is the main rule")
        assert self.rules is not None  # validates every rule

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules, the main one first; empty where the term is off."""
        if self.rule is None:
            return ()
        return (Rule(self.rule, self.points), *(Rule(n, c) for n, c in self.also.items()))


@dataclass(frozen=True)
class Term:
    """A Riemann approximation of the loss change.

    Attributes:
        rule: the quadrature rule's name.
        points: its number of nodes.
        value: the approximation, in the objective's unit.
        nodes: t in [0, 1] along post + t * shift.
        inner: <grad L(post + t * shift), shift> at every node; their trend is the curvature.
        by_tensor: the value's share of every tensor; their sum is `value`.
        gradient_evaluations: passes over all batches made for this term. A node that an earlier
            rule of the same call, or a gradient passed in, provided, is not counted again.
    """

    rule: str
    points: int
    value: float
    nodes: tuple[float, ...]
    inner: tuple[float, ...]
    by_tensor: dict[str, float]
    gradient_evaluations: int

    @cached_property
    def by_part(self) -> dict[str, float]:
        """The value's share of every part of the model (`deltalab.weights.PARTS`)."""
        parts = dict.fromkeys(PARTS, 0.0)
        for name, value in self.by_tensor.items():
            parts[part_of(name)] += value
        return parts

    def as_record(self) -> dict[str, Any]:
        """Return the term as the record holds it, in plain JSON values."""
        return {
            "rule": self.rule,
            "points": self.points,
            "value": self.value,
            "nodes": list(self.nodes),
            "inner": list(self.inner),
            "by_part": self.by_part,
            "by_tensor": self.by_tensor,
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
    with probing(module, touched, post):
        for rule in rules:
            made = 0
            for node in rule.nodes:
                if node in seen:
                    continue
                if node == 0 and first is not None:
                    seen[node] = {n: inner(first[n], shift[n]).item() for n in touched}
                elif touched:
                    move(touched, post, shift, node)
                    seen[node] = slopes(module, touched, shift, loss)
                    made += 1
                else:
                    seen[node] = {}
                _check_finite(seen[node], node)
            found[rule.name] = _integrated(rule, [seen[node] for node in rule.nodes], made)
    return found


def _integrated(rule: Rule, values: Sequence[dict[str, float]], evaluations: int) -> Term:
    by_tensor = {
        name: math.fsum(w * v[name] for w, v in zip(rule.weights, values, strict=True))
        for name in values[0]
    }
    return Term(
        rule=rule.name,
        points=rule.points,
        value=math.fsum(by_tensor.values()),
        nodes=rule.nodes,
        inner=tuple(math.fsum(v.values()) for v in values),
        by_tensor=by_tensor,
        gradient_evaluations=evaluations,
    )


def _check_finite(values: Mapping[str, float], node: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"the gradient of {name!r} is not finite at t={node:.4g} of the path")


def targets(module: nn.Module, shift: Weights) -> dict[str, nn.Parameter]:
    """Return the parameters that a shift moves, by the shift's names, tied ones once.

    A tensor whose shift is zero throughout is left out: it costs nothing.

    Raises:
        ValueError: a name that is no parameter, or of another shape; buffers (running statistics)
            have no gradient that a term could use.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name in shift:
        if name not in parameters:
            raise ValueError(f"the edit shifts {name!r}, which is no parameter of the model")
        parameter, value = parameters[name], shift[name]
        if parameter.shape != value.shape:
            raise ValueError(
                f"tensor {name!r}: shape {tuple(value.shape)} of the shift,"
                f" {tuple(parameter.shape)} in the model"
            )
        if id(parameter) not in seen and bool(value.any()):
            seen.add(id(parameter))
            found[name] = parameter
    return found


def move(touched: Mapping[str, nn.Parameter], post: Weights, shift: Weights, node: float) -> None:
    """Write post + node * shift into the parameters, from the stored copies, rounded once."""
    with torch.no_grad():
        for name, parameter in touched.items():
            start = post[name].to(parameter.device)
            if node == 0:
                parameter.copy_(start)
                continue
            step = shift[name].to(parameter.device)
            exact = _exact(parameter.dtype)
            parameter.copy_(torch.add(start.to(exact), step.to(exact), alpha=node))


@contextmanager
def probing(
    module: nn.Module, touched: Mapping[str, nn.Parameter], post: Weights
) -> Iterator[None]:
    """Let gradients flow to the touched parameters only, in eval mode; put everything back.

    On leaving, also by an exception, the touched parameters hold `post` again, and every
    parameter's `requires_grad` and `grad` are what they were.
    """
    wanted = {id(parameter) for parameter in touched.values()}
    states = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    try:
        with evaluating(module), torch.enable_grad():
            for parameter, _, _ in states:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
            yield
    finally:
        for parameter, required, grad in states:
            parameter.requires_grad_(required)
            parameter.grad = grad
        move(touched, post, {}, 0.0)


def slopes(
    module: nn.Module, touched: Mapping[str, nn.Parameter], shift: Weights, loss: Loss
) -> dict[str, float]:
    """Return <grad, shift> of every touched tensor at the module's present weights.

    One gradient evaluation: a forward and a backward pass over every batch.
    """
    total = {
        name: torch.zeros((), dtype=_accumulator(p.device), device=p.device)
        for name, p in touched.items()
    }

    def reduce(name: str, grad: Tensor, share: float) -> None:
        total[name] += inner(grad, shift[name]) * share

    weight = backward(module, touched, loss, reduce)
    return {name: value.item() / weight for name, value in total.items()}


def backward(
    module: nn.Module,
    wanted: Mapping[str, nn.Parameter],
    loss: Loss,
    consume: Callable[[str, Tensor, float], None],
) -> float:
    """Pass over all batches, handing every gradient to `consume` as soon as it exists.

    Args:
        module: the module, within `probing`.
        wanted: the parameters whose gradients are wanted, each once.
        loss: the opened objective.
        consume: takes a name, the gradient of a batch's mean loss, and the batch's weight; the
            gradient is freed when it returns.

    Returns:
        The weight of all batches.
    """
    share = weight = 0.0

    def hand_over(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        consume(name, parameter.grad, share)
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(hand_over, name))  # type: ignore[no-untyped-call]
        for name, parameter in wanted.items()
    ]
    try:
        for batch in loss.batches:
            losses, counts = loss(module, batch)
            share = float(counts.sum())
            if share > 0:
                weight += share
                (losses.sum() / share).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    if weight == 0:
        raise ValueError("the objective's examples have no weight: nothing in them is predicted")
    return weight


def gradient(
    module: nn.Module, loss: Loss, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return the mean loss's gradient at the module's present weights: one gradient evaluation.

    Micro-batches are summed in float32 (float64 for a float64 module), also for a bf16 module.

    Args:
        module: the live module, left as it was.
        loss: the opened objective.
        names: of the parameters wanted; all when None.

    Returns:
        Name -> gradient, on the module's device; the names of tied parameters share one tensor.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    asked = {name: parameters[name] for name in (parameters if names is None else names)}
    first_name = {id(parameter): name for name, parameter in reversed(asked.items())}
    wanted = {name: asked[name] for name in first_name.values()}
    sums = {
        name: torch.zeros_like(p, dtype=_exact(p.dtype), requires_grad=False)
        for name, p in wanted.items()
    }

    def add(name: str, grad: Tensor, share: float) -> None:
        sums[name].add_(grad, alpha=share)

    with probing(module, wanted, {name: p.detach() for name, p in wanted.items()}):
        weight = backward(module, wanted, loss, add)
    for value in sums.values():
        value /= weight
    return {name: sums[first_name[id(parameter)]] for name, parameter in asked.items()}


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> as a scalar tensor, multiplied and summed in float64 a chunk at a time.

    >>> inner(torch.tensor([1e8, 1.0, -1e8]), torch.ones(3)).item()
    1.0
    """
    dtype = _accumulator(a.device)
    left, right = a.reshape(-1), b.reshape(-1)
    total = torch.zeros((), dtype=dtype, device=a.device)
    for start in range(0, left.numel(), CHUNK):
        piece = right[start : start + CHUNK].to(a.device)
        total += torch.dot(left[start : start + CHUNK].to(dtype), piece.to(dtype))
    return total


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _accumulator(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
