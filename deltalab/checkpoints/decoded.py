"""Quantised weights decoded when asked for: 8-bit floats with scales, and packed integers.

Two layouts are read (`Scaled`, `Packed`), which hold most of what is published in 8 and 4 bits for
GPUs of today: the blocks of DeepSeek and Qwen, and compressed-tensors. Decoded weights are
bfloat16, as the models that were quantised were; what is lost in the codes is lost.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from deltalab.checkpoints import quantised
from deltalab.weights.headers import plain
from deltalab.weights.mapping import Checkpoint, Meta

_FLOATS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
_ACTIVATIONS = re.compile(
    r"(^|[._])(input|output|activation|[qkv]|kv)_(global_)?(scale|zero_point)(_inv)?$"
)
"""Scales of what flows between layers, which weights do not need."""


@dataclass(frozen=True)
class Scaled:
    """W = codes * scale, each scale for a block of entries.

    The blocks are those that the configuration gives (`weight_block_size`), the last of a side cut
    off where it is smaller; else of equal size.

    Args:
        codes: name of the 8-bit floats, of the shape of W.
        scale: name of the scales: one, or as many along every dimension as there are blocks.
        shape: of W.
        block: sizes of a block along every dimension.
    """

    codes: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the file that the weight is made of."""
        return self.codes, self.scale

    def rows(self, source: Checkpoint, start: int, stop: int) -> Tensor:
        """Return the rows `start` to `stop` in bfloat16."""
        scale = source[self.scale].float()
        if scale.numel() > 1:
            for dim, size in enumerate(self.block):
                first, last = (start, stop) if dim == 0 else (0, self.shape[dim])
                scale = scale.index_select(dim, torch.arange(first, last) // size)
        return (source[self.codes][start:stop].float() * scale).bfloat16()


@dataclass(frozen=True)
class Packed:
    """W = (codes - zero) * scale, the codes as many to a 32-bit integer as fit, lowest bits first.

    Codes and zeros are stored with 2^(bits - 1) added, along rows and along columns.

    Args:
        codes: name of the packed integers, (rows, ceil(columns * bits / 32)).
        scale: name of the scales, (rows, groups).
        shape: (rows, columns) of W.
        bits: 4 or 8.
        group: columns of a group.
        zero: name of the zeros, (rows, groups) or packed (ceil(rows * bits / 32), groups); None for
            zeros of 0.
        order: name of every column's group; None where groups are runs of columns.
    """

    codes: str
    scale: str
    shape: tuple[int, ...]
    bits: int
    group: int
    zero: str | None
    order: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the file that the weight is made of."""
        size = f"{self.codes.removesuffix('_packed')}_shape"
        return tuple(n for n in (self.codes, self.scale, size, self.zero, self.order) if n)

    def rows(self, source: Checkpoint, start: int, stop: int) -> Tensor:
        """Return the rows `start` to `stop` in bfloat16."""
        columns = torch.arange(self.shape[1])
        group = columns // self.group if self.order is None else source[self.order].long()
        codes = self._unpacked(source[self.codes][start:stop])[:, columns]
        if self.zero is not None:
            zero = source[self.zero]
            plain = self._unpacked(zero.T).T if zero.dtype == torch.int32 else zero.float()
            codes = codes - plain[start:stop][:, group]
        return (codes * source[self.scale][start:stop].float()[:, group]).bfloat16()

    def _unpacked(self, words: Tensor) -> Tensor:
        """Return (n, m) words as (n, m * 32 / bits) codes, in float32."""
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (words[..., None] >> shifts) & ((1 << self.bits) - 1)
        return codes.flatten(1).float() - (1 << (self.bits - 1))


Code = Scaled | Packed


class Dequantised(Checkpoint):
    """A checkpoint whose quantised weights are decoded as they are asked for.

    Args:
        source: the checkpoint as it is stored.

    Raises:
        ValueError: it holds codes of another layout, naming the first.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.path, self._source = source.path, source
        self._codes = dict(_codes(source))
        used = {name for code in self._codes.values() for name in code.names}
        kept = [n for n in source if n not in used and not _ACTIVATIONS.search(n)]
        if left := quantised.coded(source, kept):
            raise ValueError(
                f"{left} is none that can be decoded: 8-bit floats with weight_scale or"
                " weight_scale_inv, or weight_packed of 4 or 8 bits"
            )
        places = {name: source.shards[name] for name in kept}
        self.shards = places | {n: source.shards[code.codes] for n, code in self._codes.items()}

    def __getitem__(self, name: str) -> Tensor:
        if (code := self._codes.get(name)) is None:
            return self._source[name]
        return code.rows(self._source, 0, code.shape[0])

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries `start` to `stop` of a flat tensor, decoding the rows they lie in."""
        if (code := self._codes.get(name)) is None:
            return self._source[name].reshape(-1)[start:stop]
        width = max(1, prod(code.shape[1:]))
        first = start // width
        rows = code.rows(self._source, first, -(-stop // width))
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def meta(self, name: str) -> Meta:
        """Return a tensor's shape and dtype, decoded, without decoding it."""
        code = self._codes.get(name)
        return self._source.meta(name) if code is None else Meta(code.shape, torch.bfloat16)


def _codes(source: Checkpoint) -> Iterator[tuple[str, Code]]:
    """Yield every weight that is stored as codes in one of the two layouts, by its name."""
    directory = source.path if source.path.is_dir() else source.path.parent
    said = _Said.of(directory)
    for name in source:
        if source.dtype(name) in _FLOATS and (scale := _scale_of(source, name)) is not None:
            yield name, _scaled(source, name, scale, said)
        elif name.endswith("weight_packed") and source.dtype(name) == "I32":
            yield name.removesuffix("_packed"), _packed(source, name, said)


@dataclass(frozen=True)
class _Said:
    """What a configuration says of the codes: sizes of blocks, bits, and columns of a group."""

    blocks: set[tuple[int, int]]
    bits: set[int]
    groups: set[int]

    @classmethod
    def of(cls, directory: Path) -> "_Said":
        found = cls(set(), set(), set())
        for given in quantised.given(directory):
            schemes = given.get("config_groups")
            schemes = list(schemes.values()) if isinstance(schemes, Mapping) else []
            for scheme in [given, *(s.get("weights") for s in schemes if isinstance(s, Mapping))]:
                if isinstance(scheme, Mapping):
                    block = scheme.get("weight_block_size") or scheme.get("block_structure")
                    if isinstance(block, list) and len(block) == 2 and all(map(_size, block)):
                        found.blocks.add((block[0], block[1]))
                    found.bits.update(n for n in [scheme.get("num_bits")] if _size(n))
                    found.groups.update(n for n in [scheme.get("group_size")] if _size(n))
        return found


def _size(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _scale_of(source: Checkpoint, name: str) -> str | None:
    given = (f"{name}_scale_inv", f"{name}_scale")
    return next((n for n in given if n in source and source.dtype(n) in _SCALES), None)


def _scaled(source: Checkpoint, name: str, scale: str, said: _Said) -> Scaled:
    shape, grid = source.shape(name), source.shape(scale)
    if prod(grid) == 1:
        return Scaled(name, scale, shape, shape)
    if len(grid) == len(shape) > 1 and all(grid):
        equal = tuple(-(-size // count) for size, count in zip(shape, grid, strict=True))
        for block in ((*equal[:-2], *sides) for sides in said.blocks):
            if grid == tuple(-(-size // each) for size, each in zip(shape, block, strict=True)):
                return Scaled(name, scale, shape, block)
        if all(size == each * count for size, each, count in zip(shape, equal, grid, strict=True)):
            return Scaled(name, scale, shape, equal)
    raise _unfit(scale, grid, name, shape)


def _packed(source: Checkpoint, name: str, said: _Said) -> Packed:
    stem = name.removesuffix("_packed")
    scale, size = f"{stem}_scale", f"{stem}_shape"
    for needed in (scale, size):
        if needed not in source:
            raise ValueError(f"tensor {plain(name[:100])!r} lacks {plain(needed[:100])!r}")
    shape, grid = tuple(int(n) for n in source[size].reshape(-1)), source.shape(scale)
    if (
        len(shape) != 2
        or len(grid) != 2
        or grid[0] != shape[0]
        or not all(n > 0 for n in grid + shape)
    ):
        raise _unfit(scale, grid, name, shape)
    words = {bits: -(-shape[1] * bits // 32) for bits in (4, 8)}
    bits = [b for b in words if source.shape(name) == (shape[0], words[b])]
    if len(bits) > 1:  # as of a few columns
        bits = [b for b in bits if b in said.bits]
    sizes = [n for n in (*said.groups, max(1, shape[1] // grid[1])) if -(-shape[1] // n) == grid[1]]
    if len(bits) != 1 or not sizes:
        raise _unfit(name, source.shape(name), scale, grid)
    zero, order = (n if n in source else None for n in (f"{stem}_zero_point", f"{stem}_g_idx"))
    whole = {"I32": (-(-shape[0] * bits[0] // 32), grid[1]), "I8": grid}
    if zero and source.shape(zero) != whole.get(source.dtype(zero)):
        raise _unfit(zero, source.shape(zero), scale, grid)
    if order:
        groups = source[order]
        if groups.shape != shape[1:] or not -1 <= int(groups.min()) <= int(groups.max()) < grid[1]:
            raise _unfit(order, tuple(groups.shape), scale, grid)
        order = order if int(groups.min()) >= 0 else None  # -1 where none was given
    return Packed(name, scale, shape, bits[0], sizes[0], zero, order)


def _unfit(name: str, shape: tuple[int, ...], other: str, its: tuple[int, ...]) -> ValueError:
    one, two = (plain(n[:100]) for n in (name, other))
    return ValueError(f"tensor {one!r} of shape {shape} does not fit {two!r} of {its}")
