"""Class-incremental learning: a family's experts in order are a stream of tasks.

After task t the backbone is W_pre plus the merge of the first t experts' edited deltas, and a head
on its features tells apart all classes seen so far, without being told which task an image is of.
A[t, j] is the accuracy on task j's test images after task t.

    accuracy           mean over j of A[T, j]
    forgetting         mean over j < T of max over j <= t < T of A[t, j], less A[T, j]
    backward transfer  mean over j < T of A[T, j] - A[j, j]
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalab.data import splits
from deltalab.data.images import Batch, Images
from deltalab.evaluators.scores import Scores
from deltalab.linear.heads import HEADS, Head, NearestMean, Ridge
from deltalab.rng import Rng
from deltalab.weights.mapping import ModelPair

PROTOTYPES = ("refreshed", "stale")
BACKBONES = ("merged", "own")
APART = 1 << 32
"""What sets the labels of one task apart from those of the next."""


@dataclass(frozen=True)
class Continual:
    """One task of a stream, and how the stream is classified; of a pair, a stream of one task.

    The heads look at half A of the training images. The test images judge.

    Args:
        train: what the heads learn from; half A of it.
        test: what they are scored on.
        name: prefix of the metrics of the task alone, `<name>/accuracy`.
        head: `ncm`, the nearest class mean by cosine; `ridge`, least squares on the features;
            `ranpac`, least squares on random features.
        prototypes: `refreshed`, all sums taken anew under each backbone from the training images of
            all tasks so far, which must then be at hand; `stale`, those of a task left as they were
            under the backbone after that task.
        backbone: `merged`; or `own`, the t-th expert as it is, for checkpoints of one run that went
            from task to task (sequential fine-tuning).
        projections: random features of `ranpac`; its authors take 10,000.
        seed: of the random projection.
        batch_size: images per forward pass; has no effect on the result beyond rounding.

    Raises:
        ValueError: a setting is none of those.
    """

    train: Images
    test: Images
    name: str
    head: str = "ncm"
    prototypes: str = "refreshed"
    backbone: str = "merged"
    projections: int = 1000
    seed: int = 0
    batch_size: int = 250
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for field, choices in (
            ("head", HEADS), ("prototypes", PROTOTYPES), ("backbone", BACKBONES),
        ):  # fmt: skip
            if (given := getattr(self, field)) not in choices:
                raise ValueError(f"evaluator.{field}={given}: must be one of {', '.join(choices)}")
        for field in ("projections", "batch_size"):
            if (number := getattr(self, field)) < 1:
                raise ValueError(f"evaluator.{field}={number}: must be at least 1")

    def made(self) -> Head:
        """Return a head that has learned nothing."""
        if self.head == "ncm":
            return NearestMean()
        ranpac = self.head == "ranpac"
        return Ridge(partial(projection, self.projections, self.seed) if ranpac else None)

    def task(self, transform: Any) -> "Task":
        """Open the task's images."""
        half = _half(self.train.open(transform, self.batch_size), "A")
        return Task(half, [*self.test.open(transform, self.batch_size)])

    def open(self, pair: ModelPair) -> Callable[[nn.Module], Scores]:
        """Return a function that scores a module on the task alone."""
        task = self.task(pair.transform)

        def score(module: nn.Module) -> Scores:
            head = self.made()
            head.add(*features(module, task.train))
            right = rightness(head, *features(module, task.test))
            name = f"{self.name}/accuracy"
            return Scores({name: float(right.mean())}, {}, {name: right})

        return score


def projection(count: int, seed: int, features: int) -> Tensor:
    """Return P (features, count) of standard normal numbers, RanPAC's random projection."""
    return Rng(seed, "random projection").normal(torch.empty(features, count))


@dataclass(frozen=True, eq=False)
class Task:
    """The images of one task, prepared: what the head may look at, and the test's."""

    train: Sequence[Batch]
    test: Sequence[Batch]


