"""RegMean and what is of its form: the weights that come nearest to all experts' outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.merges import Merge, mean, number, one_of, total


@dataclass(frozen=True)
class Regmean(Merge):
    """Minimise sum_t ||(D - D_t) X_t||^2 over every matrix, in closed form.

    D = R + (sum_t (D_t - R) G_t) (sum_t G_t + ridge g I)^+, g the mean of the diagonal of sum_t
    G_t; directions that no gram has are those of R. With the gram of an expert's inputs, G_t =
    X_t'X_t / n, that is RegMean (arXiv 2212.09849); with that of its delta, G_t = D_t'D_t, and
    normalise=trace it is the optimum of WUDI-Merging (arXiv 2503.08099), which needs no data.
    Tensors of one dimension, and those without a gram, are averaged.

    Args:
        gram: "inputs", of the layer's inputs on the expert's calibration data, or "delta".
        normalise: "none", or "trace" to divide every gram by its trace, that experts count alike.
        off_diagonal: what entries of the grams off the diagonal are multiplied by, in [0, 1];
            RegMean's paper takes 0.9 for inputs.
        ridge: how strongly the result is drawn to R, at least 0.
        towards: R: the "mean" of the deltas, or their "sum".

    Raises:
        ValueError: a field is out of range.

    >>> merge = Regmean("inputs", normalise="none", off_diagonal=1.0, ridge=0.0, towards="mean")
    >>> grams = [torch.eye(2), 3 * torch.eye(2)]
    >>> merge([torch.tensor([[4.0, 4.0]]), torch.tensor([[0.0, 0.0]])], gram=grams)
    tensor([[1., 1.]])
    """

    gram: str
    normalise: str
    off_diagonal: float
    ridge: float
    towards: str
    version: ClassVar[int] = 1
    alone: ClassVar[Mapping[str, Any] | None] = {"ridge": 0.0}

    def __post_init__(self) -> None:
        one_of("gram", self.gram, ("inputs", "delta"))
        one_of("normalise", self.normalise, ("none", "trace"))
        one_of("towards", self.towards, ("mean", "sum"))
        number("off_diagonal", self.off_diagonal, lambda x: 0 <= x <= 1, "in [0, 1]")
        number("ridge", self.ridge, lambda x: x >= 0, "0 or more")

    @property
    def needs(self) -> tuple[str, ...]:
        """The grams of the inputs, unless the deltas' own are taken."""
        return ("gram",) if self.gram == "inputs" else ()

    def __call__(
        self, deltas: Sequence[Tensor], *, gram: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Return the merged delta, computed in float64."""
        matrix = deltas[0].ndim > 1 and bool(deltas[0].numel())
        if not matrix or (gram is not None and any(each is None for each in gram)):
            return mean(deltas)
        wide = [delta.flatten(1).double() for delta in deltas]
        if gram is None:
            held, eps = [delta.T @ delta for delta in wide], torch.finfo(torch.float64).eps
        else:
            held = [each.double() for each in gram if each is not None]
            eps = max(torch.finfo(each.dtype).eps for each in gram if each is not None)
        grams = [self._prepared(each) for each in held]
        rest = (mean if self.towards == "mean" else total)(deltas).flatten(1).double()
        pull = sum(
            ((each - rest) @ own for each, own in zip(wide, grams, strict=True)),
            torch.zeros_like(rest),
        )
        whole = sum(grams, torch.zeros_like(grams[0]))
        values, vectors = torch.linalg.eigh(whole)
        least = values[-1].clamp(min=0) * len(values) * eps
        moved = values + self.ridge * whole.diagonal().mean()
        inverse = torch.where(values > least, 1 / moved, 0.0)
        found: Tensor = rest + (pull @ vectors * inverse) @ vectors.T
        return found.float().reshape(deltas[0].shape)

    def _prepared(self, gram: Tensor) -> Tensor:
        diagonal = torch.diag(gram.diagonal())
        made = gram if self.off_diagonal == 1 else gram.lerp(diagonal, 1 - self.off_diagonal)
        trace = gram.trace()
        return made / trace if self.normalise == "trace" and trace > 0 else made
