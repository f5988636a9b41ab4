"""Codes: edited deltas as a file holds them, in true dtypes and packed bits, one kind a file.

`Code` is the whole contract. An edit's `encode` makes one, `decode` gives the edited delta back,
`onto` the weights as they are stored. What a kind needs beside its arrays are a few plain settings,
so that a code is written as tensors and text alone, and reading one runs nothing that the file
brings. `integers` holds what packs integers into bits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

_SLICE = 1 << 15
Setting = int | float | str
KINDS = {
    "raw": "raw",
    "zero": "raw",
    "kept": "kept",
    "indexed": "indexed",
    "signs": "signs",
    "grid": "grid",
    "lowrank": "lowrank",
    "sum": "nested",
    "transposed": "nested",
    "patched": "nested",
    "weighted": "weighted",
    "factors": "factors",
    "patches": "patches",
    "levelled": "levelled",
}
"""All kinds, each with the module of this room that has its class; nothing else is ever loaded."""
_DTYPES = {
    "F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""The dtypes that arrays may have, by their names in safetensors headers."""


class Bits(NamedTuple):
    """What a code takes, in bits; each the sum over what is really stored.

    Attributes:
        payload: of the arrays that hold values.
        metadata: of the other arrays (indices, scales, ranges) and of the description.
        bound: of both, were the positions of kept entries entropy coded: N H2(q) for q N of N.
            Told beside, never instead.
    """

    payload: int
    metadata: int
    bound: float

    @property
    def total(self) -> int:
        """Payload and metadata."""
        return self.payload + self.metadata

    def __add__(self, other: Any) -> "Bits":
        return Bits(*(one + more for one, more in zip(self, other, strict=True)))


