"""Few different magnitudes: their table, an index of some bits an entry, and the signs."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code, blank, integers
from deltalab.codes.raw import flat

MOST = 1 << 16
"""Magnitudes that a table may have."""


@dataclass(frozen=True, eq=False)
class Grid(Code):
    """D_hat = sign levels[index], with the index in as few bits as the table needs.

    Arrays: `levels`, float32, ascending; `index`, packed, where there are two levels or more;
    `signs`, a set bit for every negative entry.

    >>> code = Grid.of_delta(torch.tensor([[2.0, -2.0, 11.0, -11.0]]), torch.tensor([2.0, 11.0]))
    >>> code.decode(), code.bits.payload
    (tensor([[  2.,  -2.,  11., -11.]]), 16)
    """

    kind: ClassVar[str] = "grid"
    payload: ClassVar[tuple[str, ...]] = ("index", "signs")

    @classmethod
    def of_delta(cls, hat: Tensor, levels: Tensor) -> "Grid":
        """Return the code of an edited delta.

        Args:
            hat: every magnitude is one of the levels.
            levels: ascending, at most `MOST`.
        """
        values = flat(hat)
        arrays = {"levels": flat(levels), "signs": integers.pack(values.signbit(), 1)}
        if width := _width(levels.numel()):
            place = torch.searchsorted(arrays["levels"], values.abs(), out_int32=True)
            arrays["index"] = integers.pack(place, width)
        return cls(tuple(hat.shape), arrays, {})

    @classmethod
    def outline(cls, shape: tuple[int, ...], levels: int) -> "Grid":
        """Return the code of so many levels without its numbers."""
        count = prod(shape)
        arrays = {
            "levels": blank(levels, torch.float32),
            "signs": blank(integers.size(count, 1)),
        }
        if width := _width(levels):
            arrays["index"] = blank(integers.size(count, width))
        return cls(shape, arrays, {})

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Look up the levels."""
        levels = self._array("levels").float()
        if not 1 <= levels.numel() <= MOST:
            raise ValueError(f"code grid: {levels.numel()} levels, must be from 1 to {MOST}")
        signs = integers.unpack(self._array("signs"), 1, self.count).bool()
        width = _width(levels.numel())
        if ("index" in self.arrays) != bool(width):
            raise ValueError(
                "code grid: the index is missing, or must be: one goes with two levels or more"
            )
        if width:
            index = integers.unpack(self._array("index"), width, self.count).int()
            if self.count and int(index.max()) >= levels.numel():
                raise ValueError(f"code grid: level {int(index.max())} of {levels.numel()}")
            values = levels[index]
        else:
            values = levels.expand(self.count)
        return torch.where(signs, -values, values).reshape(self.shape)


def _width(levels: int) -> int:
    return (levels - 1).bit_length()
