"""Objectives: a loss on fixed batches, and the measured loss change between two sets of weights.

An objective's mean is `sum of losses / sum of weights` over all examples, in nats per example (all
weights 1) or per answer token (weights = tokens). Per-example values are kept, so that a change
between two models on the same examples has an honest, paired standard error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltalab.artifacts import Store
from deltalab.store.latest import latest
from deltalab.weights.mapping import ModelPair


class Loss(Protocol):
    """An opened objective: fixed micro-batches on the module's device, and their losses.

    A loss may say by an attribute `together` on how many examples a step of learning is made, so
    that what is learned (`deltalab.loss.distill`) does not depend on the size of a micro-batch.
    """

    @property
    def unit(self) -> str:
        """`nats per example` or `nats per token`."""

    @property
    def batches(self) -> Sequence[Any]:
        """The fixed micro-batches; how they are cut does not change any mean."""

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return losses (n,), summed within each example, and weights (n,), 1 or tokens."""


@dataclass(frozen=True)
class Measured:
    """Per-example losses of one set of weights.

    Attributes:
        losses: (n,) float64, summed over an example's tokens.
        weights: (n,) float64, what each example counts for in the mean.
    """

    losses: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """Sum of losses over sum of weights, in the objective's unit."""
        return float(self.losses.sum() / self.weights.sum())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Put a module into eval mode; give every sub-module its own mode back on leaving."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in modes:
            part.training = training


def measure(module: nn.Module, loss: Loss) -> Measured:
    """Return the loss of every example under the module's present weights.

    Raises:
        ValueError: no examples, a loss that is not finite, or no weight at all.
    """
    losses, weights = [], []
    with evaluating(module), torch.no_grad():
        for batch in loss.batches:
            values, counts = loss(module, batch)
            losses.append(values.double().cpu())
            weights.append(counts.double().cpu())
    if not losses:
        raise ValueError("the objective has no examples")
    measured = Measured(torch.cat(losses), torch.cat(weights))
    if not bool(measured.losses.isfinite().all()):
        bad = int((~measured.losses.isfinite()).nonzero()[0])
        raise ValueError(f"the loss of example {bad} is {float(measured.losses[bad])}")
    if not float(measured.weights.sum()) > 0:
        raise ValueError("the objective's examples have no weight: nothing in them is predicted")
    return measured


def change(post: Measured, edited: Measured) -> tuple[float, float]:
    """Return the loss change on the same examples and its standard error.

    With d_i the difference of example i's losses and w_i its weight: change = sum d / sum w, and,
    as for any ratio of sums, error^2 = n/(n-1) * sum (d_i - change * w_i)^2 / (sum w)^2. With all
    weights 1 this is the paired standard error std(d)/sqrt(n).

    Returns:
        The change and its error; the error of a single example is infinite.

    >>> one = torch.ones(2).double()
    >>> change(Measured(one, one), Measured(torch.tensor([1.0, 3.0]).double(), one))
    (1.0, 1.0)
    """
    if not torch.equal(post.weights, edited.weights):
        raise ValueError("the two measurements are not of the same examples")
    difference, count = edited.losses - post.losses, len(post.losses)
    total = float(post.weights.sum())
    value = float(difference.sum()) / total
    if count < 2:
        return value, math.inf
    residual = difference - value * post.weights
    return value, math.sqrt(float((residual**2).sum()) * count / (count - 1)) / total


def influences(post: Measured, edited: Measured) -> Tensor:
    """Return what each example says of the loss change: values whose mean is the change.

    v_i = change + (d_i - change * w_i) * n / sum w, with d_i and w_i as in `change`, whose error is
    std(v) / sqrt(n). Kept with a point, they let draws and edits be compared example by example,
    whatever the examples weigh.

    Returns:
        (n,) float64.

    >>> one = torch.ones(2).double()
    >>> influences(Measured(one, one), Measured(torch.tensor([1.0, 3.0]).double(), one))
    tensor([0., 2.], dtype=torch.float64)
    """
    value, _ = change(post, edited)
    difference, weights = edited.losses - post.losses, post.weights
    return value + (difference - value * weights) * (len(weights) / float(weights.sum()))


def interval(
    post: Measured, edited: Measured, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return a bootstrap interval of the change, resampling examples with both their losses.

    Needs no normality, as the standard error does: losses of single examples have long tails.

    Args:
        post: losses under W_post.
        edited: losses under W_edit of the same examples.
        level: coverage, in (0, 1).
        draws: resamples.
        seed: of the resampling.

    >>> same = Measured(torch.ones(9).double(), torch.ones(9).double())
    >>> interval(same, Measured(same.losses + 0.5, same.weights))
    (0.5, 0.5)
    """
    change(post, edited)  # the same examples, or a clear error
    difference, count = edited.losses - post.losses, len(post.losses)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for _ in range(draws):
        picks = torch.randint(count, (count,), generator=generator)
        ratios.append(difference[picks].sum() / post.weights[picks].sum())
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.stack(ratios).quantile(tails).tolist()
    return low, high


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) under the softmax of logits, in nats, in float32 or better.

    Args:
        logits: (n, classes), of any floating dtype.
        labels: (n,), int64.

    >>> surprise(torch.zeros(1, 8), torch.tensor([3])).exp()
    tensor([8.])
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(exact, labels, reduction="none")


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Classification cross-entropy on opened batches of (x, y)."""

    batches: Sequence[tuple[Tensor, Tensor]]
    most: int
    unit: str = "nats per example"
    together: ClassVar[int] = 256

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return every image's cross-entropy and weight 1."""
        x, y = batch
        weight = next(module.parameters())
        logits = module(x.to(weight.dtype))
        if self.most >= logits.shape[-1]:
            raise ValueError(
                f"label {self.most} in the objective's data: the model has outputs"
                f" 0 to {logits.shape[-1] - 1}"
            )
        losses = surprise(logits, y)
        return losses, torch.ones_like(losses)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of labelled images, mean over images in nats.

    Args:
        data: an image source (`deltalab.data.images`), whose `open` yields batches of (x, y).
        batch_size: images a micro-batch; smaller needs less memory and changes no result.
        limit: the first so many images only; all when None.

    Raises:
        ValueError: on opening: no images, or a negative label; on use: a label beyond the outputs.
    """

    data: Any
    batch_size: int = 256
    limit: int | None = None

    def __post_init__(self) -> None:
        for field, value in (("batch_size", self.batch_size), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"objective.{field}={value}: must be at least 1")

    def open(self, pair: ModelPair, store: Store | None = None) -> Loss:
        """Return the loss on the pair's device; consecutive calls share the batches.

        Args:
            pair: the open pair.
            store: for objectives that keep something; this one does not.
        """
        device = next(pair.module.parameters()).device
        return _cross_entropy(self, pair.transform, device)


@latest("objective")
def _cross_entropy(
    spec: Classification, transform: Callable[..., Tensor] | None, device: torch.device
) -> CrossEntropy:
    left, batches = spec.limit or math.inf, []
    for x, y in spec.data.open(transform, spec.batch_size):
        x, y = x[: int(min(left, len(y)))], y[: int(min(left, len(y)))]
        if len(y):
            batches.append((x.to(device), y.to(device)))
        left -= len(y)
        if left <= 0:
            break
    if not batches:
        raise ValueError("objective: no images to take a loss of")
    if (least := min(int(y.min()) for _, y in batches)) < 0:
        raise ValueError(f"label {least} in the objective's data: labels count from 0")
    return CrossEntropy(tuple(batches), most=max(int(y.max()) for _, y in batches))
