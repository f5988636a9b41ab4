"""Numbers that are none: NaN and infinities in a pair of models, found before anything is edited.

One NaN in a weight makes every loss NaN, one infinity every scale of an edit; and two finite
weights can have a delta that float32 does not hold.
"""

import logging
import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from deltalab.linear.delta import difference
from deltalab.weights.layouts import layout_of
from deltalab.weights.mapping import LazyWeights, ModelPair, Weights, live, meta

NONFINITE = ("error", "zero")
_SLICE = 1 << 17
log = logging.getLogger(__name__)


def check(nonfinite: str) -> None:
    """Raise `ValueError` unless the setting is one of `NONFINITE`."""
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite={nonfinite}: must be one of {', '.join(NONFINITE)}")


def check_edited(edited: Weights) -> None:
    """Raise `ValueError` naming the first edited tensor that its dtype does not hold.

    >>> check_edited({"w": torch.tensor([7e4, 1.0]).half()})
    Traceback (most recent call last):
    ValueError: tensor 'w': the edit exceeds float16 in 1 of 2 entries (largest 65504)
    """
    for name, tensor in edited.items():
        if not all_finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            dtype, largest = str(tensor.dtype)[6:], torch.finfo(tensor.dtype).max
            raise ValueError(
                f"tensor {name!r}: the edit exceeds {dtype} in {bad} of {tensor.numel()} entries"
                f" (largest {largest:g})"
            )


def checked(pair: ModelPair, nonfinite: str = "error") -> ModelPair:
    """Return the pair if all that could be edited is finite; reads every pre-trained tensor once.

    The post-trained ones are taken from the module, which has just been filled with them.

    Infinities that both models share in a buffer, as attention masks have, are left alone: their
    delta is zero.

    Args:
        pair: an open pair; its module holds `post`.
        nonfinite: "error", or "zero" to set each entry that is not finite on either side, or whose
            delta is not, to zero on both sides, in the module too.

    Raises:
        ValueError: under "error", naming the first tensor, its side and the number of entries.
    """
    check(nonfinite)
    buffers = {name for name, _ in pair.module.named_buffers()}
    state = layout_of(pair.module).filed(pair.module.state_dict())
    bad, moved = [], False
    for name in pair.post:
        pre = pair.pre[name]
        post = state[name].detach().to(pre.device, meta(pair.post, name).dtype)
        moved = moved or not torch.equal(pre, post)
        if not post.is_floating_point() or _finite(pre, post):
            continue
        mask = _mask(pre, post, name in buffers)
        if count := int(mask.sum()):
            bad.append(name)
            if nonfinite == "error":
                raise ValueError(_complaint(name, pre, post, count))
            log.warning("%s; set to zero", _complaint(name, pre, post, count).split("; ")[0])
    if not moved:
        log.warning("the pre- and the post-trained model are identical: every delta is zero")
    return _zeroed(pair, bad, buffers) if bad else pair


def all_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite: the largest bit pattern without sign is below infinity's.

    >>> [all_finite(torch.tensor([-1.0, x])) for x in (3e38, torch.inf, -torch.nan)]
    [True, False, False]
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return all(map(math.isfinite, _ends(tensor)))
    bits = 8 * tensor.element_size()
    kind = np.dtype(f"uint{bits}")
    words = tensor.detach().reshape(-1).view(torch.uint8).numpy().view(kind)
    infinity = torch.tensor(torch.inf, dtype=tensor.dtype).reshape(1).view(torch.uint8)
    limit = infinity.numpy().view(kind)[0]
    magnitude = kind.type((1 << (bits - 1)) - 1)
    parts = range(0, len(words), _SLICE)
    return all((words[i : i + _SLICE] & magnitude).max() < limit for i in parts)


def _ends(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the greatest entry, NaN where there is one; zeros of an empty tensor."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(tensor)
    return float(low), float(high)


def _finite(pre: Tensor, post: Tensor) -> bool:
    """Whether both tensors and their delta are finite, without a temporary of their size."""
    old, new = _ends(pre), _ends(post)
    widest = max(new[1] - old[0], old[1] - new[0])
    return widest <= torch.finfo(torch.float32).max  # false for NaN, and before a delta overflows


def _mask(pre: Tensor, post: Tensor, buffer: bool) -> Tensor:
    """Return where a number is none, on either side or in the delta."""
    bad = ~difference(pre, post).isfinite()
    return bad if buffer else bad | ~pre.isfinite() | ~post.isfinite()


def _complaint(name: str, pre: Tensor, post: Tensor, count: int) -> str:
    old, new = (int((~tensor.isfinite()).sum()) for tensor in (pre, post))
    return f"{complaint(name, old, new, count)}; nonfinite=zero sets them to zero"


def complaint(name: str, pre: int, post: int, delta: int) -> str:
    """Return what to say of a tensor with numbers that are none, counted by side.

    >>> complaint("w", 1, 0, 1)
    "tensor 'w': NaN or infinite entries, 1 in the pre-trained model"
    """
    sides = {"pre-trained": pre, "post-trained": post}
    where = [f"{n} in the {side} model" for side, n in sides.items() if n]
    text = ", ".join(where) or f"{delta} in the delta, which float32 does not hold"
    return f"tensor {name!r}: NaN or infinite entries, {text}"


def _zeroed(pair: ModelPair, names: list[str], buffers: set[str]) -> ModelPair:
    """Return the pair with the bad entries of these tensors zero on both sides."""

    def cleaned(own: Weights) -> LazyWeights:
        def load(name: str) -> Tensor:
            if name not in names:
                return own[name]
            mask = _mask(pair.pre[name], pair.post[name], name in buffers)
            return own[name].masked_fill(mask, 0)

        if isinstance(own, LazyWeights):
            return own.loading(load)
        return LazyWeights(own, load, partial(meta, own))

    new = replace(pair, pre=cleaned(pair.pre), post=cleaned(pair.post))
    _refill(pair.module, new.post, names)
    return new


def _refill(module: nn.Module, post: Weights, names: list[str]) -> None:
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in live(module, {n: post[n] for n in names}, post).items():
            state[name].copy_(value)
