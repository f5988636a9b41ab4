"""One bit an entry, and the scales that entries share."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code, blank, integers
from deltalab.codes.raw import flat

_SLICE = 1 << 15
"""Entries at once, so that all stays in the cache."""


@dataclass(frozen=True, eq=False)
class Signs(Code):
    """D_hat = scale sign(D), sign(0) = +1: one scale a tensor, a row or a column.

    Arrays: `signs`, a set bit for every negative entry; `scale`, float32. Settings: `axis`,
    "tensor", "row" or "column"; tensors of more than two dimensions are read as (out, rest).

    >>> code = Signs.of_delta(torch.tensor([[1.0, -3.0], [2.0, -2.0]]), torch.tensor(2.0), "tensor")
    >>> code.decode(), code.bits.payload
    (tensor([[ 2., -2.],
            [ 2., -2.]]), 8)
    """

    kind: ClassVar[str] = "signs"
    payload: ClassVar[tuple[str, ...]] = ("signs",)

    @classmethod
    def of_delta(cls, delta: Tensor, scale: Tensor, axis: str) -> "Signs":
        """Return the code of a delta's signs.

        Args:
            delta: at least two dimensions.
            scale: one for the tensor, or for every row or column, in a shape that broadcasts.
            axis: "tensor", "row" or "column".
        """
        signs = integers.pack(flat(delta < 0), 1)
        return cls(tuple(delta.shape), {"signs": signs, "scale": flat(scale)}, {"axis": axis})

    @classmethod
    def outline(cls, shape: tuple[int, ...], axis: str) -> "Signs":
        """Return the code of a tensor of this shape without its numbers."""
        scales = {"tensor": 1, "row": shape[0], "column": prod(shape[1:])}[axis]
        arrays = {
            "signs": blank(integers.size(prod(shape), 1)),
            "scale": blank(scales, torch.float32),
        }
        return cls(shape, arrays, {"axis": axis})

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the scales with their signs."""
        scale = self._scale()
        signs = integers.unpack(self._array("signs"), 1, self.count).bool().reshape(self.shape)
        return torch.where(signs, -scale, scale)

    def onto(self, pre: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights as stored, some rows at a time so that all stays in the cache."""
        scale, device = self._scale(), pre.device
        if not bool((scale != 0).all()) or not self.count:
            return super().onto(pre, dtype)
        old = self._fits(pre).cpu()
        signs = integers.unpack(self._array("signs"), 1, self.count).view(torch.bool)
        out = torch.empty(self.shape, dtype=dtype)
        rows = max(1, _SLICE // max(1, self.count // self.shape[0]))
        by_row = scale.ndim > 0 and scale.shape[0] == self.shape[0] > 1
        for start in range(0, self.shape[0], rows):
            part = slice(start, start + rows)
            here = out[part]
            own = scale[part] if by_row else scale
            per = self.count // self.shape[0]
            negative = signs[start * per : start * per + here.numel()].reshape(here.shape)
            here.copy_(torch.where(negative, -own, own).add_(old[part].float()))
        return out.to(device)

    def is_exact(self, pre: Tensor, post: Tensor, delta: Tensor) -> bool:
        """It is unless some magnitude is the scale itself, or a scale is zero."""
        scale = self._scale().to(delta.device)
        if not bool((scale != 0).all()):
            return False
        return not bool((delta.abs() == scale).any())

    def _scale(self) -> Tensor:
        """Return the scales in a shape that broadcasts."""
        first, rest = self.shape[0], self.shape[1:]
        shapes = {"tensor": (), "row": (first, *[1] * len(rest)), "column": (1, *rest)}
        shape = shapes.get(axis := self._setting("axis", str))
        if shape is None:
            raise ValueError(f"code signs: axis={axis!r}, must be one of {', '.join(shapes)}")
        return self._array("scale", prod(shape)).float().reshape(shape)
