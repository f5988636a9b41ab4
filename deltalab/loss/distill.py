"""What is learned or averaged from a live model on the objective's inputs, without its labels."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltalab.data import splits
from deltalab.edits.bitdelta import mean_magnitude
from deltalab.loss.objectives import Loss, evaluating
from deltalab.weights.mapping import ModelPair, Weights, meta

PROVIDED = ("grad", "acts", "scale")
"""What `providers` provides."""


def providers(
    pair: ModelPair, loss: Loss, gradient: Callable[[], Weights]
) -> dict[str, Callable[[str, Weights], Any]]:
    """Return the providers of what an edit may ask for of a live model on an objective.

    Args:
        pair: the open pair.
        loss: the opened objective; what is fitted to its examples is given half A of them alone.
        gradient: the gradient at W_post, computed when it is first asked for.

    Returns:
        For `extras.Extras`, by need; what is learned or averaged is so once for all tensors.
    """

    @cache
    def examples() -> Loss:
        return splits.halved(loss, "A")

    @cache
    def inputs() -> dict[str, Tensor]:
        return mean_inputs(pair.module, examples())

    learned: dict[tuple[int, float], dict[str, Tensor]] = {}

    def scale(name: str, deltas: Weights) -> Callable[[int, float], Tensor | None]:
        def learn(steps: int, lr: float) -> Tensor | None:
            if (steps, lr) not in learned:
                learned[steps, lr] = scales(
                    pair.module, pair.pre, deltas, examples(), steps=steps, lr=lr
                )
            return learned[steps, lr].get(name)

        return learn

    return {
        "grad": lambda name, _: gradient()[name],
        "acts": lambda name, _: inputs().get(name),
        "scale": scale,
    }


class _Watched(nn.Module):
    """A module that runs with other weights and remembers what it put out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weights: dict[str, Tensor] = {}
        self.output = torch.empty(0)
        if hasattr(inner, "config"):
            self.config = inner.config

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the inner module with `weights` in place of its own."""
        output = functional_call(self.inner, self.weights, arguments, options)
        self.output = getattr(output, "logits", output)
        return output


def scales(
    module: nn.Module, pre: Weights, deltas: Weights, loss: Loss, *, steps: int, lr: float
) -> dict[str, Tensor]:
    """Learn one scale a matrix, so that the outputs match those of the module's own weights.

    Minimises the mean squared difference of the outputs under W_pre + alpha sign(D) and under
    W_post over the scales alpha, by Adam with a cosine schedule on alpha relative to mean |D|.
    The loss is called for the forward passes that it makes; its value is not looked at.

    Args:
        module: the live module, holding W_post.
        pre: pre-trained weights.
        deltas: the deltas of the selected tensors.
        loss: an opened objective.
        steps: gradient steps, one batch each, in the order of the batches.
        lr: first step size.

    Returns:
        A float32 scalar for each tensor of at least two dimensions; mean |D| throughout if learning
        did not lower the difference over all batches.
    """
    shapes = {name: meta(deltas, name).shape for name in deltas}
    names = [name for name, shape in shapes.items() if len(shape) > 1 and 0 not in shape]
    start = {name: mean_magnitude(deltas[name], "tensor") for name in names}
    if not steps or not names:
        return start
    watched = _Watched(module)
    with evaluating(module), torch.enable_grad():  # an edit asks for it without
        factors = {n: torch.ones((), device=start[n].device, requires_grad=True) for n in names}
        optimiser = torch.optim.Adam(factors.values(), lr=lr)
        begin = _distance(watched, pre, deltas, start, loss)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            batch = loss.batches[step % len(loss.batches)]
            now = {n: start[n] * factors[n] for n in names}
            distance = _batch_distance(watched, _signed(pre, deltas, now), loss, batch)
            gradients = torch.autograd.grad(distance, list(factors.values()))
            for factor, gradient in zip(factors.values(), gradients, strict=True):
                factor.grad = gradient
            optimiser.step()
        learned = {n: (start[n] * factors[n]).detach() for n in names}
        better = _distance(watched, pre, deltas, learned, loss) < begin
    return learned if better else start


def _signed(pre: Weights, deltas: Weights, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return W_pre + alpha sign(D) of every matrix, differentiable in alpha."""
    made = {}
    for name, alpha in scale.items():
        old = pre[name].to(alpha.device)
        sign = torch.where(deltas[name] < 0, -1.0, 1.0)
        made[name] = (old.float() + alpha * sign).to(old.dtype)
    return made


def _batch_distance(
    watched: _Watched, weights: dict[str, Tensor], loss: Loss, batch: Any
) -> Tensor:
    """Return the mean squared difference of the outputs on one batch."""
    with torch.no_grad():
        watched.weights = {}
        loss(watched, batch)
        wanted = watched.output.float()
    watched.weights = weights
    loss(watched, batch)
    return (watched.output.float() - wanted).square().mean()


def _distance(
    watched: _Watched, pre: Weights, deltas: Weights, scale: Mapping[str, Tensor], loss: Loss
) -> float:
    """Return the mean of the batches' differences."""
    with torch.no_grad():
        weights = _signed(pre, deltas, scale)
        each = [_batch_distance(watched, weights, loss, batch) for batch in loss.batches]
    return float(torch.stack(each).mean())


def mean_inputs(module: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """Return the mean input activation of every linear and convolution layer.

    The mean is over examples and positions, all that the objective's batches hold.

    Args:
        module: the live module.
        loss: an opened objective.

    Returns:
        float32 (in,) by the name of the layer's weight.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().movedim(axis, -1).flatten(0, -2)
            sums[name] = sums.get(name, 0) + rows.sum(0, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    with ExitStack() as hooks, evaluating(module), torch.no_grad():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                axis = -1 if isinstance(layer, nn.Linear) else 1
                handle = layer.register_forward_pre_hook(
                    watch(f"{name}.weight".removeprefix("."), axis)
                )
                hooks.callback(handle.remove)
        for batch in loss.batches:
            loss(module, batch)
    return {name: (total / counts[name]).float() for name, total in sums.items()}