@dataclass(frozen=True, eq=False)
class Code:
    """One tensor's edited delta, packed.

    A kind is a subclass with a `kind` of its own in `KINDS`, that says how its arrays are decoded
    and which of them are payload.

    Args:
        shape: of the delta.
        arrays: by name, which has no "/"; contiguous, on the CPU, of dtypes in `NAMES`.
        settings: small plain values, by name; not nested.

    Raises:
        ValueError: arrays or settings of another type.

    >>> from deltalab.codes.raw import Zero
    >>> Code.of("zero", (2,), {}, {}).decode(), Zero((2,), {}, {}).bits.payload
    (tensor([0., 0.]), 0)
    """

    shape: tuple[int, ...]
    arrays: dict[str, Tensor]
    settings: dict[str, Setting]
    kind: ClassVar[str]
    payload: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if "/" in name or array.dtype not in NAMES or not array.is_contiguous():
                raise ValueError(f"code {self.kind}: array {name!r} of {array.dtype} has no place")
        for key, value in self.settings.items():
            if not isinstance(value, int | float | str):
                raise ValueError(f"code {self.kind}: setting {key}={value!r} is no plain value")

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the edited delta, float32, of the code's shape, on the CPU.

        Args:
            pre: the base's tensor; only a code that holds W_post's own entries asks for it.

        Raises:
            ValueError: the arrays do not fit together, or `pre` is missing or of another shape.
        """
        raise NotImplementedError

    def onto(self, pre: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W_pre + D_hat as it is stored, exactly W_pre where D_hat is zero.

        Args:
            pre: the base's tensor, of the code's shape.
            dtype: of the result.
        """
        self._fits(pre)
        hat = self.decode(pre)
        moved = (pre.float() + hat).to(dtype)
        return torch.where(hat == 0, pre.to(dtype), moved)

    def _fits(self, pre: Tensor | None) -> Tensor:
        if pre is None:
            raise ValueError(f"code {self.kind}: holds the tuned model's entries; give the base's")
        if tuple(pre.shape) != self.shape:
            raise ValueError(
                f"code {self.kind}: is of shape {self.shape}, the base's tensor {tuple(pre.shape)}"
            )
        return pre

    def is_exact(self, pre: Tensor, post: Tensor, delta: Tensor) -> bool:
        """Whether `onto` is sure to give the bits that the edit stores (`apply.editing.stored`).

        Cheaper to tell than to store both ways. False where that is not sure.

        Args:
            pre: the base's tensor.
            post: the tuned one.
            delta: their difference.
        """
        return False

    def narrowed(self, dtype: torch.dtype = torch.float16) -> "Code":
        """Return the code with every floating-point array in a narrower type.

        Raises:
            ValueError: a number that the type cannot hold.
        """
        arrays = {}
        for name, array in self.arrays.items():
            arrays[name] = array
            if array.is_floating_point():
                arrays[name] = array.to(dtype)
                if not bool(arrays[name].isfinite().all()):
                    most = torch.finfo(dtype).max
                    raise ValueError(f"code {self.kind}: numbers in {name!r} above {most:g}")
        return replace(self, arrays=arrays)

    @property
    def described(self) -> dict[str, Any]:
        """The description that stands beside the arrays: ready for JSON, `Code.of` reads it."""
        return {"kind": self.kind, "shape": list(self.shape), **self.settings}

    @property
    def bits(self) -> Bits:
        """What it takes: its arrays, its description and a line for every array."""
        lines = {n: [NAMES[a.dtype], list(a.shape)] for n, a in self.arrays.items()}
        text = json.dumps([self.described, lines], separators=(",", ":"))
        sizes = {name: 8 * a.numel() * a.element_size() for name, a in self.arrays.items()}
        payload = sum(size for name, size in sizes.items() if self.is_payload(name))
        metadata = sum(sizes.values()) - payload + 8 * len(text.encode())
        return Bits(payload, metadata, payload + metadata - self._saved())

    def is_payload(self, name: str) -> bool:
        """Whether an array holds values."""
        return name in self.payload

    def _saved(self) -> float:
        """Return the bits that entropy coding would save."""
        return 0.0

    @property
    def count(self) -> int:
        """How many entries the delta has."""
        return prod(self.shape)

    @staticmethod
    def of(
        kind: str,
        shape: tuple[int, ...],
        arrays: Mapping[str, Tensor],
        settings: Mapping[str, Setting],
    ) -> "Code":
        """Return a code of a kind by its name.

        Raises:
            ValueError: no such kind, or arrays or settings that none has.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
        module = import_module(f"deltalab.codes.{KINDS[kind]}")
        chosen = next(c for c in vars(module).values() if isinstance(c, type) and _is_kind(c, kind))
        made: Code = chosen(tuple(shape), dict(arrays), dict(settings))
        return made

    def _array(self, name: str, count: int | None = None) -> Tensor:
        """Return an array, of `count` numbers if given.

        Raises:
            ValueError: it is missing or of another size.
        """
        found = self.arrays.get(name)
        if found is None or (count is not None and found.numel() != count):
            has = "missing" if found is None else f"of {found.numel()} numbers, must have {count}"
            raise ValueError(f"code {self.kind}: array {name!r} is {has}")
        return found

    def _setting(self, name: str, kind: type) -> Any:
        """Return a setting of a type.

        Raises:
            ValueError: it is missing or of another type.
        """
        value = self.settings.get(name)
        if kind is float and isinstance(value, int):
            return float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"code {self.kind}: setting {name}={value!r}, must be {kind.__name__}")
        return value


def blank(count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return a flat array of a code that is told without its numbers: on the meta device.

    >>> blank(3).numel(), blank(3).device.type
    (3, 'meta')
    """
    return torch.empty(count, dtype=dtype, device="meta")


def signed_zeros(pre: Tensor, post: Tensor) -> bool:
    """Whether some entry is zero in both, where an edit may store either's sign.

    >>> signed_zeros(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 0.0]))
    True
    """
    if pre.dtype != post.dtype or pre.device.type != "cpu":
        return bool(((pre == 0) & (post == 0)).any())
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[pre.dtype.itemsize]
    one, other = (side.contiguous().reshape(-1).view(word).numpy() for side in (pre, post))
    parts = (slice(at, at + _SLICE) for at in range(0, len(one), _SLICE))
    most = torch.iinfo(word).max  # all but the sign
    return any(not bool(((one[part] | other[part]) & most).all()) for part in parts)


def _is_kind(found: type, kind: str) -> bool:
    return issubclass(found, Code) and getattr(found, "kind", None) == kind
