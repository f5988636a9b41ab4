"""Edits: one method a file, each a frozen dataclass that maps a delta to an edited delta.

An edit's fields are the keys of `conf/edit/<name>.yaml`, where alone the defaults stand. Calling it
is pure: float32 delta in, float32 edited delta of the same shape out. What it needs beside the
delta it declares as keyword-only arguments out of `NEEDS`; where the fields decide, as a property
`needs`. Two class attributes, both optional, say how an edit may be run:

* `unit = "entry"`: an entry of the result depends on the same entry of the inputs alone;
  `unit = "row"`: a row (of the tensor read as (out, rest)) on the same row alone. Such edits run in
  slices, so that memory stays bounded. Without it an edit sees the whole tensor.
* `fuses = True`: plain tensor operations without a branch on the data, which a compiler can fuse
  into one pass over memory: in C on the CPU where `translation` has all of them, else by
  `torch.compile`. Edits of unit "entry" fuse in any case.
"""

import inspect
import math
from typing import Any, Protocol

from torch import Tensor

NEEDS = ("rng", "grad", "acts", "peers", "svd", "quantile", "scale")
"""All that an edit may ask for: random numbers of this tensor; the loss gradient at W_post; the
mean input activations of its layer; other models' deltas; its singular value decomposition; the
model-wide magnitude threshold; a scale learned for this tensor."""


class Edit(Protocol):
    """What every edit is: a pure map of one tensor's delta."""

    def __call__(self, delta: Tensor, **needs: Any) -> Tensor:
        """Return the edited delta."""


def needs_of(edit: Any) -> tuple[str, ...]:
    """Return what an edit asks for: its `needs`, or the keyword-only arguments of its call.

    Raises:
        ValueError: it asks for something that is not in the vocabulary.
    """
    parameters = inspect.signature(type(edit).__call__).parameters.values()
    declared = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    names: tuple[str, ...] = getattr(edit, "needs", declared)
    for name in names:
        if name not in NEEDS:
            raise ValueError(
                f"edit {type(edit).__name__} needs {name!r}, which is not one of {', '.join(NEEDS)}"
            )
    return names


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
