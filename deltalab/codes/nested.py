"""Codes made of codes: sums, the transpose of a matrix, and entries put right at the end.

The arrays and settings of an inner code have its number before their names, as `0.signs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from deltalab.codes import Code, Setting
from deltalab.codes.raw import flat

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Nested(Code):
    """A code that has other codes inside."""

    def inner(self) -> list[Code]:
        """Return the codes inside.

        Raises:
            ValueError: one that is none.
        """
        found: list[Code] = []
        while (kind := self.settings.get(f"{len(found)}.kind")) is not None:
            lead = f"{len(found)}."
            arrays, settings = _under(lead, self.arrays), _under(lead, self.settings)
            del settings["kind"]
            found.append(Code.of(str(kind), self._inner_shape(), arrays, settings))
        if not found:
            raise ValueError(f"code {self.kind}: has no code inside")
        return found

    def is_payload(self, name: str) -> bool:
        """Whether the inner code holds values there."""
        number, _, own = name.partition(".")
        return bool(own) and self.inner()[int(number)].is_payload(own)

    def _inner_shape(self) -> tuple[int, ...]:
        return self.shape

    def _saved(self) -> float:
        return sum(code._saved() for code in self.inner())


def _under(lead: str, held: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(lead): v for name, v in held.items() if name.startswith(lead)}


def _joined(codes: Sequence[Code]) -> tuple[dict[str, Tensor], dict[str, Setting]]:
    """Return the arrays and settings of codes with their numbers before them."""
    arrays: dict[str, Tensor] = {}
    settings: dict[str, Setting] = {}
    for number, code in enumerate(codes):
        arrays |= {f"{number}.{name}": array for name, array in code.arrays.items()}
        settings |= {f"{number}.{name}": v for name, v in code.settings.items()}
        settings[f"{number}.kind"] = code.kind
    return arrays, settings


@dataclass(frozen=True, eq=False)
class Sum(Nested):
    """The sum of what several codes hold, added from the first to the last.

    >>> from deltalab.codes.raw import Raw
    >>> one = Raw.holding(torch.ones(2), None)
    >>> Sum.of_codes([one, one]).decode()
    tensor([2., 2.])
    """

    kind: ClassVar[str] = "sum"

    @classmethod
    def of_codes(cls, codes: Sequence[Code]) -> "Sum":
        """Return the sum of codes of one shape."""
        return cls(codes[0].shape, *_joined(codes))

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the sum."""
        first, *others = (code.decode(pre) for code in self.inner())
        for other in others:
            first = first + other
        return first


@dataclass(frozen=True, eq=False)
class Transposed(Nested):
    """The transpose of what a code holds: of an edit that has seen a matrix as (out, in).

    >>> from deltalab.codes.raw import Raw
    >>> Transposed.of_code(Raw.holding(torch.ones(1, 2), None)).decode().shape
    torch.Size([2, 1])
    """

    kind: ClassVar[str] = "transposed"

    @classmethod
    def of_code(cls, code: Code) -> "Transposed":
        """Return the transpose of a matrix's code."""
        *lead, rows, columns = code.shape
        return cls((*lead, columns, rows), *_joined([code]))

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the transpose of what is inside."""
        return self.inner()[0].decode(None if pre is None else pre.mT).mT.contiguous()

    def onto(self, pre: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights as stored."""
        return self.inner()[0].onto(self._fits(pre).mT, dtype).mT.contiguous()

    def _inner_shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.shape
        return (*lead, columns, rows)


@dataclass(frozen=True, eq=False)
class Patched(Nested):
    """A code, and stored entries that it alone would give other bits.

    Adding a delta back rounds. Where an edit left an entry's delta alone, W_post's own bits are
    stored (`apply.editing.stored`), and a code that holds no entries of W_post cannot know them.

    Arrays beside the inner code's: `at`, flat indices, and `put`, what is stored there.

    >>> from deltalab.codes.raw import Zero
    >>> pre = torch.zeros(2)
    >>> code = Patched.exact(Zero((2,), {}, {}), pre, torch.tensor([0.0, 3.0]))
    >>> code.kind, code.onto(pre, torch.float32).tolist()
    ('patched', [0.0, 3.0])
    """

    kind: ClassVar[str] = "patched"

    @classmethod
    def exact(cls, code: Code, pre: Tensor, stored: Tensor) -> Code:
        """Return a code that gives these stored weights to the bit: itself, where it does.

        Args:
            code: of the edited delta.
            pre: the base's tensor.
            stored: the weights that an edit stores.
        """
        made, wanted = flat(code.onto(pre.cpu(), stored.dtype)), flat(stored)
        word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.dtype.itemsize]
        at = (made.view(word) != wanted.view(word)).nonzero().reshape(-1)
        if not len(at):
            return code
        arrays, settings = _joined([code])
        short = at.int() if code.count < 1 << 31 else at
        return cls(code.shape, {**arrays, "at": short, "put": wanted[at]}, settings)

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return what is inside: what is put right is no more than rounding."""
        return self.inner()[0].decode(pre)

    def onto(self, pre: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights as stored, put right."""
        out = self.inner()[0].onto(pre, dtype).contiguous()
        at = self._array("at").long()
        if len(at) and not 0 <= int(at.min()) <= int(at.max()) < self.count:
            raise ValueError(f"code patched: an entry beyond the {self.count} of the tensor")
        out.view(-1)[at.to(out.device)] = self._array("put", len(at)).to(out)
        return out

    def narrowed(self, dtype: torch.dtype = torch.float16) -> Any:
        """Raise `ValueError`: what is put right is right for this code alone."""
        raise ValueError("code patched: cannot be narrowed; narrow the code inside, then patch")
