"""A pair's delta put onto another base: W_c + (W_post - W_pre) in place of W_post, W_c of W_pre."""

from dataclasses import replace

import torch
from torch import Tensor

from deltalab.linear.delta import difference
from deltalab.weights.aligned import is_parameter
from deltalab.weights.mapping import LazyWeights, ModelPair, Weights, live, meta


def rebased(pair: ModelPair, base: Weights) -> ModelPair:
    """Return the pair whose base is another and whose delta is the same; its module is filled anew.

    With the delta of a chat model on a base that was trained on in another way this is the chat
    vector of arXiv 2310.04799. The sum is rounded once, to the dtype of the base as evaluated; the
    new pair's delta differs from the old one by that rounding. Buffers are the base's.

    Args:
        pair: the open pair.
        base: of the same tensor names and shapes, in the dtype evaluated.

    Raises:
        ValueError: a tensor that is not in the base, or has another shape there.

    >>> module = torch.nn.Linear(1, 1, bias=False)
    >>> pre, post = ({"weight": torch.tensor([[w]])} for w in (1.0, 3.0))
    >>> moved = rebased(ModelPair(pre, post, module), {"weight": torch.tensor([[10.0]])})
    >>> moved.pre["weight"].item(), moved.post["weight"].item(), module.weight.item()
    (10.0, 12.0, 12.0)
    """
    for name in pair.post:
        shape = meta(pair.post, name).shape
        if name not in base:
            raise ValueError(f"model.base: tensor {name!r} is missing, which the pair has")
        if (other := meta(base, name).shape) != shape:
            raise ValueError(
                f"model.base: tensor {name!r} has shape {other}, in the pair {shape}; the base must"
                " have its architecture and vocabulary"
            )

    def load(name: str) -> Tensor:
        own = base[name]
        if not meta(pair.post, name).floating or not is_parameter(pair.post, name):
            return own
        return (own.float() + difference(pair.pre[name], pair.post[name])).to(own.dtype)

    told = lambda name: meta(pair.post, name)  # noqa: E731
    lazy = pair.post if isinstance(pair.post, LazyWeights) else LazyWeights(pair.post, load, told)
    found = replace(pair, pre=base, post=lazy.loading(load))
    state = pair.module.state_dict(keep_vars=True)
    filled = live(pair.module, found.post)
    with torch.no_grad():
        for name in filled:
            state[name].copy_(filled[name])
    return found
