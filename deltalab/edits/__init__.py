"""Edits: one method a file, each a frozen dataclass that maps a delta to an edited delta.

`Edit` is the whole contract. A new method is two files: its class, and `conf/edit/<name>.yaml` with
its fields as keys, where alone the defaults stand. The contract tests find it by the latter.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from deltalab.codes import Code

Unit = Literal["entry", "row", "tensor"]


class Survival(NamedTuple):
    """How likely entries of a delta stay other than zero, every entry drawn by itself.

    Attributes:
        one: that an entry stays.
        two: that it stays in both of two experts' deltas: one^2 where they are drawn independently.
    """

    one: float
    two: float


@dataclass(frozen=True)
class Line:
    """A family of edits, W(s) = W(0) + s * direction, and one edit's place in it.

    Attributes:
        family: names the line among all lines of a pair, an objective, a selection and a seed.
        at: the coordinate s of the edit.
        low: least coordinate of the family, at most 0.
        high: greatest coordinate of the family, at least 0.
        most: how many evaluations the line may cost, beside the gradient at W_post.
    """

    family: str
    at: float
    low: float
    high: float
    most: int


class Moments(NamedTuple):
    """Mean m and variance v of x, where the shift's entries are E_i = D_i x_i, x_i independent.

    Attributes:
        mean: m, relative to the delta.
        variance: v, likewise: the "editing intensity".
    """

    mean: float
    variance: float


@runtime_checkable
class Edit(Protocol):
    """A pure map of one tensor's delta; every edit derives from this class.

    What is not given below has the value that it has here. Where the fields decide, a property
    takes the place of a class attribute.

    Attributes:
        unit: how much of a tensor an entry of the result depends on: the same "entry" of the
            inputs alone; the same "row", of the tensor read as (out, rest); or the whole "tensor".
            The first two run in slices, so that memory stays bounded.
        fuses: whether it is made of plain tensor operations without a branch on the data, so that
            `kernels` can write it in C as one pass over memory. Edits of unit "entry" fuse in any
            case.
        axes: whether it matters which axis of a matrix holds the outputs of its layer, and which
            the inputs: such edits see every matrix as (out, in), also those that a file has the
            other way round. Not for edits of unit "entry"; for others unless they say so.
        version: enters the key of every point; to be raised whenever the same settings come to
            give other weights, so that what was recorded before is not taken for it. A number in
            the class's own body, for it is read from the source too.
        whole_model: whether it needs the deltas of the whole model as they are given, and so can
            only come first in a chain.
        spends: the field that a budget may set tensor by tensor (`deltalab.budgets`); None: none.
        choices: values of that field that a budget chooses from where it names none.

    >>> class Half(Edit):
    ...     version: ClassVar[int] = 1
    ...
    ...     def __call__(self, delta: Tensor, *, rng: Any) -> Tensor:
    ...         return delta / 2
    >>> Half().needs, Half().unit, Half().line()
    (('rng',), 'tensor', None)
    """

    unit: ClassVar[Unit] = "tensor"
    fuses: ClassVar[bool] = False
    version: ClassVar[int] = 1
    whole_model: ClassVar[bool] = False
    spends: ClassVar[str | None] = None
    choices: ClassVar[tuple[Any, ...]] = ()

    def __call__(self, delta: Tensor, *args: Any, **needs: Any) -> Tensor:
        """Return the edited delta, a new tensor; the same settings and needs give the same bits.

        What an edit needs beside the delta it declares as keyword-only arguments.

        Args:
            delta: W_post - W_pre, float32, any shape and strides; not to be changed.
            args: none; declares no more than that subclasses name what they need.
            needs: what was declared, on the delta's device.

        Returns:
            float32, of the delta's shape and device; zero where the delta is zero throughout.
        """
        ...

    @property
    def axes(self) -> bool:
        """Whether rows mean something else than columns."""
        return self.unit != "entry"

    @property
    def needs(self) -> tuple[str, ...]:
        """What it asks for beside the delta, of the names in `extras.NEEDS`."""
        return _asked(type(self).__call__)

    def line(self) -> Line | None:
        """Return the straight line through W_post that its shift shares with other edits' shifts.

        Their terms then come from shared slopes (`lines`). The shift must be `at` times a direction
        that depends on nothing but family, pair, selection and seed.
        """
        return None

    def moments(self) -> Moments | None:
        """Return the moments from which the closed form predicts the change (`prediction`).

        None where the entries of the shift are no independent multiples of the delta's.
        """
        return None

    def survival(self) -> Survival | None:
        """Return how likely an entry stays other than zero; None where entries are not drawn so.

        Two experts' draws are independent of each other unless it says otherwise.
        """
        return None

    def among(self, place: int, count: int) -> "Edit | None":
        """Return the edit as it is for one of several experts that draw the same random numbers.

        Args:
            place: the expert's, from 0.
            count: of experts.

        Returns:
            None where every expert is to have random numbers of its own, and the edit is the same.

        Raises:
            ValueError: it cannot be of so many experts.
        """
        return None

    def encode(self, delta: Tensor, *args: Any, **needs: Any) -> Code | None:
        """Return the packed form of the edited delta, exactly what a file will hold.

        What the call returns has the bits of `encode(...).decode()`, or gives the same bits once it
        is stored. None where there is no such form: an edit that leaves as many different numbers
        as there are entries.

        Args:
            delta: as for the call.
            args: none.
            needs: as for the call, and `post`: W_post, whose own entries a code may hold instead of
                those of the delta, for in their own type they are smaller and exact; None where
                there are none that belong to the delta.
        """
        return None

    def held(self, delta: Tensor, *args: Any, **needs: Any) -> Tensor | None:
        """Return which entries the code holds, so that its size is told without building it.

        Asked of edits that run in slices or compiled, beside the call; None where the size does
        not depend on it.

        Args:
            delta: as for the call.
            args: none.
            needs: as for the call.

        Returns:
            Of the delta's shape: boolean where it counts how many there are, int8 where it counts
            what lies between them too.
        """
        return None

    def outline(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        held: tuple[float, ...],
        *args: Any,
        **needs: Any,
    ) -> Code | None:
        """Return the code without its numbers, on the meta device; None where that is not known.

        Its bits are exactly those of what `encode` returns.

        Args:
            shape: of the delta.
            dtype: of W_post, which is given to `encode`.
            held: what `held` adds up to over all entries: one number for a boolean tensor, those
                of `codes.indexed.spread` for one of int8, none for None.
            args: none.
            needs: as for the call.
        """
        return None

    def outlined(
        self, delta: Tensor, dtype: torch.dtype, *args: Any, **needs: Any
    ) -> tuple[Tensor, Code | None]:
        """Return the edited delta, and its code without numbers where the call finds it anyway.

        Asked instead of the call, of edits that see the whole tensor.

        Args:
            delta: as for the call.
            dtype: of W_post, which is given to `encode`.
            args: none.
            needs: as for the call.
        """
        return self(delta, **needs), self.outline(tuple(delta.shape), dtype, (), **needs)

    def with_share(self, share: Any) -> "Edit":
        """Return the edit of a tensor whose `spends` a budget has set."""
        assert self.spends is not None, f"{type(self).__name__} has nothing to spend"
        made: Edit = replace(self, **{self.spends: share})  # type: ignore[type-var]
        return made


@lru_cache(maxsize=256)
def _asked(call: Callable[..., Tensor]) -> tuple[str, ...]:
    """Return the names of keyword-only arguments; reading them takes as long as a small edit."""
    parameters = inspect.signature(call).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def within(field: str, value: object, interval: str) -> None:
    """Raise `ValueError` naming the field unless a number lies in the interval.

    Args:
        field: the field's name.
        value: what the user gave.
        interval: such as "[0, 1)" or "(-inf, inf)".

    >>> within("p", 1.5, "[0, 1)")
    Traceback (most recent call last):
    ValueError: edit.p=1.5: must be in [0, 1)
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, int | float) and not isinstance(value, bool):
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if above and below and math.isfinite(value):
            return
    raise ValueError(f"edit.{field}={value}: must be in {interval}")


def one_of(field: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `ValueError` naming the field unless the value is one of the choices.

    >>> one_of("scope", "row", ("model", "tensor"))
    Traceback (most recent call last):
    ValueError: edit.scope=row: must be one of model, tensor
    """
    if value not in choices:
        raise ValueError(f"edit.{field}={value}: must be one of {', '.join(map(str, choices))}")


def whole(field: str, value: object, low: int) -> None:
    """Raise `ValueError` naming the field unless the value is an integer of at least `low`.

    >>> whole("rank", 0, 1)
    Traceback (most recent call last):
    ValueError: edit.rank=0: must be an integer of at least 1
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"edit.{field}={value}: must be an integer of at least {low}")
