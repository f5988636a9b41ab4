"""How unsure a live module is of what it puts out on unlabelled inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.loss.distill import MASK, unpadded
from deltalab.loss.objectives import Loss
from deltalab.loss.passes import gradient
from deltalab.weights.layouts import layout_of
from deltalab.weights.mapping import ModelPair, Weights, live, loaded


@dataclass(frozen=True, eq=False)
class Entropy:
    """The entropy of a module's outputs for an objective's inputs, whose labels are not looked at.

    Every output counts alike: an image's class, or the next token at every position that is no
    padding. The objective is called for the forward passes that it makes.

    Args:
        loss: the opened objective.
        batches: which inputs, in its batches' form.
    """

    loss: Loss
    batches: Sequence[Any]
    unit: str = "nats per output"

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the entropy of every output, -sum p log p over its classes, and weights of 1.

        >>> even = nn.Linear(1, 4, bias=False).requires_grad_(False)
        >>> loss = Entropy(lambda module, batch: module(batch), ())
        >>> loss(even, torch.zeros(1, 1))[0].exp().round(decimals=4)
        tensor([4.])
        """
        found: list[Tensor] = []

        def told(_: nn.Module, __: Any, options: dict[str, Any], output: Any) -> None:
            logits = unpadded(getattr(output, "logits", output), options.get(MASK))
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logs = wide.flatten(0, -2).log_softmax(-1)
            found.append(-(logs.exp() * logs).sum(-1))

        handle = module.register_forward_hook(told, with_kwargs=True)
        try:
            self.loss(module, batch)
        finally:
            handle.remove()
        values = torch.cat(found)
        return values, torch.ones_like(values)


def gradient_at(
    pair: ModelPair, loss: Loss, batches: Sequence[Any], weights: Weights
) -> dict[str, Tensor]:
    """Return the gradient of the mean entropy, with some weights in the place of a pair's.

    Args:
        pair: the open pair, whose module holds `post`, also afterwards.
        loss: the objective whose inputs they are.
        batches: of its inputs.
        weights: some of the pair's tensors, by the names of its files.

    Returns:
        By the same names, on the module's device; of buffers zero.
    """
    module = pair.module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = [name for name in live(module, weights, pair.post) if name in parameters]
    with loaded(module, weights, restore=pair.post):
        found = layout_of(module).filed(gradient(module, Entropy(loss, batches), names))
    return {
        name: found[name] if name in found else torch.zeros_like(weights[name]) for name in weights
    }
