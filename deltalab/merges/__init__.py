"""Merges: one method a file, each a frozen dataclass that makes one delta of several, or one each.

`Merge` is the whole contract. A new method is two files: its class, and `conf/merge/<name>.yaml`
with its fields as keys, where alone the defaults stand. The contract tests find it by the latter.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

Merged = Tensor | list[Tensor]
Parts = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Makes of the deltas of one tensor what a weighted sum is taken of."""
Slopes = Callable[[Mapping[str, Sequence[float]], int, int, Parts], Mapping[str, Sequence[float]]]
"""Gives the slopes of the experts' mean entropy in the weights of that sum, by tensor, expert by
expert; called with the weights, a step, which says what examples are looked at, how many of every
expert, and the parts (`deltalab.apply.merging.Family`)."""
Learn = Callable[[Sequence[str], Sequence[str], Slopes], Mapping[str, list[float]]]
"""Learns the weights of all tensors at once, from their names, the experts' and the slopes: what a
merge hands to its need `entropy`, which returns the weights of the tensor at hand."""


@runtime_checkable
class Merge(Protocol):
    """A pure map of one tensor's deltas, one of every expert; every merge derives from this class.

    Attributes:
        unit: "entry" where every entry is merged by itself, so that parts of a tensor, flat, give
            the parts of the result; "tensor" where it needs all of it.
        each: whether it gives one delta for every expert, in their order, in place of one for all.
        version: as for `deltalab.edits.Edit`.
        alone: settings under which one expert alone comes back as it is; None where there are none.

    >>> class First(Merge):
    ...     version: ClassVar[int] = 1
    ...
    ...     def __call__(self, deltas: Sequence[Tensor]) -> Tensor:
    ...         return deltas[0].clone()
    >>> First().needs, First().each
    ((), False)
    """

    unit: ClassVar[Literal["entry", "tensor"]] = "tensor"
    each: ClassVar[bool] = False
    version: ClassVar[int] = 1
    alone: ClassVar[Mapping[str, Any] | None] = {}

    def __call__(self, deltas: Sequence[Tensor], *args: Any, **needs: Any) -> Merged:
        """Return the merged delta, a new tensor, or one for every expert where `each` says so.

        What a merge needs beside the deltas it declares as keyword-only arguments, of the names in
        `deltalab.apply.merging.NEEDS`.

        Args:
            deltas: the edited deltas of every expert, float32, of one shape; not to be changed.
            args: none.
            needs: what was declared, on the deltas' device.

        Returns:
            float32, of their shape and device; zero where all deltas are zero throughout.
        """
        ...

    def kept(self, deltas: Sequence[Tensor], **needs: Any) -> float:
        """Return how many numbers are kept of one tensor, of all experts together, beside the base.

        Separate experts keep all entries of every delta; one model for all keeps those of one.
        """
        return float(deltas[0].numel())

    @property
    def needs(self) -> tuple[str, ...]:
        """What it asks for beside the deltas."""
        parameters = inspect.signature(type(self).__call__).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    def check(self, experts: Sequence[str]) -> None:
        """Raise `ValueError` where the merge cannot be of these experts."""

    def restricted(self, experts: Sequence[str]) -> "Merge":
        """Return the merge as it is for some of the experts: with the weights of these alone."""
        weights: Mapping[str, Any] | None = getattr(self, "weights", None)
        if weights is None:
            return self
        kept = {name: weight for name, weight in weights.items() if name in experts}
        return dataclasses.replace(self, weights=kept)  # type: ignore[type-var]


def weights_of(
    weights: Mapping[str, float] | None, experts: Sequence[str], default: float
) -> list[float]:
    """Return every expert's weight, in order.

    Raises:
        ValueError: weights that do not match the experts, or are no numbers.

    >>> weights_of({"b": 2, "a": 1}, ["a", "b"], 0.5), weights_of(None, ["a"], 0.5)
    ([1.0, 2.0], [0.5])
    """
    if weights is None:
        return [default] * len(experts)
    if missing := [name for name in experts if name not in weights]:
        raise ValueError(f"merge.weights: has none for expert {', '.join(missing)}")
    if unknown := [str(name) for name in weights if name not in experts]:
        raise ValueError(
            f"merge.weights: {', '.join(unknown)} is no expert, which are {', '.join(experts)}"
        )
    for name, value in weights.items():
        number(f"weights.{name}", value)
    return [float(weights[name]) for name in experts]


def check_shares(weights: Mapping[str, float] | None) -> None:
    """Raise `ValueError` unless weights are none, or can be the shares of an average."""
    for name, value in (weights or {}).items():
        number(f"weights.{name}", value, lambda x: x >= 0, "0 or more")
    if weights and not any(value > 0 for value in weights.values()):
        raise ValueError(f"merge.weights={dict(weights)}: one must be above 0")


def number(
    field: str,
    value: object,
    ok: Callable[[float], bool] = lambda _: True,
    wanted: str = "a number",
) -> None:
    """Raise `ValueError` naming the field unless the value is a finite number that will do.

    >>> number("keep", 2, lambda x: 0 <= x <= 1, "in [0, 1]")
    Traceback (most recent call last):
    ValueError: merge.keep=2: must be in [0, 1]
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not (plain and math.isfinite(value) and ok(value)):  # type: ignore[arg-type]
        raise ValueError(f"merge.{field}={value}: must be {wanted}")


def one_of(field: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `ValueError` naming the field unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"merge.{field}={value}: must be one of {', '.join(map(str, choices))}")


def mean(deltas: Sequence[Tensor]) -> Tensor:
    """Return the plain mean of deltas, rounded once."""
    total = deltas[0].double()
    for each in deltas[1:]:
        total = total + each
    return (total / len(deltas)).float()


def total(deltas: Sequence[Tensor]) -> Tensor:
    """Return the sum of deltas, rounded once."""
    found = deltas[0].double()
    for each in deltas[1:]:
        found = found + each
    return found.float()
