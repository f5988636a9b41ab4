"""How much the loss suffers from errors in each tensor: measured with noise, a little and more.

For small errors that are unbiased, dL = a_l ||E_l||^2 whatever made them (arXiv 2411.17525, the
linearity theorem). The noise is that of `edit=noise`, a random multiple of every entry of the
delta, so that a_l is half the loss's mean curvature over the entries, weighted by their squares.
Noise of either sign takes the gradient's part away.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from deltalab.apply.extras import Extras, handed
from deltalab.edits import Edit
from deltalab.loss.objectives import measure
from deltalab.loss.passes import gradient
from deltalab.rng import Rng
from deltalab.run.opening import Judge, Reference
from deltalab.terminal import console
from deltalab.weights.layouts import layout_of
from deltalab.weights.mapping import Weights, loaded

LEVELS = (0.5, 1.0)
"""||noise||^2 by ||D||^2, of the two levels."""
PASSES = 2 * len(LEVELS)
"""Passes over the examples for each tensor: every level with either sign."""
VERSION = 1
"""To be raised when the same pair comes to have other sensitivities."""


def sensitivities(known: Reference, deltas: Weights) -> dict[str, float]:
    """Return a_l of every tensor, on half A of the objective's examples, kept in the store.

    a_l = sum_k e_k dL_k / sum_k e_k^2 over the levels e_k = ||noise||^2, where dL_k is the mean
    change of both signs. Where the loss falls, a_l is the least positive one of the model, so that
    errors are nowhere free.

    Args:
        known: the open pair.
        deltas: of the tensors.
    """
    judge = known.judge("A")

    def compute() -> dict[str, Tensor]:
        with console.steps("sensitivity", len(deltas)) as step:
            found = {}
            for name in deltas:
                found[name] = torch.tensor(_one(known, judge, name, deltas[name]))
                step()
        return found

    extra = {"statistic": "sensitivity", "of": list(deltas), "version": VERSION}
    held = known.store("A").tensors("calibration", compute, extra)
    return floored({name: fitted(held[name].tolist()) for name in deltas})


def midway(known: Reference, edit: Edit, extras: Extras, deltas: Weights) -> Weights:
    """Return the loss gradient half-way from W_post to the weights that an edit gives, on half A.

    <g, E> is then the change of a quadratic loss for this edit, curvature between tensors included,
    and near it for edits near this one; the gradient at W_post tells nothing of the curvature.

    Args:
        known: the open pair.
        edit: the edit, without a budget.
        extras: provider of what it asks for.
        deltas: of the tensors.
    """
    pair, nodes = known.pair, {}
    for name in deltas:
        delta, post = deltas[name], pair.post[name]
        needs = handed(extras.for_tensor(name, deltas), delta.device)
        with torch.no_grad():
            shift = extras.seen(edit, name, deltas)(delta, **needs) - delta
            nodes[name] = (post.float() + shift.to(post.device) / 2).to(post.dtype)
    with loaded(pair.module, nodes, restore=pair.post):
        found = gradient(pair.module, known.judge("A").loss)
    filed: Weights = layout_of(pair.module).filed(found)
    return filed


def _one(known: Reference, judge: Judge, name: str, delta: Tensor) -> list[list[float]]:
    """Return e and dL of every level."""
    pair, found = known.pair, []
    post = pair.post[name]
    noise = Rng(0, f"{name}/sensitivity").normal(delta) * delta
    energy = float(delta.double().square().sum())
    noise *= (energy / max(float(noise.double().square().sum()), 1e-300)) ** 0.5
    for level in LEVELS:
        total = 0.0
        for sign in (1, -1):
            moved = (post.float() + (sign * level**0.5) * noise.to(post.device)).to(post.dtype)
            with loaded(pair.module, {name: moved}, restore=pair.post):
                total += measure(pair.module, judge.loss).mean - judge.post.mean
        found.append([level * energy, total / 2])
    return found


def fitted(levels: list[list[float]]) -> float:
    """Return the slope of loss changes over squared errors, through zero, by least squares.

    >>> fitted([[1.0, 2.0], [2.0, 4.0]])
    2.0
    """
    square = sum(error * error for error, _ in levels)
    return sum(error * change for error, change in levels) / square if square else 0.0


def floored(slopes: Mapping[str, float]) -> dict[str, float]:
    """Return slopes with the least positive one in place of those that are not positive.

    >>> floored({"a": -1.0, "b": 2.0})
    {'a': 2.0, 'b': 2.0}
    """
    least = min((slope for slope in slopes.values() if slope > 0), default=1.0)
    return {name: slope if slope > 0 else least for name, slope in slopes.items()}
