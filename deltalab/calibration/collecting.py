"""Statistics of a live module's layers, some layers at a time: each pass runs all examples once."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltalab.data import splits
from deltalab.loss.distill import MASK, unpadded
from deltalab.loss.objectives import Loss, evaluating
from deltalab.loss.passes import backward, mean_loss, probing

LIMIT = 2 << 30
"""Bytes of statistics that one pass holds."""


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose inputs have a gram, by the name of their weight.

    Those are linear maps of rows: linear layers (also those whose weight is stored (in, out)), and
    convolutions of one group in two dimensions, read as linear maps of patches. Others, such as
    embeddings and tensors of many experts, have none.

    >>> [*layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Conv2d(1, 2, 3)))]
    ['0.weight', '2.weight']
    """
    return {
        f"{name}.weight".removeprefix("."): part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
        or _turned(part)
        or (isinstance(part, nn.Conv2d) and _plain(part))
    }


def _turned(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is (in, out): transformers' `Conv1D`."""
    return type(layer).__name__ == "Conv1D"


def _plain(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    )


def width(layer: nn.Module) -> int:
    """Return how many inputs a layer's row has: the columns of its weight, read as (out, rest)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return len(weight) if _turned(layer) else weight[0].numel()


def grams(
    module: nn.Module,
    loss: Loss,
    names: Collection[str],
    step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return X'X / n of some layers, X the (n, k) inputs of all examples and positions.

    Padding is left out. A convolution's rows are its patches, in the order of its weight's columns,
    zeros at the border included. Every batch's product is taken in float32 (float64 for a float64
    module) and summed in float64, so that how batches are cut changes no more than rounding.

    Args:
        module: the live module.
        loss: an opened objective, which is called for the forward passes that it makes.
        names: which of `layers`.
        step: called at every batch.

    Returns:
        (k, k) by name, in float32 (float64 for a float64 module), on the module's device.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]

    def told(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
        mask[0] = options.get(MASK)

    def hook(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = _rows(layer, inputs[0].detach(), mask[0])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        if name not in sums:
            sums[name] = torch.zeros(2 * rows.shape[1:], dtype=wide, device=rows.device)
            counts[name] = 0
        sums[name] += rows.T @ rows
        counts[name] += len(rows)

    known = layers(module)
    with ExitStack() as hooks, evaluating(module), torch.no_grad():
        hooks.callback(module.register_forward_pre_hook(told, with_kwargs=True).remove)
        for name in names:
            hooks.callback(known[name].register_forward_pre_hook(partial(hook, name)).remove)
        for batch in loss.batches:
            loss(module, batch)
            step()
    kinds = {n: torch.promote_types(_dtype(known[n]), torch.float32) for n in sums}
    return {name: (sums[name] / max(1, counts[name])).to(kinds[name]) for name in sums}


def _dtype(layer: nn.Module) -> torch.dtype:
    found: torch.dtype = next(layer.parameters()).dtype
    return found


def _rows(layer: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return a layer's inputs as rows (n, k), padding left out."""
    if not isinstance(layer, nn.Conv2d):
        return unpadded(inputs, mask).flatten(0, -2)
    sizes: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return functional.unfold(inputs, *sizes).movedim(1, -1).flatten(0, 1)


def fisher(
    module: nn.Module,
    loss: Loss,
    names: Collection[str],
    step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradient of each example's own mean loss.

    The empirical Fisher diagonal: labels are those of the data. Examples without weight have no
    loss and do not count.

    Args:
        module: the live module, left as it was.
        loss: an opened objective.
        names: of parameters, no two of one tensor.
        step: called at every example.

    Returns:
        By name, of the parameter's shape, float32 (float64 for a float64 module), on its device.

    Raises:
        ValueError: no example has weight.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wanted = {name: parameters[name] for name in names}
    sums = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32),
                                requires_grad=False) for n, p in wanted.items()}  # fmt: skip
    counted = 0

    def scalar(batch: Any) -> tuple[Tensor, float]:
        nonlocal counted
        value, share = mean_loss(module, loss, batch)
        counted += share > 0
        step()
        return value, share

    def square(name: str, grad: Tensor, _: float) -> None:
        exact = grad.to(sums[name].dtype)
        sums[name].addcmul_(exact, exact)

    with probing(module, wanted, {name: p.detach() for name, p in wanted.items()}):
        backward(wanted, list(singles(loss)), scalar, square)
    return {name: total / counted for name, total in sums.items()}


def singles(loss: Loss) -> Iterator[Any]:
    """Yield the examples of an opened objective, each as a batch of its own."""
    for batch in loss.batches:
        for row in range(splits.examples(batch)):
            yield splits.rows_of(batch, [row])


def groups(sizes: Mapping[str, int], limit: int = LIMIT) -> list[tuple[str, ...]]:
    """Cut names into runs whose sizes come to no more than a limit, where a single one does not.

    >>> groups({"a": 3, "b": 3, "c": 9, "d": 1}, limit=6)
    [('a', 'b'), ('c',), ('d',)]
    """
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= size
    return [tuple(each) for each in found]


def blocks(module: nn.Module, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group layers by the block that they are in, in the order in which the module has them.

    A block is a member of the outermost list of modules; what is in none is a block of its own.

    >>> part = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> both = nn.ModuleDict({"blocks": nn.ModuleList([part, part]), "head": nn.Linear(1, 1)})
    >>> blocks(both, ["head.weight", "blocks.0.1.weight", "blocks.0.0.weight"])
    [('blocks.0.0.weight', 'blocks.0.1.weight'), ('head.weight',)]
    """
    lists = [n for n, part in module.named_modules() if isinstance(part, nn.ModuleList) and n]
    order = {name: place for place, name in enumerate(module.state_dict())}
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda each: order[each]):
        outer = next((each for each in lists if name.startswith(f"{each}.")), None)
        rest = name if outer is None else name[len(outer) + 1 :]
        block = name if outer is None else f"{outer}.{rest.split('.')[0]}"
        found.setdefault(block, []).append(name)
    return [tuple(each) for each in found.values()]
