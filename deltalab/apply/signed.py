"""BitDelta of a whole matrix in one compiled pass: its code, and the code put onto the base."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.signs import Signs
from deltalab.edits import Edit
from deltalab.edits.bitdelta import BitDelta
from deltalab.kernels import signs

PIECE = signs.PIECE
"""Entries to put at once: base and result stay in the cache."""
_LARGE, _WIDE = 1e25, 1e9
"""Below these no weight and no scale can overflow as it is stored."""


def fits(edit: Edit, shape: tuple[int, ...]) -> bool:
    """Whether the code of a delta of this shape can be had in one pass: one scale, no draws."""
    plain = isinstance(edit, BitDelta) and (edit.axis, edit.magnitudes) == ("tensor", "mean")
    return plain and type(edit) is BitDelta and len(shape) >= 2


def coded(
    edit: Edit, shape: tuple[int, ...], dtypes: Sequence[torch.dtype | None], sides: signs.Sides
) -> Code | None:
    """Return the code of a pair's delta, or None where the edit must say what it is.

    The bits are those of `BitDelta.encode`, and decoded onto W_pre they are those of the edit: a
    pair of entries that are not finite, or very large, a scale of zero, and one that some |D| is
    equal to are left to the edit.

    Args:
        edit: any.
        shape: of the delta.
        dtypes: of W_pre and W_post.
        sides: gives pieces of them, flat, as for `signs.survey`.
    """
    count, dtype = prod(shape), dtypes[0]
    if not fits(edit, shape) or not count or dtype is None or not signs.takes(*dtypes):
        return None
    assert isinstance(edit, BitDelta)
    found = signs.survey(count, dtype, sides)
    if not (found.pre < _LARGE and found.post < torch.inf):
        return None
    mean = torch.tensor(found.total, dtype=torch.float64).div_(count).float()
    scale = edit.multiple * mean
    if not 0 < float(scale) < _WIDE or signs.meets(count, dtype, sides, found.held, float(scale)):
        return None
    return Signs(shape, {"signs": found.signs, "scale": scale.reshape(1)}, {"axis": "tensor"})


def decoded(code: Code, start: int, pre: Tensor, out: Tensor) -> bool:
    """Write a part of a code's weights as stored; return whether it was done.

    Args:
        code: any.
        start: the part's first entry, a multiple of eight.
        pre: the part of W_pre, flat.
        out: of its size; both contiguous.
    """
    scale, bits = code.arrays.get("scale"), code.arrays.get("signs")
    if not isinstance(code, Signs) or code.settings != {"axis": "tensor"} or start % 8:
        return False
    if scale is None or bits is None or scale.numel() != 1 or bits.dtype != torch.uint8:
        return False
    value = float(scale)
    if 8 * bits.numel() < start + pre.numel() or not 0 < abs(value) < torch.inf:
        return False
    return signs.takes(pre.dtype, out.dtype) and signs.onto(pre, bits[start // 8 :], value, out)
