"""What an edit did to a pair's weights, by counting."""

import math
from typing import Any

from torch import Tensor

from deltalab.apply.extras import Extras
from deltalab.weights.mapping import ModelPair, Weights, delta, difference


def audit(
    pair: ModelPair, post: Weights, edit: Any, extras: Extras, edited: Weights
) -> dict[str, Any]:
    """Say what an edit did: what it touched, how far it moved, how much of that storage lost.

    `relative_shift` is |shift| / |delta| and `lost_in_storage` |shift - (F(D) - D)| / |F(D) - D|,
    Frobenius norms over the touched tensors; `sparsity` is the share of touched entries that have
    the pre-trained value.
    """
    deltas = delta(pair.pre, post)
    zeros = entries = 0
    shift2 = delta2 = ideal2 = lost2 = 0.0
    for name in edited:
        before = deltas[name]
        ideal = extras.seen(edit, name)(before, **extras.for_tensor(name, deltas)) - before
        shift = difference(post[name], edited[name])
        zeros += int((edited[name] == pair.pre[name]).sum())
        entries += shift.numel()
        shift2 += squared(shift)
        delta2 += squared(before)
        ideal2 += squared(ideal)
        lost2 += squared(shift - ideal)
    return {
        "tensors": len(edited),
        "parameters": entries,
        "of_parameters": sum(t.numel() for t in pair.module.parameters()),
        "relative_shift": math.sqrt(shift2 / delta2) if delta2 else 0.0,
        "sparsity": zeros / entries if entries else 0.0,
        "lost_in_storage": math.sqrt(lost2 / ideal2) if ideal2 else 0.0,
    }


def squared(tensor: Tensor) -> float:
    """Return the sum of squares, accumulated in float64."""
    return float(tensor.double().square().sum())
