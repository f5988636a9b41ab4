"""Singular components, each kept with its own number of bits, and with some entries left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code, Setting
from deltalab.codes.integers import pack, unpack
from deltalab.codes.rounding import levels, rounded
from deltalab.rng import Draws, Rng

FLOATS = {16: torch.float16, 32: torch.float32}
"""Widths at which entries are floating-point numbers; at 1 to 8 they are integers."""
GRAIN = 1 << 24
"""Parts of 1 in which shares that are left out are told, those of random numbers."""
WIDTHS = (*range(1, 9), *FLOATS)


@dataclass(frozen=True, eq=False)
class Factors(Code):
    """D_hat = sum_i c_i u_i v_i', with u_i and v_i of b_i bits an entry.

    Arrays: `width` (r,), b_i; `scale` (r,), c_i in units of the largest, which is the setting
    `unit`; `u.b` and `v.b`, the entries of all components of b bits, one component after another.
    With `drop` (r,), p_i in 2^-24, entries are left out at random: exactly floor(n p_i) of n, or
    each with probability p_i, as the setting `masks` says: "exact" or "bernoulli". Which they are
    follows from `seed`, `name` and `salt` and is not stored.
    """

    kind: ClassVar[str] = "factors"

    @classmethod
    def of_columns(
        cls,
        shape: tuple[int, ...],
        sides: tuple[Tensor, Tensor],
        steps: tuple[Tensor, Tensor],
        scale: Tensor,
        width: Tensor,
        drop: Tensor | None = None,
        settings: Mapping[str, Setting] | None = None,
    ) -> "Factors":
        """Return the code of given columns.

        Args:
            shape: of the tensor.
            sides: U (d, r) and V (k, r), entries that are left out included.
            steps: (r,) of each, between its levels; 1 where entries are floating-point.
            scale: (r,), what a component is multiplied by.
            width: (r,), bits of an entry, of `WIDTHS`.
            drop: (r,), the shares that are left out; None: nothing is.
            settings: of the code; with `drop` those of the masks.
        """
        factor = (scale * steps[0] * steps[1]).float().cpu()
        unit = float(factor.abs().amax()) if len(factor) else 0.0
        arrays = {"width": width.to(torch.uint8).cpu(), "scale": factor / (unit or 1.0)}
        if drop is not None:
            arrays["drop"] = (drop.double() * GRAIN).round().int().cpu()
        sides = sides[0].cpu(), sides[1].cpu()
        found = masks(sides, None if drop is None else drop.cpu(), settings or {})
        for name, side, step, mask in zip("uv", sides, steps, found, strict=True):
            for bits in sorted(set(arrays["width"].tolist())):
                chosen = arrays["width"] == bits
                columns = side[:, chosen]
                if bits not in FLOATS:
                    columns = rounded(columns, torch.tensor(bits), step.cpu()[chosen])
                held = columns.T[mask[:, chosen].T]
                arrays[f"{name}.{bits}"] = (
                    held.to(FLOATS[bits]) if bits in FLOATS else pack(held, bits)
                )
        return cls(tuple(shape), arrays, {**(settings or {}), "unit": unit})

    def is_payload(self, name: str) -> bool:
        """The entries of U and V."""
        return "." in name

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return U (d, r) and V (k, r) in units of their steps, zero where entries are left out."""
        width = self._array("width")
        drop = None
        if "drop" in self.arrays:
            drop = self._array("drop", len(width)).double() / GRAIN
        empty = tuple(torch.zeros(n, len(width)) for n in (self.shape[0], prod(self.shape[1:])))
        made = []
        for name, side, mask in zip("uv", empty, masks(empty, drop, self.settings), strict=True):
            turned, places = side.T.contiguous(), mask.T
            for bits in sorted(set(width.tolist())):
                if bits not in WIDTHS:
                    raise ValueError(f"code {self.kind}: a width of {bits}")
                chosen = width == bits
                count = int(places[chosen].sum())
                held = self._array(f"{name}.{bits}", count if bits in FLOATS else None)
                if bits not in FLOATS:
                    held = levels(unpack(held, bits, count), torch.tensor(bits))
                turned[chosen] = turned[chosen].masked_scatter(places[chosen], held.float())
            made.append(turned.T)
        return made[0], made[1]

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the sum of all components."""
        u, v = self.sides()
        unit: float = self._setting("unit", float)
        scale = unit * self._array("scale", u.shape[1]).float()
        return ((u * scale) @ v.T).reshape(self.shape)


def masks(
    sides: tuple[Tensor, ...], drop: Tensor | None, settings: Mapping[str, Setting]
) -> list[Tensor]:
    """Return which entries of U and V are kept.

    Args:
        sides: U (d, r) and V (k, r), for their shapes and devices.
        drop: (r,), shares that are left out; None: nothing is.
        settings: `masks`, `seed`, `name` and `salt` of the code.
    """
    if drop is None:
        return [torch.ones_like(side, dtype=torch.bool) for side in sides]
    drop = ((drop.double() * GRAIN).round() / GRAIN).float()
    rng = Rng(int(settings["seed"]), str(settings["name"]), salt=str(settings["salt"]))
    exact = settings["masks"] == "exact"
    return [kept(rng, side, drop, exact, stream) for stream, side in enumerate(sides)]


def kept(rng: Draws, columns: Tensor, drop: Tensor, exact: bool, stream: int) -> Tensor:
    """Return which entries of every column are kept.

    Args:
        rng: random numbers of the tensor.
        columns: (n, r), gives shape and device.
        drop: (r,), the share of a column that is left out, in [0, 1].
        exact: leave out floor(n p) entries; otherwise each with probability p.
        stream: of the random numbers.

    >>> mask = kept(Rng(0, "w"), torch.zeros(8, 2), torch.tensor([0.0, 0.5]), True, 0)
    >>> mask.sum(0)
    tensor([8, 4])
    """
    drop = drop.to(columns.device)
    if not exact:
        return ~rng.below(columns, drop, stream)
    bits = rng.bits(columns, stream)
    order = bits.argsort(dim=0, stable=True)
    place = torch.empty_like(order)
    place.scatter_(
        0, order, torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    )
    return place >= (drop.double() * len(columns)).floor()
