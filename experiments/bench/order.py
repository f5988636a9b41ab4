"""Edits by rank of magnitude against the same written with `torch.sort`.

Claim: at least 5 times as fast, with the same result. Run: `python -m experiments.bench.order
[repeats]`. Cost: two minutes, 2 GB. Prints the seconds of the fastest repeat and the ratio.
"""

import sys

import torch
from torch import Tensor

from deltalab.edits.multibit import Multibit
from deltalab.edits.ties import Ties
from experiments.bench.timing import alternate, ratio

SHAPE, KEEP, BITS = (4096, 4096), 0.2, 4


def sorted_ties(delta: Tensor) -> Tensor:
    """TIES by a full sort: exact count, ties by index."""
    order = torch.sort(delta.abs().flatten(), descending=True, stable=True).indices
    hat = torch.zeros(delta.numel())
    kept = order[: int(KEEP * delta.numel())]
    hat[kept] = delta.flatten()[kept]
    return hat.reshape(delta.shape)


def sorted_multibit(delta: Tensor) -> Tensor:
    """Magnitude blocks of equal count by a full sort."""
    values, order = torch.sort(delta.abs().flatten())
    means = values.reshape(1 << BITS, -1).mean(1, dtype=torch.float64).float()
    hat = torch.empty(delta.numel())
    hat[order] = means.repeat_interleave(delta.numel() >> BITS)
    return torch.where(delta < 0, -hat.reshape(delta.shape), hat.reshape(delta.shape))


def main() -> None:
    """Print the table."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 5e-4
    ties, multibit = Ties(keep=KEEP, scope="tensor"), Multibit(bits=BITS, blocks="equal_count")
    ways = {
        "ties": lambda: ties(delta, quantile=None),
        "ties by torch.sort": lambda: sorted_ties(delta),
        "multibit": lambda: multibit(delta),
        "multibit by torch.sort": lambda: sorted_multibit(delta),
    }
    assert torch.equal(ways["ties"](), ways["ties by torch.sort"]())
    close = torch.isclose(ways["multibit"](), ways["multibit by torch.sort"](), rtol=1e-5)
    assert close.double().mean() > 0.9999, "equal magnitudes share a block in ours"
    times = alternate(ways, repeats)
    print("edit | seconds | by torch.sort | torch.sort, times ours")
    for name in ("ties", "multibit"):
        theirs = times[f"{name} by torch.sort"]
        print(f"{name} | {times[name].best:.3f} | {theirs.best:.3f} | {ratio(theirs, times[name])}")


if __name__ == "__main__":
    main()
