"""Budgets: one rule a file, each a frozen dataclass that spreads a total over a model's tensors.

What an edit can spend is one of its settings, which it names itself (`Edit.spends`): bits a weight,
a rank, a drop rate. A rule is told a few numbers of every tensor and gives each a value of that
setting, its share. `Budget` is the whole contract; nothing here sees a tensor or a model. `numel`
and bits count the tensors that the edit touches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

UNITS = ("bits", "megabytes")
"""What a total may be in: bits a weight, of those that are touched, or 10^6 bytes in all."""


@dataclass(frozen=True)
class Choice:
    """One value of what an edit can spend, for one tensor.

    Attributes:
        share: the value; None: that of the edit's own setting.
        bits: of the code, description included.
        error: ||D_hat - D||^2.
        slope: <g, D_hat - D> with a loss gradient g; 0 where it is not asked for.
    """

    share: Any
    bits: int
    error: float
    slope: float = 0.0


@dataclass(frozen=True)
class Tensors:
    """What a rule may know of one tensor; what it does not ask for is empty.

    Attributes:
        entries: how many there are.
        own: the edit's own setting.
        std: standard deviation of the delta.
        energies: squared singular values, descending.
        choices: the edit's own first.
        limits: least and greatest share.
        sensitivity: loss change for each unit of squared error.
    """

    entries: int
    own: Any = None
    std: float = 0.0
    energies: "np.ndarray[Any, Any]" = field(default_factory=lambda: np.zeros(0))
    choices: tuple[Choice, ...] = ()
    limits: tuple[float, float] = (0.0, 0.0)
    sensitivity: float = 1.0


@runtime_checkable
class Budget(Protocol):
    """A pure map of what is known of all tensors to the share of each.

    Attributes:
        version: as for `deltalab.edits.Edit`.
        spends: the settings of edits that it can set; empty: any.
    """

    version: ClassVar[int] = 1
    spends: ClassVar[tuple[str, ...]] = ()

    def __call__(self, tensors: Mapping[str, Tensors], spends: str) -> dict[str, Any]:
        """Return the share of every tensor; None leaves the edit's own setting.

        Args:
            tensors: what is known of each, by name.
            spends: the edit's setting.

        Raises:
            ValueError: a total that is less than the least possible.
        """
        ...

    def wants(self, spends: str) -> tuple[str, ...]:
        """Return what it must be told: of `std`, `energies`, `choices`, `sensitivity`."""
        return ()


def check(total: Any, unit: Any) -> None:
    """Raise `ValueError` unless a total is null or a number above 0, in one of `UNITS`.

    >>> check(-1.0, "bits")
    Traceback (most recent call last):
    ValueError: budget.total=-1.0: must be above 0, or null: what the edit's own settings take
    """
    if unit not in UNITS:
        raise ValueError(f"budget.unit={unit}: must be one of {', '.join(UNITS)}")
    number = isinstance(total, int | float) and not isinstance(total, bool)
    if total is not None and not (number and 0 < total < float("inf")):
        raise ValueError(
            f"budget.total={total}: must be above 0, or null: what the edit's own settings take"
        )


def in_bits(total: float | None, unit: str, tensors: Mapping[str, Tensors]) -> int:
    """Return a total in bits; with None what the edit's own setting takes in all.

    >>> in_bits(2.0, "bits", {"w": Tensors(10)}), in_bits(1.0, "megabytes", {})
    (20, 8000000)
    """
    if total is None:
        return sum(one.choices[0].bits for one in tensors.values())
    if unit == "megabytes":
        return int(total * 8e6)
    return int(total * sum(one.entries for one in tensors.values()))


def refused(total: int, least: int, tensors: Mapping[str, Tensors]) -> ValueError:
    """Return what is said of a total that is less than the least possible, both in bits."""
    entries = max(1, sum(one.entries for one in tensors.values()))
    return ValueError(
        f"budget.total: {total / entries:.4g} bits a weight are {total / 8e6:.4g} MB, the least"
        f" that this edit can take is {least / entries:.4g} ({least / 8e6:.4g} MB)"
    )
