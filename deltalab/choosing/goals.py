"""What a user asks for: at most so many bits or bytes, or at most so much of the gap in loss."""

import math
import re
from dataclasses import dataclass

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NAMES = ("bits", "size", "loss")


@dataclass(frozen=True)
class Goal:
    """A bound on one of size and loss; the other is to be as small as can be.

    Attributes:
        name: `bits` for each weight that is edited, `size` of the file in bytes, or `loss`, the
            change as a fraction of what discarding the delta changes.
        most: the bound.
        text: as it was given.
    """

    name: str
    most: float
    text: str

    def size(self, bits: float, size: float) -> float:
        """Return what of a candidate's size the goal is about."""
        return size if self.name == "size" else bits


def goal(given: dict[str, str]) -> Goal:
    """Read the goal from a command's settings.

    Raises:
        ValueError: none, several, or one that is no size.

    >>> goal({"size": "1.5MB"}).most, goal({"loss": "1%"}).most, goal({"bits": "2"}).most
    (1500000.0, 0.01, 2.0)
    """
    named = [name for name in NAMES if given.get(name)]
    if len(named) != 1:
        told = " and ".join(f"{name}={given[name]}" for name in named) or "no goal"
        raise ValueError(f"{told}: name one of bits=2, size=500MB, loss=1%")
    name, text = named[0], given[named[0]].strip()
    wanted = {
        "bits": (r"()", "a number of bits for each weight, as bits=2"),
        "size": (r"([KMG]?B)", "a size, as size=500MB"),
        "loss": (r"(%)", "a share of the change from pre to post, as loss=1%"),
    }[name]
    found = re.fullmatch(rf"(\d+(?:\.\d+)?|\.\d+)\s*{wanted[0]}", text, re.IGNORECASE)
    value = float(found[1]) if found else math.nan
    if not found or not value > 0:
        raise ValueError(f"{name}={text}: must be {wanted[1]}")
    unit = found[2].upper()
    return Goal(name, value / 100 if unit == "%" else value * UNITS.get(unit, 1), f"{name}={text}")
