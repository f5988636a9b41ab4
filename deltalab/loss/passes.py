"""Passes over an objective at the module's present weights: gradients, slopes and curvature.

Derivatives along a direction v; the first two keep no model-sized gradient:

* reverse mode, <grad L, v> tensor by tensor: hooks reduce each gradient as soon as it exists;
* forward mode, <grad L, v> in total: no gradient and no stored activations;
* curvature, v'Hv tensor by tensor: the slope differentiated once more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from deltalab.loss.objectives import Loss, evaluating
from deltalab.weights.mapping import Weights, meta

CHUNK = 1 << 18
"""Entries of a tensor whose float64 products are alive at a time: 4 MiB of two factors, which stay
in a processor's cache. Sixteen times as many on a GPU, whose kernels want work."""


def targets(module: nn.Module, shift: Weights) -> dict[str, nn.Parameter]:
    """Return the parameters that a shift moves, by the shift's names, tied ones once.

    A tensor whose shift is zero throughout is left out: it costs nothing.

    Raises:
        ValueError: a name that is no parameter, or of another shape; buffers (running statistics)
            have no gradient that a term could use.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name in shift:
        if name not in parameters:
            raise ValueError(
                f"the edit shifts {name!r}, which is no parameter of the model; leave it out with"
                " select.exclude"
            )
        parameter, shape = parameters[name], meta(shift, name).shape
        if parameter.shape != shape:
            raise ValueError(
                f"tensor {name!r}: shape {shape} of the shift, {tuple(parameter.shape)} in the"
                " model"
            )
        if id(parameter) not in seen and bool(shift[name].any()):
            seen.add(id(parameter))
            found[name] = parameter
    return found


def move(touched: Mapping[str, nn.Parameter], post: Weights, shift: Weights, node: float) -> None:
    """Write post + node * shift into the parameters, from the stored copies, rounded once."""
    with torch.no_grad():
        for name, parameter in touched.items():
            start = post[name].to(parameter.device)
            if node == 0:
                parameter.copy_(start)
                continue
            step = shift[name].to(parameter.device)
            exact = _exact(parameter.dtype)
            parameter.copy_(torch.add(start.to(exact), step.to(exact), alpha=node))


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Have a module's tensors of 16 bits in float32 for a while, each converted by itself.

    What it holds on leaving must be what 16 bits can hold, as W_post.
    """
    state = [*module.parameters(), *module.buffers()]
    narrow = [(t, t.dtype) for t in state if t.is_floating_point() and t.element_size() == 2]
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


def rounding(post: Weights, shift: Weights) -> float:
    """Return |rounded(W_post + E/2) - (W_post + E/2)| / |E/2|: what storing a path's middle costs.

    >>> post = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    >>> rounding(post, {"w": torch.tensor([2.0**-7])}), rounding(post, {"w": torch.tensor([1.0])})
    (1.0, 0.0)
    """
    lost = whole = 0.0
    for name in shift:
        start, step = post[name], shift[name].to(post[name].device) / 2
        exact = start.double() + step.double()
        lost += float((exact.to(start.dtype).double() - exact).square().sum())
        whole += float(step.double().square().sum())
    return float((lost / whole) ** 0.5) if whole else 0.0


@contextmanager
def probing(
    module: nn.Module, touched: Mapping[str, nn.Parameter], post: Weights
) -> Iterator[None]:
    """Let gradients flow to the touched parameters only, in eval mode; put everything back.

    On leaving, also by an exception, the touched parameters hold `post` again, and every
    parameter's `requires_grad` and `grad` are what they were.
    """
    wanted = {id(parameter) for parameter in touched.values()}
    states = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    try:
        with evaluating(module), torch.enable_grad():
            for parameter, _, _ in states:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
            yield
    finally:
        for parameter, required, grad in states:
            parameter.requires_grad_(required)
            parameter.grad = grad
        move(touched, post, {}, 0.0)


def slopes(
    module: nn.Module, touched: Mapping[str, nn.Parameter], shift: Weights, loss: Loss
) -> dict[str, float]:
    """Return <grad, shift> of every touched tensor at the module's present weights.

    One gradient evaluation: a forward and a backward pass over every batch.
    """
    total = {
        name: torch.zeros((), dtype=_accumulator(p.device), device=p.device)
        for name, p in touched.items()
    }

    def reduce(name: str, grad: Tensor, share: float) -> None:
        total[name] += inner(grad, shift[name]) * share

    weight = backward(touched, loss.batches, partial(mean_loss, module, loss), reduce)
    return {name: value.item() / weight for name, value in total.items()}


def slope(
    module: nn.Module, touched: Mapping[str, nn.Parameter], shift: Weights, loss: Loss
) -> float:
    """Return <grad, shift> over all touched tensors in forward mode.

    One pass of dual numbers through the network, counted as a gradient evaluation too: no backward
    pass, no stored activations, no gradient. Products have the module's precision, so for a
    bf16 module `slopes` is the exacter. Attention runs in plain operations, since fused kernels
    have no forward-mode rule.
    """
    total = weight = 0.0
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in loss.batches:
            tangent, share = _tangent(module, touched, shift, loss, batch)
            if share > 0:
                weight += share
                total += share * tangent.item()
    return total / _checked(weight)


