"""What each candidate is expected to take and to cost, from a sample of tensors and two curves.

With D = W_post - W_pre and E = F(D) - D, what an edit does to the delta is taken apart into a
shrinking along D and a scatter beside it,

    E = -a D + R,   a = -<E, D> / |D|^2,   r = |R|^2 / |D|^2 = |E|^2 / |D|^2 - a^2,

and the loss change is predicted as f(a) + g(r): f is the change along the straight line
W_post - a D, g that of noise r^(1/2) s * D with random signs s, both measured at a few places on
half A of the objective's examples, once for a pair. All candidates share the curves; of each only
a, r and its bits are needed, which are taken of one tensor for each part of the model, so that no
candidate costs a pass over examples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltalab.apply import editing
from deltalab.apply.audit import Audit
from deltalab.artifacts import Store
from deltalab.linear.delta import difference
from deltalab.loss.objectives import measure
from deltalab.rng import Rng
from deltalab.run.opening import Reference
from deltalab.run.point import Point, calibration, opening, provide, reference
from deltalab.terminal import console
from deltalab.weights.mapping import Weights, loaded, meta, part_of

SHRINKS = (0.1, 0.2, 0.4, 0.7, 1.0)
SCATTERS = (1.0, 16.0)
PASSES = (len(SHRINKS) + len(SCATTERS)) / 2
"""Passes over all examples that the curves take; each is over half of them."""
VERSION = 1
"""To be raised when the same pair and edit come to be predicted otherwise."""


@dataclass(frozen=True)
class Curves:
    """Loss changes on half A: along the delta, by scatter, and of the whole pair.

    Attributes:
        shrink: at `SHRINKS`.
        scatter: at `SCATTERS`.
        gap: loss of pre less that of post.
        entries: how many are edited.
        rest: bytes of the tensors that are not edited and differ, as a file holds them.
    """

    shrink: tuple[float, ...]
    scatter: tuple[float, ...]
    gap: float
    entries: int
    rest: int

    def change(self, shrink: float, scatter: float) -> float:
        """Return the predicted loss change; beyond what was measured the curves go on straight.

        >>> Curves((1.0, 2.0, 4.0, 7.0, 10.0), (1.0, 16.0), 1.0, 1, 0).change(0.3, 2.5)
        5.5
        """
        return _at(abs(shrink), SHRINKS, self.shrink) * (1 if shrink >= 0 else -1) + _at(
            scatter, SCATTERS, self.scatter
        )


@dataclass(frozen=True)
class Expected:
    """What is expected of a candidate.

    Attributes:
        change: of the loss.
        bits: for each weight that is edited.
        size: of the file, bytes.
    """

    change: float
    bits: float
    size: float


def _at(x: float, places: Sequence[float], values: Sequence[float]) -> float:
    xs, ys = (0.0, *places), (0.0, *values)
    if x > xs[-1]:
        return ys[-1] + (x - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return float(np.interp(x, xs, ys))


def sample(post: Weights, select: Any) -> list[str]:
    """Return one tensor for each part of the model: the middle one of those that are edited."""
    parts: dict[str, list[str]] = {}
    for name in editing.chosen(post, select):
        if len(meta(post, name).shape) > 1:
            parts.setdefault(part_of(name), []).append(name)
    return [names[len(names) // 2] for names in parts.values()]


def expected(
    points: Sequence[Point], told: Callable[[], None] = lambda: None
) -> tuple[Curves, list[Expected | ValueError]]:
    """Return a pair's curves, and of each candidate what is expected, or why nothing is.

    What was found before is taken from the artefacts; the pair is opened only for what was not.

    Args:
        points: of the candidates, with the same pair, objective and tensors.
        told: called once for each.
    """
    first = points[0]
    found: list[Expected | ValueError] = []
    shared = opening(first)[6]
    store = Store(first.artifacts, {**shared, "half": "A"}, _most(first))
    about = {"choosing": VERSION, "select": first.select}
    held = store.numbers("line", about)
    if held is None:
        held = _curves(reference(first), first.select)
        store.keep_numbers("line", about, held)
    curves = Curves(
        tuple(held["shrink"]), tuple(held["scatter"]), held["gap"], held["entries"], held["rest"]
    )
    for point in points:
        key = {**about, "edit": point.parts["edit"], "drawn": point.drawn, "seed": point.seed}
        held = store.numbers("line", key)
        if held is None:
            try:
                held = _sampled(reference(point), point)
            except ValueError as error:
                found.append(error)
                told()
                continue
            store.keep_numbers("line", key, held)
        size = curves.entries * held["bits"] / 8 + curves.rest
        change = curves.change(held["shrink"], held["scatter"])
        found.append(Expected(change, held["bits"], size))
        told()
    return curves, found


def _most(point: Point) -> float:
    return math.inf if point.artifacts_gb is None else point.artifacts_gb * 1e9


def _curves(known: Reference, select: Any) -> dict[str, Any]:
    """Measure the curves of a pair on half A."""
    pair, judge = known.pair, known.judge("A")
    names = editing.chosen(pair.post, select)
    if not names:
        raise ValueError(f"select={select}: no tensor of the model")

    def moved(make: Callable[[str, Tensor], Tensor]) -> float:
        weights = {}
        for name in names:
            post = pair.post[name]
            delta = difference(pair.pre[name], post).to(post.device)
            weights[name] = (post.float() + make(name, delta)).to(post.dtype)
        with loaded(pair.module, weights, restore=pair.post):
            return measure(pair.module, judge.loss).mean - judge.post.mean

    with console.steps("curves", len(SHRINKS) + len(SCATTERS)) as step:
        shrink, scatter = [], []
        for a in SHRINKS:
            shrink.append(moved(lambda _, delta, a=a: -a * delta))  # type: ignore[misc]
            step()
        for r in SCATTERS:
            scatter.append(moved(lambda name, delta, r=r: r**0.5 * _signed(name, delta)))  # type: ignore[misc]
            step()
    others = [name for name in pair.post if name not in set(names)]
    rest = sum(
        pair.post[n].numel() * pair.post[n].element_size()
        for n in others
        if not torch.equal(pair.pre[n], pair.post[n])
    )
    return {
        "shrink": shrink,
        "scatter": scatter,
        "gap": judge.pre.mean - judge.post.mean,
        "entries": sum(math.prod(meta(pair.post, n).shape) for n in names),
        "rest": rest,
    }


def _signed(name: str, delta: Tensor) -> Tensor:
    return torch.where(Rng(0, f"{name}/choosing").below(delta, 0.5), -delta, delta)


def _sampled(known: Reference, point: Point) -> dict[str, float]:
    """Return a, r and the bits for each weight of an edit, on the sample of tensors."""
    pair = known.pair
    post = {name: pair.post[name] for name in sample(pair.post, point.select)}
    extras = provide(known, point.edit, point.seed, point.salt, calibration(known, point))
    audit = Audit()
    device = next(pair.module.parameters()).device
    lazy = editing.edited(
        pair.pre, post, point.edit, point.select, extras, device=device, audit=audit
    )
    return measured({n: (pair.pre[n], post[n], lazy[n]) for n in lazy}, audit.said(pair))


def measured(
    tensors: Mapping[str, tuple[Tensor, Tensor, Tensor]], said: Mapping[str, Any]
) -> dict[str, float]:
    """Return a, r and the bits of edited tensors.

    Args:
        tensors: W_pre, W_post and W_edit of each.
        said: what the audit says of them.

    Raises:
        ValueError: an edit that has no code.

    >>> bits = {"bits_per_weight": {"payload": 1.0, "metadata": 0.5}}
    >>> pre, post = torch.zeros(2), torch.tensor([3.0, 4.0])
    >>> measured({"w": (pre, post, post / 2 + torch.tensor([4.0, -3.0]))}, bits)
    {'shrink': 0.5, 'scatter': 1.0, 'bits': 1.5}
    """
    if "bits_per_weight" not in said:
        raise ValueError("has no code with these settings, of which the size would be known")
    whole = along = square = 0.0
    for pre, post, edit in tensors.values():
        delta, error = difference(pre, post).double(), difference(post, edit).double()
        whole += float((delta * delta).sum())
        along += float((delta * error).sum())
        square += float((error * error).sum())
    shrink = -along / whole if whole else 0.0
    scatter = max(0.0, square / whole - shrink**2) if whole else 0.0
    told = said["bits_per_weight"]
    bits = told["payload"] + told["metadata"]
    return {"shrink": shrink, "scatter": scatter, "bits": bits}
