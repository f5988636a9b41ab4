"""Accuracy of an image classifier, as ImageNet reports it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.data.images import Images
from deltalab.evaluators.scores import Scores
from deltalab.weights.mapping import ModelPair

log = logging.getLogger(__name__)
_SPARE = (
    "%d classes in the data, the model has %d outputs: class i is taken for output i unless"
    " data.class_map says otherwise"
)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy and cross-entropy on labelled images.

    Args:
        data: the images, normally a test split that nothing was chosen on.
        name: prefix of the metrics, `<name>/accuracy`.
        batch_size: images per forward pass; has no effect on the result beyond rounding.
        per_class: also report the accuracy of every class, `<name>/accuracy/<class index>`.
    """

    data: Images
    name: str
    batch_size: int = 250
    per_class: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"evaluator.batch_size={self.batch_size}: must be at least 1")

    def open(self, pair: ModelPair) -> Callable[[nn.Module], Scores]:
        """Return a function that scores a module on the images."""
        batches = self.data.open(pair.transform, self.batch_size)
        told: list[bool] = []

        def score(module: nn.Module) -> Scores:
            parameter = next(module.parameters())
            ranks, losses, labels = [], [], []
            with torch.inference_mode():
                for x, y in batches:
                    logits = module(x.to(parameter.device, parameter.dtype)).float().cpu()
                    check_labels(y, logits)
                    if batches.classes not in (None, logits.shape[1]) and not told:
                        told.append(True)
                        log.warning(_SPARE, batches.classes, logits.shape[1])
                    ranks.append(rank_of_label(logits, y))
                    losses.append(F.cross_entropy(logits, y, reduction="none"))
                    labels.append(y)
            return self._scores(torch.cat(ranks), torch.cat(losses).double(), torch.cat(labels))

        return score

    def _scores(self, rank: Tensor, loss: Tensor, label: Tensor) -> Scores:
        metrics = {
            f"{self.name}/accuracy": float((rank < 1).double().mean()),
            f"{self.name}/accuracy_top5": float((rank < 5).double().mean()),
            f"{self.name}/loss": float(loss.mean()),
        }
        if self.per_class:
            for c in sorted(set(label.tolist())):
                correct = (rank[label == c] < 1).double().mean()
                metrics[f"{self.name}/accuracy/{c}"] = float(correct)
        right = {f"{self.name}/accuracy": (rank < 1).double()}
        return Scores(metrics, {self.name: loss}, right)


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many outputs beat the right one; equal outputs before it count as beating it.

    >>> rank_of_label(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([2]))
    tensor([1])
    """
    right = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    return ((logits > right) | ((logits == right) & earlier)).sum(1)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise `ValueError` where a label has no output of the model."""
    if (largest := int(labels.max())) >= logits.shape[1] or int(labels.min()) < 0:
        raise ValueError(
            f"label {largest} is out of range: the model has {logits.shape[1]} outputs"
            " (data.class_map can renumber classes)"
        )
