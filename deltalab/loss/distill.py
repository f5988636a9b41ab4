"""What is learned or averaged from a live model on the objective's inputs, without its labels."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltalab.data import splits
from deltalab.edits.bitdelta import mean_magnitude
from deltalab.loss.objectives import Loss, evaluating
from deltalab.weights.layouts import layout_of
from deltalab.weights.mapping import ModelPair, Weights, live, meta
from deltalab.weights.select import selected

MASK = "attention_mask"
"""The keyword by which a batch of texts tells its module what of it is padding."""

PROVIDED = ("grad", "scale")
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
        For `extras.Extras`, by need; what is learned is so once for all tensors.
    """

    @cache
    def examples() -> Loss:
        return splits.halved(loss, "A")

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
        "scale": scale,
    }


class _Watched(nn.Module):
    """A module that runs with other weights and remembers what it put out, padding left out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weights: Weights = {}
        self.outputs: list[Tensor] = []
        if hasattr(inner, "config"):
            self.config = inner.config

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the inner module with `weights` in place of its own."""
        output = functional_call(self.inner, dict(self.weights), arguments, options)
        logits = getattr(output, "logits", output)
        self.outputs.append(unpadded(logits, options.get(MASK)).float())
        return output


def unpadded(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values at positions that a mask does not leave out, (positions, ..., features).

    Args:
        values: (examples, length, ..., features), or (examples * length, features).
        mask: (examples, length), 0 at padding; None where nothing is padded. What it does not fit,
            such as one value an example, is returned whole.

    >>> unpadded(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1, 0]]))
    tensor([[1.]])
    """
    if mask is not None and mask.ndim == 2:
        kept = mask.bool()
        if values.shape[:2] == kept.shape:
            return values[kept]
        if values.ndim == 2 and len(values) == kept.numel():
            return values[kept.flatten()]
    return values


def scales(
    module: nn.Module, pre: Weights, deltas: Weights, loss: Loss, *, steps: int, lr: float
) -> dict[str, Tensor]:
    """Learn one scale a matrix, so that the outputs match those of the module's own weights.

    Minimises the mean squared difference of the outputs under W_pre + alpha sign(D) and under
    W_post over the scales alpha, by Adam with a cosine schedule on alpha relative to mean |D|.
    The loss is called for the forward passes that it makes; its value is not looked at. Every step
    sees the same examples however the objective cuts its batches, and no padding.

    Args:
        module: the live module, holding W_post.
        pre: pre-trained weights.
        deltas: the deltas of the selected tensors.
        loss: an opened objective.
        steps: gradient steps, each on as many examples as the loss puts `together`, in order.
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
        groups = grouped(loss.batches, getattr(loss, "together", None))
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            sums, count = [torch.zeros_like(factor) for factor in factors.values()], 0
            for batch in groups[step % len(groups)]:
                now = {n: start[n] * factors[n] for n in names}
                part, size = _squares(watched, _signed(pre, deltas, now), loss, batch)
                gradients = torch.autograd.grad(part, list(factors.values()))
                sums = [total + each for total, each in zip(sums, gradients, strict=True)]
                count += size
            for factor, total in zip(factors.values(), sums, strict=True):
                factor.grad = total / max(1, count)
            optimiser.step()
        learned = {n: (start[n] * factors[n]).detach() for n in names}
        better = _distance(watched, pre, deltas, learned, loss) < begin
    return learned if better else start


def grouped(batches: Sequence[Any], size: int | None) -> list[list[Any]]:
    """Cut micro-batches into groups of so many examples, in order, each a list of micro-batches.

    Args:
        batches: nested tuples of tensors whose first dimension counts examples.
        size: examples of a group, the last of which may be smaller; None for a batch a group.

    >>> [[len(part) for part in group] for group in grouped([torch.ones(3), torch.ones(2)], 4)]
    [[3, 1], [1]]
    """
    if size is None:
        return [[batch] for batch in batches]
    groups: list[list[Any]] = []
    room = 0
    for batch in batches:
        count, start = splits.examples(batch), 0
        while start < count:
            if not room:
                groups.append([])
                room = size
            stop = min(count, start + room)
            groups[-1].append(splits.rows_of(batch, list(range(start, stop))))
            room -= stop - start
            start = stop
    return groups


