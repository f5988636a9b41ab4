"""Heads of a stream of tasks: classifiers on features, learned from sums over the training images.

Each keeps sums alone, so that tasks can come one by one in any order and no image is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

HEADS = ("ncm", "ridge", "ranpac")
RIDGES = tuple(10.0**power for power in range(-8, 9))
"""The strengths that are tried, as in RanPAC's code."""
HELD_OUT = 5
"""Every so many images of a task one is held out to choose the strength by."""


class Head(Protocol):
    """A classifier of features (n, d) in float64."""

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Learn from images: features (n, d), labels (n,)."""
        ...

    def classify(self, features: Tensor) -> Tensor:
        """Return the labels (n,) of features (n, d), among the classes seen so far."""
        ...


@dataclass(eq=False)
class NearestMean:
    """The class whose mean feature has the largest cosine with the image's, <f, m_c> / |f| |m_c|.

    >>> head = NearestMean()
    >>> head.add(torch.eye(2).double(), torch.tensor([7, 3]))
    >>> head.classify(torch.tensor([[2.0, 1.0]]).double())
    tensor([7])
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add to the classes' sums and counts."""
        for label in sorted(set(labels.tolist())):
            own = features[labels == label]
            self.sums[label] = self.sums.get(label, 0.0) + own.sum(0)
            self.counts[label] = self.counts.get(label, 0) + len(own)

    @property
    def means(self) -> dict[int, Tensor]:
        """The mean feature of every class, by label."""
        return {label: self.sums[label] / self.counts[label] for label in sorted(self.sums)}

    def classify(self, features: Tensor) -> Tensor:
        """Return the labels of the nearest means."""
        means = self.means
        directions = torch.nn.functional.normalize(torch.stack([*means.values()]), dim=1)
        return torch.tensor([*means])[(features @ directions.T).argmax(1)]


@dataclass(eq=False)
class Sums:
    """What least squares needs of features h (n, M) with one-hot labels Y (n, C).

    Attributes:
        gram: G = sum of h h', (M, M).
        classes: the columns of Q = H'Y by label, each the sum of h over a class, (M,).
        counts: images by label.
    """

    gram: Tensor | None = None
    classes: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add images."""
        product = features.T @ features
        self.gram = product if self.gram is None else self.gram + product
        for label in sorted(set(labels.tolist())):
            own = features[labels == label]
            self.classes[label] = self.classes.get(label, 0.0) + own.sum(0)
            self.counts[label] = self.counts.get(label, 0) + len(own)

    def columns(self, labels: list[int]) -> Tensor:
        """Return Q (M, C) for these classes."""
        assert self.gram is not None
        none = self.gram.new_zeros(len(self.gram))
        return torch.stack([self.classes.get(label, none) for label in labels], dim=1)

    def error(self, weights: Tensor, labels: list[int]) -> float:
        """Return sum |h'W - y|^2 = tr W'GW - 2 tr W'Q + n of a solution W (M, C)."""
        assert self.gram is not None
        fitted = (weights * (self.gram @ weights)).sum() - 2 * (
            weights * self.columns(labels)
        ).sum()
        return float(fitted) + sum(self.counts.values())


@dataclass(eq=False)
class Ridge:
    """Least squares of one-hot labels with a ridge: argmax_c of h'W with W = (G + r I)^-1 Q.

    With random features it is RanPAC's head (McDonnell et al., NeurIPS 2023; arXiv 2307.02251):
    h = max(0, f P) with P (d, M) of standard normal numbers, drawn once. Without, h = f. G = H'H
    and Q = H'Y are sums over images, so that the head after several tasks is that of all of them.

    The strength r is that of `RIDGES` with the least squared error on every fifth image of every
    task, when fitted to the others; W is then fitted to all.

    Args:
        draw: gives P (d, M) of d, always the same; None: the features as they are.

    >>> head = Ridge()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 5).double()
    >>> head.add(x, torch.tensor([4, 2] * 5))
    >>> head.classify(torch.tensor([[3.0, 1.0]]).double())
    tensor([4])
    """

    draw: Callable[[int], Tensor] | None = None
    fitted: Sums = field(default_factory=Sums)
    held: Sums = field(default_factory=Sums)
    strength: float | None = None
    _weights: Tensor | None = None

    def lifted(self, features: Tensor) -> Tensor:
        """Return h (n, M) of features (n, d)."""
        if self.draw is None:
            return features
        return (features @ self.draw(features.shape[1]).double()).relu()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a task's images to the sums, every fifth to those held out."""
        out = torch.arange(len(labels)) % HELD_OUT == HELD_OUT - 1
        if not out.any():
            raise ValueError(
                f"evaluator.head: a ridge takes {HELD_OUT} training images of a task, to choose its"
                f" strength by one of them; here are {len(labels)}"
            )
        lifted, self._weights = self.lifted(features), None
        self.fitted.add(lifted[~out], labels[~out])
        self.held.add(lifted[out], labels[out])

    def solved(self) -> tuple[list[int], Tensor]:
        """Return the labels (C) and W (M, C)."""
        labels = sorted({*self.fitted.classes, *self.held.classes})
        if self._weights is None:
            assert self.fitted.gram is not None
            assert self.held.gram is not None
            values, vectors = torch.linalg.eigh(self.fitted.gram)
            turned = vectors.T @ self.fitted.columns(labels)
            errors = {}
            for strength in RIDGES:
                weights = vectors @ (turned / (values.clamp(min=0) + strength)[:, None])
                errors[strength] = self.held.error(weights, labels)
            self.strength = min(errors, key=errors.__getitem__)
            gram = self.fitted.gram + self.held.gram
            gram.diagonal().add_(self.strength)
            both = self.fitted.columns(labels) + self.held.columns(labels)
            self._weights = torch.linalg.solve(gram, both)
        return labels, self._weights

    def classify(self, features: Tensor) -> Tensor:
        """Return the labels with the largest output."""
        labels, weights = self.solved()
        return torch.tensor(labels)[(self.lifted(features) @ weights).argmax(1)]
