"""Edits in memory against the floor of any edit: read two tensors, write one.

Claim: a compiled edit takes at most 1.4 times as long as `torch.add(pre, post)`, and a tenth of
mergekit's kernels. Run: `python -m experiments.bench.edits [repeats]`. Cost: two minutes, 2 GB.
Prints nanoseconds per weight of the fastest repeat, and ratios as best (quartiles of the repeats);
first what the first tensor of a process costs, then for results in new memory, which costs more
than most edits, then in memory that is there.
"""

import sys
import time
from functools import partial

import torch
from torch import Tensor

from deltalab.apply.editing import edited_tensor
from deltalab.edits.biased_product import BiasedProduct
from deltalab.edits.biased_sign import BiasedSign
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.expo import Expo
from deltalab.edits.sign_flip import SignFlip
from deltalab.rng import Rng
from experiments.bench.timing import alternate, ratio

SHAPES = ((4096, 4096), (14336, 4096))
EDITS = {
    "dare": Dare(p=0.5, k=0.0),
    "drop_only": DropOnly(p=0.5),
    "bitdelta": BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor"),
    "bitdelta, rows": BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="row"),
    "expo": Expo(alpha=0.3),
    "sign_flip": SignFlip(fraction=0.1, balanced=False),
    "biased_sign": BiasedSign(k=0.5, p=None),
    "biased_product": BiasedProduct(k=0.5, p=None),
}


def pair(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return bfloat16 weights with a delta of the size that fine-tuning leaves."""
    generator = torch.Generator().manual_seed(0)
    pre = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    return pre, (pre.float() + torch.randn(shape, generator=generator) * 5e-4).bfloat16()


def mergekits(pre: Tensor, post: Tensor) -> dict:
    """Return mergekit's way from two tensors to the merged one, where it has the edit."""
    try:
        from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify
    except ImportError:
        return {}
    drop = SparsificationMethod.random
    return {
        "dare": lambda: pre + sparsify(post - pre, 0.5, drop, rescale_norm=RescaleNorm.l1),
        "drop_only": lambda: pre + sparsify(post - pre, 0.5, drop),
        "expo": lambda: pre + 1.3 * (post - pre),
    }


def first_use() -> None:
    """Print the seconds until an edit is compiled."""
    small, start = torch.zeros(1000), time.perf_counter()
    edited_tensor(small, small, EDITS["dare"], "compiled", rng=Rng(0, "w"))
    print(f"first use | {time.perf_counter() - start:.2f} s")


def main() -> None:
    """Print the table."""
    first_use()
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print("shape | edit | ns/weight | times the floor | mergekit, times ours")
    for shape in SHAPES:
        pre, post = pair(shape)
        grad, out = torch.randn(shape), torch.empty_like(pre)
        theirs = mergekits(pre, post)
        for place, label in ((None, ""), (out, ", in place")):
            ways = {"floor": partial(torch.add, pre, post, out=place)}
            for name, edit in EDITS.items():
                given = {"rng": Rng(0, "w"), "grad": grad}
                needs = {need: given[need] for need in edit.needs}
                ways[name] = partial(edited_tensor, pre, post, edit, out=place, **needs)
            times = alternate(ways, repeats)
            rivals = alternate({**{f"our {n}": ways[n] for n in theirs}, **theirs}, min(repeats, 5))
            for name, measured in times.items():
                cost = measured.best / pre.numel() * 1e9
                against = ratio(rivals[name], rivals[f"our {name}"]) if name in theirs else "-"
                print(
                    f"{shape[0]}x{shape[1]}{label} | {name} | {cost:.2f} |"
                    f" {ratio(measured, times['floor'])} | {against}"
                )


if __name__ == "__main__":
    main()
