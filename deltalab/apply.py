"""Apply an edit to weights: one tensor, or lazily all selected tensors of a pair."""

from typing import Any

import torch
from torch import Tensor

from deltalab.edits.discard import Discard
from deltalab.edits.keep import Keep
from deltalab.extras import Extras
from deltalab.select import selected
from deltalab.weights import LazyWeights, Weights, shape_of

SLICE = 1 << 20
"""Elements in one slice of an elementwise edit: its temporaries stay in the processor's cache."""


def difference(pre: Tensor, post: Tensor) -> Tensor:
    """Return W_post - W_pre in float32; equal entries give zero, infinite ones too.

    >>> difference(torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf]))
    tensor([0.5000, 0.0000])
    """
    a, b = pre.float(), post.float()
    return torch.where(a == b, 0.0, b - a)


def stored(pre: Tensor, post: Tensor, delta: Tensor, hat: Tensor) -> Tensor:
    """Return W_pre + D_hat in W_post's dtype, exact where the edit changed nothing or took all.

    Entries whose delta the edit kept have W_post's bits and entries whose delta it removed those of
    W_pre: adding a float32 delta back would round, and rounding is no part of the edit.
    """
    moved = (pre.float() + hat).to(post.dtype)
    return torch.where(hat == delta, post, torch.where(hat == 0, pre.to(post.dtype), moved))


def edited_tensor(pre: Tensor, post: Tensor, edit: Any, **needs: Any) -> Tensor:
    """Return one edited tensor, W_pre + F(W_post - W_pre), in W_post's dtype.

    Args:
        pre: floating-point tensor of any shape, strides and dtype.
        post: tensor of the same shape.
        edit: the edit F.
        needs: the keyword arguments that the edit declares.

    >>> from deltalab.edits.expo import Expo
    >>> edited_tensor(torch.tensor([1.0]), torch.tensor([1.5]), Expo(alpha=1.0))
    tensor([2.])
    """
    if isinstance(edit, Keep):
        return post.clone(memory_format=torch.contiguous_format)
    if isinstance(edit, Discard):
        return pre.to(post.dtype, copy=True, memory_format=torch.contiguous_format)
    if getattr(edit, "elementwise", False):
        return _in_slices(pre, post, edit, needs)
    delta = difference(pre, post)
    return stored(pre, post, delta, edit(delta, **needs))


def _in_slices(pre: Tensor, post: Tensor, edit: Any, needs: dict[str, Any]) -> Tensor:
    """Apply an elementwise edit slice by slice: same bits, bounded memory."""
    out = torch.empty(post.shape, dtype=post.dtype, device=post.device)
    a, b, into = pre.reshape(-1), post.reshape(-1), out.view(-1)
    for start in range(0, post.numel(), SLICE):
        part = slice(start, start + SLICE)
        given = {name: _sliced(name, value, part) for name, value in needs.items()}
        delta = difference(a[part], b[part])
        into[part] = stored(a[part], b[part], delta, edit(delta, **given))
    return out


def _sliced(name: str, value: Any, part: slice) -> Any:
    """Return one need of an elementwise edit for a slice of the flat tensor."""
    assert name in ("rng", "grad"), f"an elementwise edit cannot ask for {name}"
    return value.at(part.start) if name == "rng" else value.reshape(-1)[part]


def edited(pre: Weights, post: Weights, edit: Any, select: Any, extras: Extras) -> LazyWeights:
    """Return the selected floating-point tensors of a pair, edited one by one when asked for.

    Args:
        pre: pre-trained weights.
        post: post-trained weights, same names and shapes.
        edit: the edit.
        select: a preset or a `select.Selection`.
        extras: provider of what the edit needs.
    """
    names = [
        n for n in post if selected(select, n, shape_of(post, n)) and post[n].is_floating_point()
    ]
    deltas = LazyWeights(names, lambda n: difference(pre[n], post[n]))

    def load(name: str) -> Tensor:
        needs = extras.for_tensor(name, deltas)
        return edited_tensor(pre[name], post[name], edit, **needs)

    return LazyWeights(names, load)