@dataclass(frozen=True, eq=False)
class Stream:
    """What came of a stream.

    Attributes:
        right: by (after which task, of which task), from 0, whether each test image was told right.
        count: of tasks.
    """

    right: Mapping[tuple[int, int], Tensor]
    count: int

    def accuracy(self, after: int, of: int) -> float:
        """A[after, of]."""
        return float(self.right[after, of].mean())

    def metrics(self) -> dict[str, float]:
        """Return accuracy, forgetting and backward transfer; of one task the accuracy alone."""
        last = self.count - 1
        means = [
            sum(self.accuracy(t, j) for j in range(t + 1)) / (t + 1) for t in range(self.count)
        ]
        found = {"accuracy": means[last], "incremental_accuracy": sum(means) / self.count}
        if last:
            end = [self.accuracy(last, j) for j in range(last)]
            best = [max(self.accuracy(t, j) for t in range(j, last)) for j in range(last)]
            first = [self.accuracy(j, j) for j in range(last)]
            found["forgetting"] = (sum(best) - sum(end)) / last
            found["backward_transfer"] = (sum(end) - sum(first)) / last
        return found

    def documents(self) -> dict[str, Tensor]:
        """Return for every test image whether it was told right: at the end, and after its task."""
        tasks = range(self.count)
        return {
            "accuracy": torch.cat([self.right[self.count - 1, j] for j in tasks]),
            "learned": torch.cat([self.right[j, j] for j in tasks]),
        }

    def matrix(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return A by the names of the tasks: after which, of which."""
        return {
            after: {of: self.accuracy(t, j) for j, of in enumerate(names[: t + 1])}
            for t, after in enumerate(names)
        }


def follow(
    tasks: Sequence[Task],
    backbones: Iterable[AbstractContextManager[nn.Module]],
    how: Continual,
) -> Stream:
    """Go through a stream, task by task; classes of two tasks are two, whatever their numbers.

    Args:
        tasks: in order.
        backbones: after each task, the module that holds the weights within it.
        how: head and prototypes.
    """
    right: dict[tuple[int, int], Tensor] = {}
    head = how.made()
    for t, backbone in enumerate(backbones):
        with backbone as module:
            if how.prototypes == "refreshed":
                head = how.made()
            fresh = range(t + 1) if how.prototypes == "refreshed" else [t]
            for j in fresh:
                x, labels = features(module, tasks[j].train)
                head.add(x, labels + j * APART)
            for j in range(t + 1):
                x, labels = features(module, tasks[j].test)
                right[t, j] = rightness(head, x, labels + j * APART)
    return Stream(right, len(tasks))


def rightness(head: Head, x: Tensor, labels: Tensor) -> Tensor:
    """Return for every image 1 where the head tells its class, else 0, in float64."""
    return (head.classify(x) == labels).double()


@torch.inference_mode()
def features(module: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the features of images before the classifier (n, d) in float64, and the labels (n,).

    Raises:
        ValueError: a module that is no classifier of timm, and names no `features`.
    """
    parameter = next(module.parameters())
    found, labels = [], []
    for x, y in batches:
        found.append(_of(module, x.to(parameter.device, parameter.dtype)).double().cpu())
        labels.append(y)
    return torch.cat(found), torch.cat(labels)


def _of(module: Any, x: Tensor) -> Tensor:
    if hasattr(module, "forward_head") and hasattr(module, "forward_features"):
        found: Tensor = module.forward_head(module.forward_features(x), pre_logits=True)
    elif hasattr(module, "features") and not isinstance(module.features, nn.Module):
        found = module.features(x)
    else:
        raise ValueError(
            f"evaluator=continual: {type(module).__name__} gives no features before its classifier;"
            " image models of timm and CLIP do"
        )
    return found


def _half(batches: Iterable[Batch], half: splits.Half) -> list[Batch]:
    """Return the images of one half."""
    return [*_kept(batches, half)]


def _kept(batches: Iterable[Batch], half: splits.Half) -> Iterator[Batch]:
    start = 0
    for x, y in batches:
        rows = [i - start for i in range(start, start + len(y)) if splits.half_of(i) == half]
        start += len(y)
        if rows:
            yield x[rows], y[rows]
