"""One bit an entry, and the scales that entries share."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code, packing
from deltalab.codes.raw import flat


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
        signs = packing.pack(flat(delta < 0), 1)
        return cls(tuple(delta.shape), {"signs": signs, "scale": flat(scale)}, {"axis": axis})

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the scales with their signs."""
        first, rest = self.shape[0], self.shape[1:]
        shapes = {"tensor": (), "row": (first, *[1] * len(rest)), "column": (1, *rest)}
        shape = shapes.get(axis := self._setting("axis", str))
        if shape is None:
            raise ValueError(f"code signs: axis={axis!r}, must be one of {', '.join(shapes)}")
        scale = self._array("scale", prod(shape)).float().reshape(shape)
        signs = packing.unpack(self._array("signs"), 1, self.count).bool().reshape(self.shape)
        return torch.where(signs, -scale, scale)
