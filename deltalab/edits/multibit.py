"""BitDelta with more magnitude bits (arXiv 2410.13841, Sec. 5.3 and Fig. 4)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltalab.edits import one_of, whole
from deltalab.threshold import ascending

Array = np.ndarray[Any, Any]
_SLICE = 1 << 15


@dataclass(frozen=True)
class Multibit:
    """Quantise the magnitudes to 2^bits levels, each the mean of its block, and keep the signs.

    Blocks of equal count: of n magnitudes, one that exceeds c others lies in block
    floor(M c / n), M = 2^bits, so that equal magnitudes share a block. Blocks of equal width divide
    [0, max |D|] evenly. sign(0) = +1 as for BitDelta, which is bits = 0; blocks as many as distinct
    magnitudes are the identity. sum |D| is preserved. Tensors of fewer than two dimensions are
    returned as they are.

    Args:
        bits: magnitude bits, from 0 to 16.
        blocks: "equal_count" or "equal_width".

    Raises:
        ValueError: a field is out of range.

    >>> Multibit(bits=1, blocks="equal_count")(torch.tensor([[1.0, -3.0], [10.0, -12.0]]))
    tensor([[  2.,  -2.],
            [ 11., -11.]])
    """

    bits: int
    blocks: str

    def __post_init__(self) -> None:
        whole("bits", self.bits, 0)
        if self.bits > 16:
            raise ValueError(f"edit.bits={self.bits}: must be an integer from 0 to 16")
        one_of("blocks", self.blocks, ("equal_count", "equal_width"))

    def __call__(self, delta: Tensor) -> Tensor:
        """Return the signs times the block means."""
        if delta.ndim < 2 or delta.numel() == 0:
            return delta.clone()
        magnitude = delta.abs()
        values = ascending(magnitude)
        level = _looked_up(magnitude, *_levels(values, self._ends(values)))
        return torch.where(delta < 0, -level, level)

    def _ends(self, values: Array) -> Array:
        """Return where the blocks end in the ascending magnitudes; those of empty ones too."""
        blocks, total = 1 << self.bits, len(values)
        if self.blocks == "equal_count":
            places = np.array([-(-b * total // blocks) - 1 for b in range(1, blocks)], dtype=int)
            limits = values[places[places >= 0]]
        else:
            limits = values[-1] * (np.arange(1, blocks) / blocks)
        ends: Array = np.searchsorted(values, limits.astype(np.float32), side="right")
        return ends


def _levels(values: Array, ends: Array) -> tuple[Array, Array]:
    """Return the largest magnitude of every block that is not empty, and its mean."""
    ends = np.unique(np.append(ends[ends > 0], len(values)))
    starts = np.append(0, ends[:-1])
    sums = np.add.reduceat(values, starts, dtype=np.float64)
    return values[ends - 1], (sums / (ends - starts)).astype(np.float32)


def _looked_up(magnitude: Tensor, limits: Array, means: Array) -> Tensor:
    """Return the mean of the block of every entry."""
    if len(limits) > 65:
        edges, levels = (torch.from_numpy(x).to(magnitude.device) for x in (limits[:-1], means))
        return levels[torch.bucketize(magnitude, edges)]
    out = torch.full_like(magnitude, float(means[0]), memory_format=torch.contiguous_format)
    slices = torch.split(out.view(-1), _SLICE), torch.split(magnitude.reshape(-1), _SLICE)
    for level, part in zip(
        *slices, strict=True
    ):  # a comparison a level, in the processor's cache: beats a search
        for limit, mean in zip(limits[:-1].tolist(), means[1:].tolist(), strict=True):
            level.masked_fill_(part > limit, mean)
    return out
