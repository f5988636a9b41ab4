"""BitDelta: one bit an entry and one scale a matrix (arXiv 2402.10193; arXiv 2410.13841, 7-9)."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.raw import Raw
from deltalab.codes.signs import Signs
from deltalab.edits import Edit, Unit, one_of, within
from deltalab.rng import Rng

_MAGNITUDES, _AXES = ("mean", "normal", "uniform"), ("tensor", "row", "column")
_BEST = ("best", "best_output")


@dataclass(frozen=True)
class BitDelta(Edit):
    """Replace every magnitude by the mean magnitude and keep the signs.

    D_hat = c mu sign(D) with mu = mean |D|, the scale of least squared error at c = 1, and
    sign(0) = +1 since one bit has no zero. The extensions of arXiv 2410.13841, Sec. 5.3: a
    multiple c of the mean; magnitudes drawn at random around c mu; one scale per row or column
    (arXiv 2512.19720). Tensors of more than two dimensions are read as (out, rest); those of fewer
    are returned as they are, for the method is defined on matrices.

    Args:
        multiple: c, at least 0.
        magnitudes: "mean" uses c mu itself; "normal" draws from N(c mu, (cv c mu)^2); "uniform"
            draws from the uniform distribution of the same mean and variance.
        cv: coefficient of variation of the drawn magnitudes, at least 0. At 1/sqrt(3) the uniform
            draw spans [0, 2 c mu].
        axis: the entries that share a scale: "tensor", "row" (one output) or "column" (one input);
            "best" is row or column, of which the squared error is less, and "best_output" the one
            of the three of least error of the layer's outputs, by the second moment H of its
            inputs: tr(E H E'), E = D_hat - D. A tensor that is no layer's weight has "best".

    Raises:
        ValueError: a field is out of range.

    >>> edit = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
    >>> edit(torch.tensor([[1.0, -3.0], [2.0, -2.0]]), rng=Rng(0, "w"))
    tensor([[ 2., -2.],
            [ 2., -2.]])
    """

    multiple: float
    magnitudes: str
    cv: float
    axis: str
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "axis"
    choices: ClassVar[tuple[str, ...]] = ("tensor", "row", "column")

    def __post_init__(self) -> None:
        within("multiple", self.multiple, "[0, inf)")
        one_of("magnitudes", self.magnitudes, _MAGNITUDES)
        within("cv", self.cv, "[0, inf)")
        one_of("axis", self.axis, (*_AXES, *_BEST))

    @property
    def axes(self) -> bool:
        """Where rows or columns share a scale."""
        return self.axis != "tensor"

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        """Row by row where each has a scale of its own."""
        return "row" if self.axis == "row" else "tensor"

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        """Where the axis does not depend on the data."""
        return self.axis not in _BEST

    @property
    def needs(self) -> tuple[str, ...]:
        """The inputs' second moments where the axis is chosen by them."""
        return ("rng", "gram") if self.axis == "best_output" else ("rng",)

    def __call__(self, delta: Tensor, *, rng: Rng, gram: Tensor | None = None) -> Tensor:
        """Return the signs times the scales."""
        if delta.ndim < 2 or delta.numel() == 0:
            return delta.clone()
        if self.axis in _BEST:
            return self.along(delta, gram)(delta, rng=rng)
        scale = self.multiple * mean_magnitude(delta, self.axis)
        if self.magnitudes == "normal":
            scale = scale * (1 + self.cv * rng.normal(delta))
        elif self.magnitudes == "uniform":
            scale = scale * (1 + self.cv * 12**0.5 * (rng.uniform(delta) - 0.5))
        return torch.where(delta < 0, -scale, scale)

    def encode(
        self, delta: Tensor, *, rng: Rng, gram: Tensor | None = None, post: Tensor | None = None
    ) -> Code | None:
        """Return signs and scales; magnitudes that are drawn, an ablation, have no code."""
        if self.magnitudes != "mean":
            return None
        if delta.ndim < 2 or delta.numel() == 0:
            return Raw.holding(delta, post)
        if self.axis in _BEST:
            return self.along(delta, gram).encode(delta, rng=rng)
        scale = self.multiple * mean_magnitude(delta, self.axis)
        return Signs.of_delta(delta, scale, self.axis)

    def outline(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        held: tuple[float, ...],
        *args: Any,
        **needs: Any,
    ) -> Code | None:
        """Return the code by the shape, where the axis does not depend on the data."""
        if self.magnitudes != "mean" or self.axis in _BEST:
            return None
        if len(shape) < 2 or not prod(shape):
            return Raw.outline(shape, dtype)
        return Signs.outline(shape, self.axis)

    def along(self, delta: Tensor, gram: Tensor | None) -> "BitDelta":
        """Return the edit with the axis that is best for a delta."""
        names = _AXES[1:] if gram is None else _AXES

        def error(axis: str) -> float:
            scale = self.multiple * mean_magnitude(delta, axis)
            off = (torch.where(delta < 0, -scale, scale) - delta).flatten(1).double()
            return float(
                off.square().sum() if gram is None else ((off @ gram.double()) * off).sum()
            )

        return replace(self, axis=min(names, key=error))


def mean_magnitude(delta: Tensor, axis: str) -> Tensor:
    """Return mean |D| over the entries that share a scale, in a shape that broadcasts to delta's.

    Added in float64: as exact as the result can hold, in whatever order.

    Args:
        delta: at least two dimensions, read as (out, rest).
        axis: "tensor", "row" or "column".

    >>> mean_magnitude(torch.tensor([[1.0, -3.0], [4.0, 4.0]]), "row")
    tensor([[2.],
            [4.]])
    """
    magnitude = delta.abs()
    if axis == "row":
        rows = magnitude.flatten(1).mean(1, dtype=torch.float64).float()
        return rows.reshape(-1, *[1] * (delta.ndim - 1))
    if axis == "column":
        return magnitude.mean(0, dtype=torch.float64).float().unsqueeze(0)
    mean: Tensor = magnitude.mean(dtype=torch.float64).float()
    return mean
