"""What an edit did, counted as it is edited, against the edit alone.

Claim: at most 1.30 times the edit, over a model whose edited tensors are all kept, as a point
keeps them. Run: `python -m experiments.bench.audit [repeats]`. Cost: two minutes, 1 GB. Prints
nanoseconds per weight of the fastest repeat without and with the audit, in processor time of all
threads, and the ratio: of the best (quartiles of the repeats), and the median over the repeats; for
large tensors, whose edits are compiled, and for small ones, whose edits are not.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from deltalab.apply import editing
from deltalab.apply.audit import Audit
from deltalab.apply.extras import Extras, Memo
from deltalab.edits.ties import Ties
from experiments.bench.edits import EDITS, pair
from experiments.bench.timing import Times, alternate, ratio

MODELS = {(4096, 4096): 4, (128, 128): 100}
"""Shapes, and how many tensors of it a model has."""


def edit_all(pre: dict, post: dict, edit: object, grad: Tensor, audit: type | None) -> dict:
    """Edit every tensor of a model, and keep them all."""
    extras = Extras(edit.needs, 0, {"grad": lambda *_: grad}, memo=Memo())
    given = None if audit is None else audit()
    return dict(editing.edited(pre, post, edit, "all", extras, audit=given))


def median(a: Times, b: Times) -> str:
    """Say the median over the repeats of how many times as long `a` takes as `b`."""
    return f"{statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True)):.2f}"


def main() -> None:
    """Print the table."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print("shape | edit | ns/weight | with the audit | times the edit | median")
    for shape, count in MODELS.items():
        one, other = pair(shape)
        pre, post = ({f"{n}.weight": t.clone() for n in range(count)} for t in (one, other))
        grad, weights = torch.randn(shape), count * one.numel()
        for name, edit in {**EDITS, "ties": Ties(keep=0.2, scope="tensor")}.items():
            ways: dict[str, Callable[[], object]] = {
                label: partial(edit_all, pre, post, edit, grad, audit)
                for label, audit in (("bare", None), ("audited", Audit))
            }
            times = alternate(ways, repeats, clock=time.process_time)
            bare, audited = times["bare"], times["audited"]
            cost, more = (t.best / weights * 1e9 for t in (bare, audited))
            print(
                f"{shape[0]}x{shape[1]} | {name} | {cost:.2f} | {more:.2f} |"
                f" {ratio(audited, bare)} | {median(audited, bare)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
