"""What an edit did, counted as it is edited, against the edit alone.

Claim: at most 1.30 times the edit, over a model whose edited tensors are all kept, as a point
keeps them. Run: `python -m experiments.bench.audit [repeats]`. Cost: two minutes, 1 GB. Prints
nanoseconds per weight of the fastest repeat without and with the audit, in processor time of all
threads, and the ratio: of the best (quartiles of the repeats), and the median over the repeats; for
large tensors, whose edits are compiled, in fresh memory (32 MiB each) and in memory that is there,
for small ones beside a large one, which are compiled then, and for small ones alone, which are not.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from deltalab.apply import editing
from deltalab.apply.audit import Audit
from deltalab.apply.extras import Extras, Memo
from deltalab.edits.ties import Ties
from experiments.bench.edits import EDITS, pair
from experiments.bench.timing import Times, alternate, ratio

MODELS = {
    "4096x4096": {(4096, 4096): 4},
    "1024x1024": {(1024, 1024): 16},
    "128x128, one 256x256": {(128, 128): 100, (256, 256): 1},
    "128x128": {(128, 128): 100},
}
"""Models: their shapes, and how many tensors they have of each."""


def edit_all(pre: dict, post: dict, edit: object, grads: dict, audit: type | None) -> dict:
    """Edit every tensor of a model, and keep them all."""
    extras = Extras(edit.needs, 0, {"grad": lambda name, _: grads[name]}, memo=Memo())
    given = None if audit is None else audit()
    return dict(editing.edited(pre, post, edit, "all", extras, audit=given))


def median(a: Times, b: Times) -> str:
    """Say the median over the repeats of how many times as long `a` takes as `b`."""
    return f"{statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True)):.2f}"


def main() -> None:
    """Print the table."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print("model | edit | ns/weight | with the audit | times the edit | median")
    for model, shapes in MODELS.items():
        pairs = [pair(shape) for shape, count in shapes.items() for _ in range(count)]
        pre, post = (
            {f"{n}.weight": t for n, t in enumerate(side)} for side in zip(*pairs, strict=True)
        )
        grads = {name: torch.randn(t.shape) for name, t in post.items()}
        weights = sum(t.numel() for t in post.values())
        for name, edit in {**EDITS, "ties": Ties(keep=0.2, scope="tensor")}.items():
            ways: dict[str, Callable[[], object]] = {
                label: partial(edit_all, pre, post, edit, grads, audit)
                for label, audit in (("bare", None), ("audited", Audit))
            }
            times = alternate(ways, repeats, clock=time.process_time)
            bare, audited = times["bare"], times["audited"]
            cost, more = (t.best / weights * 1e9 for t in (bare, audited))
            print(
                f"{model} | {name} | {cost:.2f} | {more:.2f} |"
                f" {ratio(audited, bare)} | {median(audited, bare)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
