"""Integers packed into bits, the first in the highest bits of the first byte, as `np.packbits`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 16
"""Integers at once, so that all stays in the cache; a multiple of eight."""


def size(count: int, width: int) -> int:
    """Return the bytes that `count` integers of `width` bits take.

    >>> size(9, 3), size(3, 12)
    (4, 5)
    """
    if width > 8:
        return count + size(count, width - 8)
    return (count * width + 7) // 8


def pack(integers: Tensor, width: int) -> Tensor:
    """Pack integers of so many bits, without gaps; beyond eight bits first all high parts.

    Args:
        integers: of any integer or boolean dtype and any shape, in [0, 2^width).
        width: bits, from 1 to 16.

    Returns:
        uint8, flat.

    Raises:
        ValueError: another width.

    >>> pack(torch.tensor([1, 2, 3]), 4).tolist(), pack(torch.tensor([True, False]), 1).tolist()
    ([18, 48], [128])
    """
    _check(width)
    flat = integers.reshape(-1).cpu().numpy()
    if width > 8:
        low = torch.from_numpy((flat & 255).astype(np.uint8))
        return torch.cat([pack(torch.from_numpy(flat.astype(np.int32) >> 8), width - 8), low])
    if width == 1:
        return torch.from_numpy(np.packbits(flat.astype(bool, copy=False)))
    if width == 8:
        return torch.from_numpy(flat.astype(np.uint8))
    out = np.empty(-(-len(flat) // 8) * width, dtype=np.uint8)
    for start in range(0, len(flat), _BLOCK):
        part = flat[start : start + _BLOCK]
        groups = np.zeros((-(-len(part) // 8), 8), dtype=np.uint64)
        groups.reshape(-1)[: len(part)] = part
        word = groups[:, 0].copy()
        for place in range(1, 8):
            word <<= np.uint64(width)
            word |= groups[:, place]
        word <<= np.uint64(64 - 8 * width)
        octets = word.byteswap().view(np.uint8).reshape(-1, 8)[:, :width]
        begin = start // 8 * width
        out[begin : begin + octets.size] = octets.reshape(-1)
    return torch.from_numpy(out[: size(len(flat), width)])


def unpack(octets: Tensor, width: int, count: int) -> Tensor:
    """Return integers that `pack` has packed.

    Args:
        octets: uint8, flat.
        width: bits, from 1 to 16.
        count: how many there are.

    Returns:
        uint8, flat; int32 beyond eight bits.

    Raises:
        ValueError: another width, or bytes that are too many or too few.

    >>> unpack(torch.tensor([18, 48], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    _check(width)
    if octets.numel() != size(count, width):
        raise ValueError(
            f"{octets.numel()} bytes for {count} integers of {width} bits,"
            f" must be {size(count, width)}"
        )
    flat = octets.numpy()
    if width > 8:
        high = unpack(octets[: size(count, width - 8)], width - 8, count)
        return (high.int() << 8) | octets[size(count, width - 8) :].int()
    if width == 1:
        return torch.from_numpy(np.unpackbits(flat, count=count))
    if width == 8:
        return octets.clone()
    out = np.empty(-(-count // 8) * 8, dtype=np.uint8)
    mask = np.uint64((1 << width) - 1)
    for start in range(0, count, _BLOCK):
        groups = -(-min(_BLOCK, count - start) // 8)
        part = flat[start // 8 * width : (start // 8 + groups) * width]
        octet = np.zeros((groups, 8), dtype=np.uint8)
        _fill(octet, part, width)
        word = octet.view(np.uint64).byteswap().reshape(-1)
        into = out[start : start + 8 * groups].reshape(-1, 8)
        for place in range(8):
            into[:, place] = (word >> np.uint64(64 - width * (place + 1))) & mask
    return torch.from_numpy(out[:count])


def _fill(octet: "np.ndarray[Any, Any]", part: "np.ndarray[Any, Any]", width: int) -> None:
    """Put `width` bytes into every row; the last row may lack some."""
    whole = len(part) // width
    octet[:whole, :width] = part[: whole * width].reshape(-1, width)
    octet[whole:, : len(part) - whole * width] = part[whole * width :]


def _check(width: int) -> None:
    if not 1 <= width <= 16:
        raise ValueError(f"width={width}: must be from 1 to 16")
