"""Entries on an even grid, kept at places that are held."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.codes import Setting
from deltalab.codes.indexed import Indexed, entropy
from deltalab.codes.integers import pack, unpack
from deltalab.codes.raw import Zero


@dataclass(frozen=True, eq=False)
class Levelled(Indexed):
    """D_hat = scale (low + step q) at some places, q an integer of few bits, and 0 elsewhere.

    Arrays: those of `Indexed`, `values` being the packed integers. Settings beside those of
    `Indexed`: `bits`, `kept`, `low`, `step`.
    """

    kind: ClassVar[str] = "levelled"

    @classmethod
    def on_grid(
        cls, integers: Tensor, places: Tensor, bits: int, low: float, step: float, scale: float
    ) -> "Levelled | Zero":
        """Return the code of integers at some places.

        Args:
            integers: of the delta's shape, in [0, 2^bits).
            places: boolean, of the same shape.
            bits: from 1 to 16.
            low: what 0 stands for.
            step: between levels.
            scale: of all.
        """
        base = Indexed.at(integers.float(), None, places, scale)
        if isinstance(base, Zero):
            return base
        values = base.arrays["values"]
        arrays = {**base.arrays, "values": pack(values.int(), bits)}
        own: dict[str, Setting] = {
            "holds": "levels",
            "bits": bits,
            "kept": len(values),
            "low": low,
            "step": step,
        }
        return cls(base.shape, arrays, {**base.settings, **own})

    def _held(self, places: Tensor) -> Tensor:
        bits, count = self._setting("bits", int), int(places.sum())
        found = unpack(self._array("values"), bits, count).float()
        low, step = float(self._setting("low", float)), float(self._setting("step", float))
        return low + step * found

    def _saved(self) -> float:
        places = next(a.numel() for name, a in self.arrays.items() if name in ("gaps", "mask"))
        return 8 * places - self.count * entropy(self._setting("kept", int) / self.count)
