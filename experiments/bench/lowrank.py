"""Low-rank edits over a grid of ranks against one `torch.linalg.svd` a rank.

Claim: one factorisation serves the grid, at least 5 times as fast, within 1e-4 of the exact
truncation. Run: `python -m experiments.bench.lowrank [rows columns]`. Cost: some minutes, 1 GB.
"""

import sys

import torch
from torch import Tensor

from deltalab.apply.extras import Memo
from deltalab.edits.twin import Twin
from experiments.bench.timing import alternate, ratio

RANKS = (1, 4, 16, 64, 256)


def grid(delta: Tensor) -> list[Tensor]:
    """All ranks by way of the shared factorisation."""
    memo = Memo()
    return [Twin(rank=r, rate=None)(delta, svd=lambda: memo.svd("w", {"w": delta})) for r in RANKS]


def by_svd(delta: Tensor) -> list[Tensor]:
    """All ranks, each by its own decomposition."""
    hats = []
    for rank in RANKS:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        hats.append((u[:, :rank] * s[:rank]) @ vh[:rank])
    return hats


def main() -> None:
    """Print the times and the largest relative error against float64."""
    shape = tuple(map(int, sys.argv[1:3])) if len(sys.argv) > 2 else (1024, 2048)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5e-4
    times = alternate({"ours": lambda: grid(delta), "svd": lambda: by_svd(delta)}, 3)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    exact = [(u[:, :r] * s[:r]) @ vh[:r] for r in RANKS]
    worst = max(float((h - e).norm() / e.norm()) for h, e in zip(grid(delta), exact, strict=True))
    print("shape | seconds | one svd a rank | svd, times ours | relative error")
    print(
        f"{shape[0]}x{shape[1]} | {times['ours'].best:.2f} | {times['svd'].best:.2f} | "
        f"{ratio(times['svd'], times['ours'])} | {worst:.1e}"
    )


if __name__ == "__main__":
    main()
