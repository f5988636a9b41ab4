"""The same share for every tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deltalab.budgets import Budget, Tensors, check, in_bits, refused


@dataclass(frozen=True)
class Uniform(Budget):
    """Give every tensor the same share, the one of least error that the total allows.

    Without a total the edit's own setting: the result is that of no budget, to the bit.

    Args:
        total: null, bits a weight, or megabytes.
        unit: "bits" or "megabytes".

    Raises:
        ValueError: a field is out of range.

    >>> from deltalab.budgets import Choice
    >>> w = Tensors(10, choices=(Choice(None, 80, 0.1), Choice(2.0, 20, 1.0), Choice(1.0, 10, 4.0)))
    >>> Uniform(total=3.0, unit="bits")({"w": w}, "total"), Uniform(None, "bits")({"w": w}, "total")
    ({'w': 2.0}, {'w': None})
    """

    total: float | None
    unit: str
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check(self.total, self.unit)

    def wants(self, spends: str) -> tuple[str, ...]:
        """Return what choices take, where there is a total."""
        return () if self.total is None else ("choices",)

    def __call__(self, tensors: Mapping[str, Tensors], spends: str) -> dict[str, Any]:
        """Return the one share for all."""
        if self.total is None or not tensors:
            return dict.fromkeys(tensors)
        every = [one.choices for one in tensors.values()]
        total = in_bits(self.total, self.unit, tensors)
        sums = [
            (sum(c.error for c in column), sum(c.bits for c in column), column[0].share)
            for column in zip(*every, strict=True)
        ]
        fitting = [each for each in sums if each[1] <= total]
        if not fitting:
            raise refused(total, min(bits for _, bits, _ in sums), tensors)
        return dict.fromkeys(tensors, min(fitting, key=lambda each: each[:2])[2])
