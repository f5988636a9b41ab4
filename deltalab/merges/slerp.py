"""Spherical interpolation of two experts, as mergekit has it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltalab.merges import Merge, number, one_of

NEAR = 0.9995
"""The cosine beyond which two tensors are interpolated along the straight line."""


@dataclass(frozen=True)
class Slerp(Merge):
    """Go from one expert to another along the arc between them, in every tensor.

    With O the angle between the two tensors a and b, each read as one vector: sin((1 - t) O)/sin O
    a + sin(t O)/sin O b; (1 - t) a + t b where |cos O| > 0.9995, or one of them is zero. Equal
    norms are kept, where the straight line shortens them.

    Args:
        t: where on the way, in [0, 1]; 0 is the first expert, 1 the second.
        of: "weights", as mergekit and others interpolate, or "delta", the experts' deltas.

    Raises:
        ValueError: a field is out of range.

    >>> import torch
    >>> one, other, base = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2)
    >>> Slerp(t=0.5, of="delta")([one, other], base=base)
    tensor([0.7071, 0.7071])
    """

    t: float
    of: str
    version: ClassVar[int] = 1
    alone: ClassVar[Mapping[str, Any] | None] = None

    def __post_init__(self) -> None:
        number("t", self.t, lambda x: 0 <= x <= 1, "in [0, 1]")
        one_of("of", self.of, ("weights", "delta"))

    def check(self, experts: Sequence[str]) -> None:
        """Raise `ValueError` unless there are two experts."""
        if len(experts) != 2:
            raise ValueError(f"merge=slerp: is of two experts, model.experts has {len(experts)}")

    def __call__(self, deltas: Sequence[Tensor], *, base: Tensor) -> Tensor:
        """Return the delta of the interpolated weights, computed in float64."""
        one, other = (delta.double() for delta in deltas)
        if self.of == "weights":
            one, other = one + base.double(), other + base.double()
        norms = float(one.norm()), float(other.norm())
        cosine = float((one * other).sum()) / (norms[0] * norms[1]) if all(norms) else 1.0
        shares = 1 - self.t, self.t
        if abs(cosine) <= NEAR:
            angle = math.acos(cosine)
            near = math.sin((1 - self.t) * angle), math.sin(self.t * angle)
            shares = near[0] / math.sin(angle), near[1] / math.sin(angle)
        found = shares[0] * one + shares[1] * other
        return (found - base.double() if self.of == "weights" else found).float()
