"""Square patches of a matrix, each in the frequency domain with its own number of bits."""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.integers import unpack
from deltalab.codes.rounding import levels, rounded, steps

RANGES, TRANSFORMS, FILLS = ("minmax", "absmax"), ("dct", "identity"), ("mean", "zero")


@dataclass(frozen=True, eq=False)
class Patches(Code):
    """Patches of p x p entries, their coefficients rounded to b_n bits, those of 0 bits filled.

    The tensor, read as (out, rest), is padded with zeros on the right and at the bottom. Ranges are
    float16 in units of `unit`, the largest of all.

    Arrays: `level`, which of the widths every patch has, packed, row by row; `q.b`, the integers of
    all patches of b bits; `range.b`, (patches, 2) with least and greatest coefficient or (patches,)
    with the step; `fill`, the means of the patches of 0 bits. Settings: `side`, p; `widths`, such
    as "2,0"; `transform`, `range`, `fill`; `unit`; `scale`, of the whole.
    """

    kind: ClassVar[str] = "patches"

    def is_payload(self, name: str) -> bool:
        """The integers."""
        return name.startswith("q.")

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the patches put together, and scaled."""
        side, transform = self._setting("side", int), self._setting("transform", str)
        rows, columns = self.shape[0], self.count // self.shape[0]
        down, across = -(-rows // side), -(-columns // side)
        widths = [int(width) for width in self._setting("widths", str).split(",")]
        place = unpack(self._array("level"), index_bits(len(widths)), down * across)
        found, unit = torch.zeros(down * across, side, side), self._setting("unit", float)
        for index, width in enumerate(widths):
            chosen = place == index
            count = int(chosen.sum())
            if not width:
                if self._setting("fill", str) == "mean":
                    found[chosen] = unit * self._array("fill", count).float()[:, None, None]
                continue
            integers = unpack(self._array(f"q.{width}"), width, count * side * side)
            span = unit * self._array(f"range.{width}").float()
            coefficients = valued(integers.reshape(count, -1), width, span)
            found[chosen] = inverse(coefficients.reshape(count, side, side), transform)
        whole = joined(found, down, across)[:rows, :columns]
        scale: float = self._setting("scale", float)
        return (scale * whole).reshape(self.shape)


def index_bits(count: int) -> int:
    """Return the bits that tell one of so many widths."""
    return max(1, math.ceil(math.log2(count)))


def cut(matrix: Tensor, side: int) -> Tensor:
    """Cut a matrix into patches, row by row, padded with zeros.

    >>> cut(torch.arange(6.0).reshape(2, 3), 2).tolist()
    [[[0.0, 1.0], [3.0, 4.0]], [[2.0, 0.0], [5.0, 0.0]]]
    """
    down, across = -(-matrix.shape[0] // side), -(-matrix.shape[1] // side)
    padded = matrix.new_zeros(down * side, across * side)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(down, side, across, side).transpose(1, 2).reshape(-1, side, side)


def joined(patches: Tensor, down: int, across: int) -> Tensor:
    """Put patches together, as `cut` has cut them."""
    side = patches.shape[-1]
    return patches.reshape(down, across, side, side).transpose(1, 2).reshape(down * side, -1)


@cache
def dct_matrix(side: int) -> Tensor:
    """Return the orthonormal DCT-II matrix C (p, p), float64: the transform of x is C x.

    >>> (dct_matrix(4) @ dct_matrix(4).T).allclose(torch.eye(4, dtype=torch.float64))
    True
    """
    place = torch.arange(side, dtype=torch.float64)
    found = torch.cos(math.pi / side * (place + 0.5) * place[:, None]) * math.sqrt(2 / side)
    found[0] /= math.sqrt(2)
    return found


def forward(patches: Tensor, transform: str) -> Tensor:
    """Return the coefficients of patches (n, p, p): C P C', or the entries themselves."""
    if transform == "identity":
        return patches
    basis = dct_matrix(patches.shape[-1]).to(patches)
    return basis @ patches @ basis.T


def inverse(coefficients: Tensor, transform: str) -> Tensor:
    """Return the patches of coefficients (n, p, p)."""
    if transform == "identity":
        return coefficients
    basis = dct_matrix(coefficients.shape[-1]).to(coefficients)
    return basis.T @ coefficients @ basis


def spans(flat: Tensor, width: int, kind: str) -> Tensor:
    """Return the range of every patch's coefficients (n, p^2).

    Returns:
        (n, 2), least and greatest, with "minmax"; (n,), the step of a grid that is symmetric about
        zero (`rounding`), with "absmax".
    """
    if kind == "minmax":
        return torch.stack([flat.amin(1), flat.amax(1)], 1)
    return steps(flat.T, torch.full((len(flat),), width, device=flat.device), "max")


def integers_of(flat: Tensor, width: int, span: Tensor) -> Tensor:
    """Return the integers of coefficients (n, p^2), given their ranges as stored."""
    if span.ndim == 1:
        return rounded(flat.T, torch.tensor(width, device=flat.device), span).T
    low, most = span[:, :1], (1 << width) - 1
    step = (span[:, 1:] - low) / most
    near = ((flat - low) / torch.where(step > 0, step, 1.0)).round()
    return near.clamp(0, most).to(torch.int32)


def valued(integers: Tensor, width: int, span: Tensor) -> Tensor:
    """Return the coefficients that integers (n, p^2) stand for."""
    if span.ndim == 1:
        return levels(integers, torch.tensor(width, device=integers.device)) * span[:, None]
    low, most = span[:, :1], (1 << width) - 1
    return low + integers.float() * ((span[:, 1:] - low) / most)