def curvature(
    module: nn.Module, touched: Mapping[str, nn.Parameter], vector: Weights, loss: Loss
) -> dict[str, float]:
    """Return <(H v)_n, v_n> of every touched tensor n; their sum is v'Hv.

    One Hessian-vector product: the slope <grad, v> is differentiated once more, and hooks reduce
    and free its gradient Hv tensor by tensor. The gradient itself is held, with its graph.
    """
    total = dict.fromkeys(touched, 0.0)

    def along(batch: Any) -> tuple[Tensor, float]:
        value, share = mean_loss(module, loss, batch)
        # Reverse over reverse: torch's reverse over forward is silently wrong for layer norms.
        grads = torch.autograd.grad(
            value, list(touched.values()), create_graph=True, allow_unused=True
        )
        products = [
            (g * vector[name].to(g)).sum()
            for name, g in zip(touched, grads, strict=True)
            if g is not None
        ]
        return torch.stack(products).sum(), share

    def reduce(name: str, product: Tensor, share: float) -> None:
        total[name] += inner(product, vector[name]).item() * share

    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        weight = backward(touched, loss.batches, along, reduce)
    return {name: value / weight for name, value in total.items()}


class _Bound(nn.Module):
    """A module's mean loss of a batch as a forward pass, for `functional_call`."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, float]:
        return mean_loss(self.module, self.loss, batch)


def _tangent(
    module: nn.Module, touched: Mapping[str, nn.Parameter], vector: Weights, loss: Loss, batch: Any
) -> tuple[Tensor, float]:
    """Return a batch's forward-mode slope along a vector, and the batch's weight."""
    bound, shares = _Bound(module, loss), []

    def mean(weights: dict[str, Tensor]) -> Tensor:
        value: Tensor
        value, share = torch.func.functional_call(bound, weights, (batch,))
        shares.append(share)
        return value

    along: Tensor = torch.func.jvp(
        mean,
        ({f"module.{name}": parameter for name, parameter in touched.items()},),
        ({f"module.{name}": vector[name].to(p) for name, p in touched.items()},),
    )[1]
    return along, shares[0]


def mean_loss(module: nn.Module, loss: Loss, batch: Any) -> tuple[Tensor, float]:
    """Return a batch's mean loss and its weight; a batch without weight has no mean."""
    losses, counts = loss(module, batch)
    share = float(counts.sum())
    return losses.sum() / (share or 1.0), share


def _checked(weight: float) -> float:
    if weight == 0:
        raise ValueError("the objective's examples have no weight: nothing in them is predicted")
    return weight


def backward(
    wanted: Mapping[str, nn.Parameter],
    batches: Sequence[Any],
    scalar: Callable[[Any], tuple[Tensor, float]],
    consume: Callable[[str, Tensor, float], None],
) -> float:
    """Differentiate every batch's scalar, handing each gradient over as soon as it exists.

    Args:
        wanted: the parameters whose gradients are wanted, each once; within `probing`.
        batches: the objective's batches.
        scalar: gives a batch's mean loss (or what else is to be differentiated) and its weight.
        consume: takes a name, the gradient of a batch's scalar, and the batch's weight; the
            gradient is freed when it returns.

    Returns:
        The weight of all batches.
    """
    share = weight = 0.0

    def hand_over(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        consume(name, parameter.grad, share)
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(hand_over, name))  # type: ignore[no-untyped-call]
        for name, parameter in wanted.items()
    ]
    try:
        for batch in batches:
            value, share = scalar(batch)
            if share > 0:
                weight += share
                value.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return _checked(weight)


def gradient(
    module: nn.Module, loss: Loss, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return the mean loss's gradient at the module's present weights: one gradient evaluation.

    Micro-batches are summed in float32 (float64 for a float64 module), also for a bf16 module.

    Args:
        module: the live module, left as it was.
        loss: the opened objective.
        names: of the parameters wanted; all when None.

    Returns:
        Name -> gradient, on the module's device; the names of tied parameters share one tensor.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    asked = {name: parameters[name] for name in (parameters if names is None else names)}
    first_name = {id(parameter): name for name, parameter in reversed(asked.items())}
    wanted = {name: asked[name] for name in first_name.values()}
    sums = {
        name: torch.zeros_like(p, dtype=_exact(p.dtype), requires_grad=False)
        for name, p in wanted.items()
    }

    def add(name: str, grad: Tensor, share: float) -> None:
        sums[name].add_(grad, alpha=share)

    with probing(module, wanted, {name: p.detach() for name, p in wanted.items()}):
        weight = backward(wanted, loss.batches, partial(mean_loss, module, loss), add)
    for value in sums.values():
        value /= weight
    return {name: sums[first_name[id(parameter)]] for name, parameter in asked.items()}


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> as a scalar tensor, multiplied and summed in float64 a chunk at a time.

    >>> inner(torch.tensor([1e8, 1.0, -1e8]), torch.ones(3)).item()
    1.0
    """
    dtype = _accumulator(a.device)
    chunk = CHUNK if a.device.type == "cpu" else 16 * CHUNK
    left, right = a.reshape(-1), b.reshape(-1)
    total = torch.zeros((), dtype=dtype, device=a.device)
    for start in range(0, left.numel(), chunk):
        piece = right[start : start + chunk].to(a.device)
        total += torch.dot(left[start : start + chunk].to(dtype), piece.to(dtype))
    return total


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _accumulator(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


@contextmanager
def checkpointing(module: nn.Module) -> Iterator[None]:
    """Recompute every block's activations in the backward pass instead of storing them.

    Blocks are the members of `nn.ModuleList`s of at least two of one class, as the layers of
    transformers are. Slower by one forward pass; needed for long sequences.
    """
    blocks: list[nn.Module] = []
    within: set[int] = set()
    for part in module.modules():
        if not isinstance(part, nn.ModuleList) or id(part) in within or len(part) < 2:
            continue
        if len({type(block) for block in part}) == 1:
            blocks += part
            within |= {id(inside) for inside in part.modules()}  # of nested lists the outermost

    def checkpointed(block: nn.Module) -> None:
        forward = block.forward

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = recomputed
        stack.callback(block.__dict__.pop, "forward")

    with ExitStack() as stack:
        for block in blocks:
            checkpointed(block)
        yield
