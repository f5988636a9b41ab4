"""DBMS: the base is moved first, and what is left is compressed (arXiv 2505.11344)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.weighted import Weighted
from deltalab.edits import Edit, within
from deltalab.edits.chain import Chain, factors_of
from deltalab.edits.coded import untouched, whole_matrix


@dataclass(frozen=True)
class Shifted(Edit):
    """Move the base by a compressed delta, and compress what is left of it.

    v = B(D), R = D - a v, D_hat = a v + b C(R), with two compressors B and C. The summary of the
    method leaves open where the base vector comes from; this is that of the tensor's own delta,
    which counts with its bits. Tensors of fewer than two dimensions are returned as they are.

    Args:
        base: B: edits as of `chain`.
        edit: C: likewise.
        amount: a, any number; "fit" is that of least squares, <D, v> / <v, v>, which is the best of
            all for a C whose expected error is a multiple of ||R||^2, as DARE's.
        scale: b, any number; "fit" is that of least squares, <R, C(R)> / ||C(R)||^2.

    Raises:
        ValueError: a field is out of range, or an edit without a code.

    >>> import torch
    >>> from deltalab.rng import Rng
    >>> edit = Shifted([{"bitdelta": {}}], [{"bitdelta": {}}], amount="fit", scale=1.0)
    >>> edit(torch.tensor([[4.0, -2.0], [2.0, -4.0]]), rng=Rng(0, "w"))
    tensor([[ 4., -2.],
            [ 2., -4.]])
    """

    base: list[Any]
    edit: list[Any]
    amount: float | str
    scale: float | str
    version: ClassVar[int] = 1
    options: ClassVar = {"base": "edit", "edit": "edit"}

    def __post_init__(self) -> None:
        for name in ("amount", "scale"):
            if (value := getattr(self, name)) != "fit":
                if isinstance(value, str):
                    raise ValueError(f"edit.{name}={value}: must be a number, or fit")
                within(name, value, "(-inf, inf)")
        for step in self.parts:
            if step.whole_model:
                raise ValueError(f"edit={step}: needs the whole model, so cannot be a part")

    @cached_property
    def parts(self) -> tuple[Chain, Chain]:
        """B and C."""
        found = []
        for name in ("base", "edit"):
            try:
                found.append(Chain(getattr(self, name)))
            except ValueError as error:
                raise ValueError(str(error).replace("edit.steps", f"edit.{name}", 1)) from None
        return found[0], found[1]

    @property
    def needs(self) -> tuple[str, ...]:
        """What this edit asks for: all that both compressors do."""
        return tuple(dict.fromkeys(need for part in self.parts for need in part.needs))

    @property
    def axes(self) -> bool:
        """Whether it matters to either."""
        return any(part.axes for part in self.parts)

    def __call__(self, delta: Tensor, *args: Any, **needs: Any) -> Tensor:
        """Return the moved base and the compressed rest."""
        hat: Tensor = self.encode(delta, **needs).decode()
        return hat.to(delta.device)

    def encode(self, delta: Tensor, *args: Any, **needs: Any) -> Code:
        """Return the codes of both, and what they are multiplied by."""
        if whole_matrix(delta) is None:
            return untouched(delta, needs)
        first, second = self.parts
        base = self._coded(first, delta, needs, "base")
        v = base.decode().to(delta.device)
        amount = _fitted(delta, v) if self.amount == "fit" else float(self.amount)
        rest = delta - amount * v
        given = dict(needs)
        if "svd" in given:
            given["svd"] = factors_of(rest)
        if "rng" in given:
            given["rng"] = given["rng"].fork("rest")
        code = self._coded(second, rest, given, "edit")
        scale = 1.0 if self.scale != "fit" else _fitted(rest, code.decode().to(rest.device))
        if self.scale != "fit":
            scale = float(self.scale)
        return Weighted.of_codes([base, code], [amount, scale])

    def _coded(self, part: Chain, delta: Tensor, needs: Mapping[str, Any], name: str) -> Code:
        code = part.encode(delta, **{need: needs[need] for need in part.needs})
        if code is None:
            raise ValueError(f"edit.{name}={getattr(self, name)}: has no code, so saves nothing")
        return code


def _fitted(wanted: Tensor, given: Tensor) -> float:
    """Return <wanted, given> / <given, given>; 0 where nothing is given."""
    one, other = wanted.double(), given.double()
    norm = float((other * other).sum())
    return float((one * other).sum()) / norm if norm else 0.0
