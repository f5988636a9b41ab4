"""What an edit did, counted as it is edited, against the edit alone; and what its code takes.

Claims: counting takes at most 1.30 times the edit, over a model whose edited tensors are all kept,
as a point keeps them; the size of the code at most 0.30 of the edit more. Run:
`python -m experiments.bench.audit [repeats]`. Cost: three minutes, 1 GB. Prints nanoseconds per
weight of the fastest repeat of the edit, of the edit with the counts, and with the size of its code
as well, in processor time of all threads; the ratio of the second to the first, of the best
(quartiles of the repeats), and its median; what the size adds, in edits, as the median (quartiles);
for large tensors, whose edits are compiled, in fresh memory (32 MiB each) and in memory that is
there, for small ones beside a large one, which are compiled then, and for small ones alone, which
are not.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch

from deltalab.apply import editing
from deltalab.apply.audit import Audit
from deltalab.apply.extras import Extras, Memo
from deltalab.edits import Edit
from deltalab.edits.multibit import Multibit
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
MORE = {
    "ties, tensor": Ties(keep=0.2, scope="tensor"),
    "ties, model": Ties(keep=0.2, scope="model"),
    "multibit": Multibit(bits=3, blocks="equal_count"),
}


def edit_all(pre: dict, post: dict, edit: object, grads: dict, audit: type | None) -> dict:
    """Edit every tensor of a model, and keep them all."""
    extras = Extras(edit.needs, 0, {"grad": lambda name, _: grads[name]}, memo=Memo())
    given = None if audit is None else audit()
    return dict(editing.edited(pre, post, edit, "all", extras, audit=given))


def unsized(edit: Edit) -> Edit:
    """Return an edit that has no code, and so none whose size is to be told."""
    off = {name: getattr(Edit, name) for name in ("encode", "held", "outline", "outlined")}
    kind = type(type(edit).__name__, (type(edit),), off)
    return kind(**{f.name: getattr(edit, f.name) for f in fields(edit)})


def added(a: Times, b: Times, whole: Times) -> str:
    """Say how much longer `a` takes than `b`, in units of `whole`: median (quartiles)."""
    each = zip(a.seconds, b.seconds, whole.seconds, strict=True)
    low, middle, high = statistics.quantiles(((x - y) / z for x, y, z in each), n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def median(a: Times, b: Times) -> str:
    """Say the median over the repeats of how many times as long `a` takes as `b`."""
    return f"{statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True)):.2f}"


def main() -> None:
    """Print the table."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print("model | edit | ns/weight | counted | sized | counted/edit | median | sized adds")
    for model, shapes in MODELS.items():
        pairs = [pair(shape) for shape, count in shapes.items() for _ in range(count)]
        pre, post = (
            {f"{n}.weight": t for n, t in enumerate(side)} for side in zip(*pairs, strict=True)
        )
        grads = {name: torch.randn(t.shape) for name, t in post.items()}
        weights = sum(t.numel() for t in post.values())
        for name, edit in {**EDITS, **MORE}.items():
            ways: dict[str, Callable[[], object]] = {
                label: partial(edit_all, pre, post, its, grads, audit)
                for label, its, audit in (
                    ("bare", edit, None), ("counted", unsized(edit), Audit), ("sized", edit, Audit)
                )
            }  # fmt: skip
            times = alternate(ways, repeats, clock=time.process_time)
            bare, counted, sized = times["bare"], times["counted"], times["sized"]
            each = (f"{t.best / weights * 1e9:.2f}" for t in (bare, counted, sized))
            print(
                f"{model} | {name} | {' | '.join(each)} | {ratio(counted, bare)}"
                f" | {median(counted, bare)} | {added(sized, counted, bare)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
