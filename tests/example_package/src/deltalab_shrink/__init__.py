from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.edits import Edit, within


@dataclass(frozen=True)
class Shrink(Edit):
    """D_hat = c D."""

    c: float
    unit: ClassVar = "entry"  # every entry by itself: runs in slices, compiles

    def __post_init__(self) -> None:
        within("c", self.c, "[0, 1]")

    def __call__(self, delta: Tensor) -> Tensor:
        return self.c * delta