def _signed(pre: Weights, deltas: Weights, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return W_pre + alpha sign(D) of every matrix, differentiable in alpha."""
    made = {}
    for name, alpha in scale.items():
        old = pre[name].to(alpha.device)
        sign = torch.where(deltas[name] < 0, -1.0, 1.0)
        made[name] = (old.float() + alpha * sign).to(old.dtype)
    return made


def _squares(
    watched: _Watched, weights: dict[str, Tensor], loss: Loss, batch: Any
) -> tuple[Tensor, int]:
    """Return the summed squared difference of the outputs on one batch, and how many there are."""
    with torch.no_grad():
        wanted = _outputs(watched, {}, loss, batch)
    found = _outputs(watched, weights, loss, batch)
    total = sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True))
    assert isinstance(total, Tensor), "a loss calls the module"
    return total, sum(output.numel() for output in wanted)


def _outputs(watched: _Watched, weights: dict[str, Tensor], loss: Loss, batch: Any) -> list[Tensor]:
    """Return what the module puts out for a batch, one tensor for each time the loss calls it."""
    rest = layout_of(watched.inner).filed(watched.inner.state_dict())
    watched.weights, watched.outputs = live(watched.inner, weights, rest), []
    loss(watched, batch)
    found, watched.outputs = watched.outputs, []
    return found


def _distance(
    watched: _Watched, pre: Weights, deltas: Weights, scale: Mapping[str, Tensor], loss: Loss
) -> float:
    """Return the mean squared difference over all outputs of all batches."""
    with torch.no_grad():
        weights = _signed(pre, deltas, scale)
        each = [_squares(watched, weights, loss, batch) for batch in loss.batches]
    return sum(float(total) for total, _ in each) / max(1, sum(count for _, count in each))


def mean_inputs(module: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """Return the mean input activation of every linear and convolution layer.

    The mean is over examples and positions, all that the objective's batches hold but padding.

    Args:
        module: the live module.
        loss: an opened objective.

    Returns:
        float32 (in,) by the name that the pair's files have for the layer's weight.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]

    def told(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
        mask[0] = options.get(MASK)

    def watch(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = unpadded(inputs[0].detach().movedim(axis, -1), mask[0]).flatten(0, -2)
            sums[name] = sums.get(name, 0) + rows.sum(0, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    with ExitStack() as hooks, evaluating(module), torch.no_grad():
        hooks.callback(module.register_forward_pre_hook(told, with_kwargs=True).remove)
        for name, layer in module.named_modules():
            if (axis := features(layer)) is not None:
                handle = layer.register_forward_pre_hook(
                    watch(f"{name}.weight".removeprefix("."), axis)
                )
                hooks.callback(handle.remove)
        for batch in loss.batches:
            loss(module, batch)
    means = {name: (total / counts[name]).float() for name, total in sums.items()}
    return layout_of(module).of_layers(means)


def features(layer: nn.Module) -> int | None:
    """Return the axis of a layer's input that its weight's inputs lie on; None for no linear map.

    Two of transformers are told by their names: `Conv1D`, a linear layer whose weight is (in, out),
    and the routers of experts.
    """
    name = type(layer).__name__
    if isinstance(layer, nn.Linear) or name == "Conv1D" or name.endswith("Router"):
        return -1
    return 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def input_of(
    module: nn.Module, means: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
) -> Tensor | None:
    """Return the mean input of the layer that a tensor is the weight of; None where it is of none.

    Args:
        module: the live module.
        means: its `mean_inputs`.
        name: the tensor's name in the pair's files.
        shape: its shape.

    Raises:
        ValueError: the weight of a layer, by its name and shape, whose inputs were not seen.

    >>> print(input_of(nn.Identity(), {}, "norm.weight", (4,)))
    None
    """
    if name in means or not selected("linear", name, shape):
        return means.get(name)
    tables = {
        f"{part}.weight".removeprefix("."): torch.empty(0)
        for part, layer in module.named_modules()
        if isinstance(layer, nn.Embedding)
    }
    if name in tables or name in layout_of(module).of_layers(tables):
        return None
    raise ValueError(
        f"tensor {name!r}: the inputs of its layer are not known, as of experts that a module"
        " computes by itself; leave it out with select.exclude"
    )
