"""One rule of splits: half A of the examples tunes, half B and the test split judge.

Whatever is fitted to data (scales, rescale factors, activations, budgets, which setting is best)
reads half A alone; what is then reported of it comes from half B, or from documents that nothing
was chosen on. The halves are the same in every run, on every machine and for every model: they
follow from an example's place in its source alone.

An edit that is fitted to nothing is judged on all examples. The gradient is no fit: the edits that
read it (`grad`, Table 1 of arXiv 2410.13841) are defined by the very loss that they change.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, TypeVar

Half = Literal["A", "B"]
HALVES: tuple[Half, Half] = ("A", "B")
TUNED = ("acts", "scale", "gram", "fisher", "entropy", "share")
"""What an edit may ask for that is fitted to the objective's examples."""

Opened = TypeVar("Opened")


@cache
def half_of(index: int) -> Half:
    """Return the half of the example at a place, counted from 0.

    Of every two examples that follow each other one is in each half, which one is drawn by a hash:
    halves of a sorted source hold all of its classes, and no period of it falls into one half.

    >>> "".join(half_of(i) for i in range(16))
    'BAABBAABABABABAB'
    """
    turned = hashlib.sha256(f"half {index // 2}".encode()).digest()[0] % 2
    return HALVES[(index + turned) % 2]


def places(count: int, half: Half | None) -> list[int]:
    """Return the places of a half of so many examples; all of them where `half` is None.

    >>> places(4, "A"), places(4, None)
    ([1, 2], [0, 1, 2, 3])
    """
    return [i for i in range(count) if half is None or half_of(i) == half]


def tunes(needs: Iterable[str]) -> bool:
    """Tell whether an edit with these needs is fitted to the objective's examples.

    >>> tunes(["rng"]), tunes(["rng", "acts"])
    (False, True)
    """
    return any(need in TUNED for need in needs)


def halved(loss: Opened, half: Half | None) -> Opened:
    """Return an opened objective on one half of its examples; itself where `half` is None.

    Args:
        loss: a dataclass with `batches`, each a tensor or nested tuples of tensors whose first axis
            counts the examples.
        half: which.

    Raises:
        ValueError: the half has no example.
    """
    if half is None:
        return loss
    batches: Sequence[Any] = loss.batches  # type: ignore[attr-defined]
    kept, start = [], 0
    for batch in batches:
        count = examples(batch)
        rows = [i - start for i in range(start, start + count) if half_of(i) == half]
        if rows:
            kept.append(rows_of(batch, rows))
        start += count
    if not kept:
        raise ValueError(
            f"objective: half {half} of its {start} example{'s' * (start != 1)} is empty; an edit"
            " that is fitted to data needs at least two, one to fit and one to judge by"
        )
    found: Opened = replace(loss, batches=tuple(kept))  # type: ignore[type-var]
    return found


def examples(batch: Any) -> int:
    """Return how many examples a batch has."""
    return examples(batch[0]) if isinstance(batch, tuple) else len(batch)


def rows_of(batch: Any, rows: list[int]) -> Any:
    """Return some examples of a batch."""
    return tuple(rows_of(b, rows) for b in batch) if isinstance(batch, tuple) else batch[rows]
