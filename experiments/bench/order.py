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

SHAPE, KEEP, BITS = (4096, 4096), 0.2, (1, 4, 5, 8)


def sorted_ties(delta: Tensor) -> Tensor:
    """TIES by a full sort: exact count, ties by index."""
    order = torch.sort(delta.abs().flatten(), descending=True, stable=True).indices
    hat = torch.zeros(delta.numel())
    kept = order[: int(KEEP * delta.numel())]
    hat[kept] = delta.flatten()[kept]
    return hat.reshape(delta.shape)


def sorted_multibit(delta: Tensor, bits: int) -> Tensor:
    """Magnitude blocks of equal count by a full sort."""
    values, order = torch.sort(delta.abs().flatten())
    means = values.reshape(1 << bits, -1).mean(1, dtype=torch.float64).float()
    hat = torch.empty(delta.numel())
    hat[order] = means.repeat_interleave(delta.numel() >> bits)
    return torch.where(delta < 0, -hat.reshape(delta.shape), hat.reshape(delta.shape))


def main() -> None:
    """Print the table."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 5e-4
    ties = Ties(keep=KEEP, scope="tensor")
    ways = {
        "ties": lambda: ties(delta, quantile=None),
        "ties by torch.sort": lambda: sorted_ties(delta),
    }
    assert torch.equal(ways["ties"](), ways["ties by torch.sort"]())
    for bits in BITS:
        name, multibit = f"multibit, {bits} bits", Multibit(bits=bits, blocks="equal_count")
        ways[name] = lambda edit=multibit: edit(delta)
        ways[f"{name} by torch.sort"] = lambda bits=bits: sorted_multibit(delta, bits)
        close = torch.isclose(ways[name](), ways[f"{name} by torch.sort"](), rtol=1e-5)
        assert close.double().mean() > 0.9999, "equal magnitudes share a block in ours"
    times = alternate(ways, repeats)
    print("edit | seconds | by torch.sort | torch.sort, times ours")
    for name in (n for n in ways if "by" not in n):
        theirs = times[f"{name} by torch.sort"]
        print(f"{name} | {times[name].best:.3f} | {theirs.best:.3f} | {ratio(theirs, times[name])}")


if __name__ == "__main__":
    main()
