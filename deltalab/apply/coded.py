"""Edits whose codes hold their numbers in a narrower type: what `values=float16` measures."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.edits import Edit

VALUES = ("exact", "float16")


@dataclass(frozen=True)
class Narrowed(Edit):
    """An edit as its code gives it back with every floating-point number in float16.

    Entries of W_post are then no longer held as they are: what is held is the delta's, rounded to
    11 bits, and below 6e-5 to fewer.

    Args:
        edit: the edit.

    Raises:
        ValueError: on a tensor of which it has no code, or numbers that float16 cannot hold.

    >>> import torch
    >>> from deltalab.edits.keep import Keep
    >>> Narrowed(Keep())(torch.tensor([1 / 3])).item() == torch.tensor(1 / 3).half().item()
    True
    """

    edit: Edit
    unit: ClassVar = "tensor"

    @property
    def needs(self) -> tuple[str, ...]:
        """What the edit itself asks for."""
        return self.edit.needs

    @property
    def axes(self) -> bool:
        """Whether it matters to the edit."""
        return self.edit.axes

    @property
    def whole_model(self) -> bool:  # type: ignore[override]
        """Whether the edit needs the whole model."""
        return self.edit.whole_model

    def __call__(self, delta: Tensor, *args: Any, **needs: Any) -> Tensor:
        """Return the edited delta as it is held."""
        return self.encode(delta, **needs).decode().to(delta.device)

    def outlined(
        self, delta: Tensor, dtype: torch.dtype, *args: Any, **needs: Any
    ) -> tuple[Tensor, Code | None]:
        """Return the edited delta as it is held, and the code."""
        code = self.encode(delta, **needs)
        return code.decode().to(delta.device), code

    def encode(self, delta: Tensor, *args: Any, **needs: Any) -> Code:
        """Return the code, narrowed."""
        code = self.edit.encode(delta, **{**needs, "post": None})
        if code is None:
            raise ValueError(f"values=float16: {no_code(self.edit)}")
        return code.narrowed()


def no_code(edit: Edit) -> str:
    """Say that an edit has no code."""
    return (
        f"edit {type(edit).__name__} with these settings has no code: it leaves as many different"
        " numbers as there are entries"
    )


def held(edit: Edit, values: str) -> Edit:
    """Return an edit as its code gives it back.

    Args:
        edit: the edit.
        values: "exact": as it is; "float16".

    Raises:
        ValueError: another choice, or an edit that never has a code.
    """
    if values not in VALUES:
        raise ValueError(f"values={values}: must be one of {', '.join(VALUES)}")
    if values == "exact":
        return edit
    if type(edit).encode is Edit.encode:
        raise ValueError(f"values={values}: {no_code(edit)}")
    return Narrowed(edit)
