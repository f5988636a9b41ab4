"""Delta-DCT: patches of a delta in the frequency domain (arXiv 2503.06676)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code, Setting
from deltalab.codes.integers import pack
from deltalab.codes.patches import (
    FILLS,
    RANGES,
    TRANSFORMS,
    Patches,
    cut,
    forward,
    index_bits,
    integers_of,
    spans,
)
from deltalab.edits import one_of, whole
from deltalab.edits.coded import Coded, untouched, whole_matrix


@dataclass(frozen=True)
class DeltaDct(Coded):
    """Round the cosine transform of patches, those of large norm to more bits.

    A matrix is cut into patches of p x p; those of the largest Frobenius norms have the most bits,
    in shares that are given. Coefficients of a patch, C P C' with the orthonormal DCT-II matrix C,
    are rounded evenly within the patch's range; a patch of no bits is filled. The paper tells
    neither p nor the shares; these fields are a reading. Tensors of more than two dimensions are
    read as (out, rest); those of fewer are returned as they are.

    Args:
        side: p, at least 1.
        shares: bits, from 0 to 8, and what share of the patches has them; shares add up to 1.
        fill: what a patch of no bits becomes: its "mean", or "zero".
        range: "minmax" has least and greatest coefficient of a patch, "absmax" a grid that is
            symmetric about zero.
        rescale: whether the result is scaled to the delta's mean magnitude: "on", "off", or "auto",
            where some patches have at most one bit.
        transform: "dct"; "identity" is the ablation.

    Raises:
        ValueError: a field is out of range.

    >>> edit = DeltaDct(2, {8: 1.0}, "mean", "minmax", "auto", "dct")
    >>> edit(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).round(decimals=1)
    tensor([[1., 2.],
            [3., 4.]])
    """

    side: int
    shares: Mapping[int, float]
    fill: str
    range: str
    rescale: str
    transform: str
    version: ClassVar[int] = 1
    axes: ClassVar[bool] = False
    spends: ClassVar[str] = "shares"
    choices: ClassVar[tuple[Any, ...]] = (
        {0: 1.0}, {2: 0.25, 0: 0.75}, {2: 0.5, 0: 0.5}, {1: 1.0}, {2: 1.0}, {3: 1.0}, {4: 1.0},
    )  # fmt: skip

    def __post_init__(self) -> None:
        whole("side", self.side, 1)
        one_of("fill", self.fill, FILLS)
        one_of("range", self.range, RANGES)
        one_of("rescale", self.rescale, ("auto", "on", "off"))
        one_of("transform", self.transform, TRANSFORMS)
        shares = {str(bits): share for bits, share in dict(self.shares).items()}
        wrong = [bits for bits in shares if bits not in map(str, [*range(9)])]
        amounts = [x if isinstance(x, int | float) else -1.0 for x in shares.values()]
        if wrong or not amounts or min(amounts) < 0 or abs(sum(amounts) - 1) > 1e-9:
            raise ValueError(
                f"edit.shares={dict(self.shares)}: must be shares that add up to 1 by bits from 0"
                " to 8, such as {2: 0.5, 0: 0.5}"
            )

    def encode(self, delta: Tensor, *args: Any, **needs: Any) -> Code:
        """Return the code of the patches."""
        if whole_matrix(delta) is None:
            return untouched(delta, needs)
        matrix = delta.flatten(1)
        patches = cut(matrix, self.side)
        chosen = self.allotted(patches.square().sum((1, 2)))
        widths = self.widths
        arrays: dict[str, Tensor] = {"level": pack(chosen, index_bits(len(widths)))}
        coefficients = forward(patches, self.transform).flatten(1)
        means = patches.sum((1, 2)) / cut(torch.ones_like(matrix), self.side).sum((1, 2))
        parts = {w: coefficients[chosen == at] for at, w in enumerate(widths)}
        ranges = {w: spans(part, w, self.range) for w, part in parts.items() if w}
        filled = means[chosen == widths.index(0)] if 0 in widths else means[:0]
        unit = max(
            [float(x.abs().max()) for x in (*ranges.values(), filled) if len(x)], default=0.0
        )
        for width, span in ranges.items():
            arrays[f"range.{width}"] = held = (span / (unit or 1.0)).half()
            integers = integers_of(parts[width], width, unit * held.float())
            arrays[f"q.{width}"] = pack(integers, width)
        if 0 in widths and self.fill == "mean":
            arrays["fill"] = (filled / (unit or 1.0)).half()
        settings: dict[str, Setting] = {
            "side": self.side,
            "widths": ",".join(map(str, widths)),
            "transform": self.transform,
            "range": self.range,
            "fill": self.fill,
            "unit": unit,
            "scale": 1.0,
        }
        arrays = {name: array.contiguous().cpu() for name, array in arrays.items()}
        code = Patches(tuple(delta.shape), arrays, settings)
        if self.rescale == "on" or (self.rescale == "auto" and min(widths) <= 1):
            now = float(code.decode().abs().mean(dtype=torch.float64))
            wanted = float(delta.abs().mean(dtype=torch.float64))
            return Patches(code.shape, arrays, {**settings, "scale": wanted / now if now else 1.0})
        return code

    @property
    def widths(self) -> list[int]:
        """The bits that patches have, the most first."""
        return sorted((int(bits) for bits in self.shares), reverse=True)

    def allotted(self, importance: Tensor) -> Tensor:
        """Return which of `widths` every patch has, uint8; of equal importance the first has more.

        Shares are met by the largest remainder.

        >>> edit = DeltaDct(2, {2: 0.5, 0: 0.5}, "mean", "minmax", "auto", "dct")
        >>> edit.allotted(torch.tensor([1.0, 3.0, 2.0])).tolist()
        [1, 0, 0]
        """
        total, of = len(importance), {int(bits): float(x) for bits, x in self.shares.items()}
        exact = [total * of[width] for width in self.widths]
        counts = [int(x + 1e-9) for x in exact]
        rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for index in rest[: total - sum(counts)]:
            counts[index] += 1
        places = torch.arange(len(counts), dtype=torch.uint8).repeat_interleave(
            torch.tensor(counts)
        )
        order = importance.argsort(descending=True, stable=True)
        found = torch.empty(total, dtype=torch.uint8, device=importance.device)
        found[order] = places.to(importance.device)
        return found
