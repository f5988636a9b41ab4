"""Edits of matrices that are stored (in, out), which see them as (out, in) like all others."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltalab.codes.nested import Transposed
from deltalab.edits import Edit, Unit
from deltalab.rng import Draws, Rng


@dataclass(frozen=True)
class Turned(Edit):
    """An edit that is given the transpose of a matrix, and whose result is transposed back.

    What an entry draws depends on its place in the file, as for edits that see the file's matrix:
    masks of one seed are the same for all of them.

    Args:
        edit: the edit.

    >>> import torch
    >>> from deltalab.edits.bitdelta import BitDelta
    >>> rows = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="row")
    >>> Turned(rows)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), rng=Rng(0, "w"))
    tensor([[2., 3.],
            [2., 3.]])
    """

    edit: Edit
    unit: ClassVar[Unit] = "tensor"

    @property
    def needs(self) -> tuple[str, ...]:
        """What the edit itself asks for."""
        return self.edit.needs

    def __call__(self, delta: Tensor, *args: Any, **needs: Any) -> Tensor:
        """Return the edited delta as the file has it."""
        given = {name: _turned(name, value) for name, value in needs.items()}
        return self.edit(delta.mT.contiguous(), **given).mT.contiguous()

    def encode(self, delta: Tensor, *args: Any, **needs: Any) -> Transposed | None:
        """Return the code of the transpose."""
        given = {name: _turned(name, value) for name, value in needs.items()}
        code = self.edit.encode(delta.mT.contiguous(), **given)
        return None if code is None else Transposed.of_code(code)


@dataclass(frozen=True)
class _Draws(Draws):
    """The random numbers of a matrix, for its transpose."""

    rng: Rng

    def bits(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return 32 random bits per element of the transpose."""
        return self.rng.bits(like.mT, stream).mT.contiguous()

    def fork(self, label: str) -> "_Draws":
        """Return independent numbers for the same elements."""
        return _Draws(self.rng.fork(label))


def _turned(name: str, value: Any) -> Any:
    """Return what an edit needs of a matrix, for its transpose; of a layer it stays as it is."""
    match name:
        case "rng":
            return _Draws(value)
        case "svd":
            return lambda: tuple(part.mT if part.ndim > 1 else part for part in reversed(value()))
        case "grad" | "fisher":
            return value.mT
        case "post":
            return None if value is None else value.mT
        case "peers":
            return lambda peer: value(peer).mT
    return value


def seen(edit: Edit, turned: bool) -> Edit:
    """Return an edit as it is to be applied to a tensor that the file has transposed, or not."""
    return Turned(edit) if turned and edit.axes else edit
