"""Codes that are multiplied and added up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.nested import Nested, Sum


@dataclass(frozen=True, eq=False)
class Weighted(Nested):
    """sum_i w_i D_i, of codes that hold D_i; the settings `weight.i` are w_i.

    >>> import torch
    >>> from deltalab.codes.raw import Raw
    >>> one = Raw.holding(torch.ones(2), None)
    >>> Weighted.of_codes([one, one], [2.0, -0.5]).decode()
    tensor([1.5000, 1.5000])
    """

    kind: ClassVar[str] = "weighted"

    @classmethod
    def of_codes(cls, codes: Sequence[Code], weights: Sequence[float]) -> "Weighted":
        """Return the weighted sum of codes of one shape."""
        plain = Sum.of_codes(codes)
        told = {f"weight.{at}": float(weight) for at, weight in enumerate(weights)}
        return cls(plain.shape, plain.arrays, {**plain.settings, **told})

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the sum."""
        weights = [float(self._setting(f"weight.{at}", float)) for at in range(len(self.inner()))]
        first, *others = (
            weight * code.decode(pre) for weight, code in zip(weights, self.inner(), strict=True)
        )
        for other in others:
            first = first + other
        return first
