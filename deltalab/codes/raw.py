"""A delta as it is, and one that is zero."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code, blank, signed_zeros
from deltalab.linear.delta import difference


@dataclass(frozen=True, eq=False)
class Raw(Code):
    """All entries: of the delta, or W_post's own, in their own type, which give it exactly.

    Arrays: `values`, flat. Settings: `holds`, "delta" or "weights".

    >>> code = Raw.holding(torch.tensor([0.5, 1.0]), torch.tensor([2.5, 3.0], dtype=torch.float16))
    >>> code.bits.payload, code.decode(torch.tensor([2.0, 2.0])).tolist()
    (32, [0.5, 1.0])
    """

    kind: ClassVar[str] = "raw"
    payload: ClassVar[tuple[str, ...]] = ("values",)

    @classmethod
    def holding(cls, delta: Tensor, post: Tensor | None) -> "Raw":
        """Return the code of a delta; of W_post's entries where they are given."""
        held = delta if post is None else post
        holds = "delta" if post is None else "weights"
        return cls(tuple(delta.shape), {"values": flat(held)}, {"holds": holds})

    @classmethod
    def outline(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "Raw":
        """Return the code of W_post's entries without them."""
        return cls(shape, {"values": blank(prod(shape), dtype)}, {"holds": "weights"})

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the delta."""
        values = self._array("values", self.count).reshape(self.shape)
        if self.settings.get("holds") != "weights":
            return values.float()
        return difference(self._fits(pre).cpu(), values)

    def is_exact(self, pre: Tensor, post: Tensor, delta: Tensor) -> bool:
        """It is where W_post itself is held."""
        return self.settings.get("holds") == "weights"

    def onto(self, pre: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W_post itself where the code has it."""
        if self.settings.get("holds") != "weights":
            return super().onto(pre, dtype)
        self._fits(pre)
        return self._array("values", self.count).reshape(self.shape).to(dtype)


@dataclass(frozen=True, eq=False)
class Zero(Code):
    """A delta of zeros: nothing is held.

    >>> Zero((2, 1), {}, {}).onto(torch.ones(2, 1), torch.float16).flatten().tolist()
    [1.0, 1.0]
    """

    kind: ClassVar[str] = "zero"

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return zeros."""
        return torch.zeros(self.shape)

    def is_exact(self, pre: Tensor, post: Tensor, delta: Tensor) -> bool:
        """It is but for zeros of another sign."""
        return not signed_zeros(pre, post)


def flat(tensor: Tensor) -> Tensor:
    """Return a tensor's entries as a code holds them: flat, contiguous, on the CPU."""
    return tensor.detach().reshape(-1).contiguous().cpu()
