"""How many tokens a forward pass may hold: found by trial."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)
START = 1 << 12
"""Tokens of the first pass where their number is found by trial."""
MOST = {"cpu": 1 << 14}
"""Beyond this nothing is tried on a device where too much memory ends the process."""


@dataclass(eq=False)
class Budget:
    """Tokens a forward pass, its rows' shared beginnings counted for each of them.

    With a number of rows, as many tokens as that many of the longest rows have: short rows share a
    pass in greater numbers. With `auto` it is doubled while that fits. Where memory runs out it is
    halved and not raised again.

    Args:
        rows: `batch_size`: a number of rows, or `auto`.
        device: the type of device that the passes run on.

    >>> budget = Budget(4)
    >>> budget.fits(8, 50, longest=100), budget.fits(9, 50, longest=100), budget.fits(1, 999, 100)
    (True, False, True)
    """

    rows: int | str
    device: str = "cpu"
    scale: float = 1.0
    found: int = START
    ended: bool = False

    def tokens(self, longest: int) -> int:
        """Return how many tokens a pass may hold, of rows of which the longest has so many."""
        whole = self.found if isinstance(self.rows, str) else self.rows * longest
        return max(int(whole * self.scale), 1)

    def fits(self, rows: int, length: int, longest: int) -> bool:
        """Whether rows of a length fit one pass; one row always does."""
        return rows == 1 or rows * length <= self.tokens(longest)

    def passed(self, tokens: int) -> None:
        """Hear of a pass that went well: of a full one, that the next may be larger."""
        if self.rows == "auto" and not self.ended and 2 * tokens > self.found:
            self.found = min(2 * self.found, MOST.get(self.device, 1 << 40))

    def ran_out(self, rows: int) -> bool:
        """Hear that memory ran out in a pass; whether a smaller one may be tried."""
        self.ended = True
        if rows == 1:
            return False
        self.scale /= 2
        log.warning("memory ran out in a pass of %d rows: trying half of them", rows)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return True


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    """
    text: Any = str(error).lower()
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "can't allocate", "not enough memory"))
    )
