"""Which beginnings rows of tokens share: a tree whose nodes are computed once.

Few-shot examples are the beginning of all prompts of a task, a question that of its choices. A
causal model computes the same keys and values for equal beginnings, so that they serve all rows.
Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

MANY = 16
"""Rows that share a beginning are batched by it alone where there are more than this."""
WORTH = 5
"""A beginning is kept where it saves at least one token in so many."""
Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, eq=False)
class Answer:
    """A continuation whose likelihood is asked for.

    Attributes:
        end: how many tokens of its row it has seen when its last token is predicted.
        tokens: the continuation.
        places: which requests ask for it.
    """

    end: int
    tokens: Tokens
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens that a model is fed, and what is asked of what it says.

    Attributes:
        tokens: at least one.
        first: the first position whose output is looked at.
        answers: the continuations that it scores; none of a prompt.
        places: which requests have this prompt; none of a row that is scored.
    """

    tokens: Tokens
    first: int
    answers: tuple[Answer, ...] = ()
    places: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


def scored(asked: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
    """Return the rows that score continuations, in the order of their tokens.

    A row whose tokens begin another row is a part of it, as a causal model says the same of both,
    unless it is asked about earlier tokens: the other's beginning would end there.

    Args:
        asked: what the model is fed, and the continuation: its last `len(continuation)` outputs.

    >>> (row,) = scored([([1, 2], [3]), ([1, 2], [4]), ([1, 2, 4], [4, 5]), ([1, 2], [3])])
    >>> row.tokens.tolist(), row.first
    ([1, 2, 4], 1)
    >>> [(a.end, a.tokens.tolist(), a.places) for a in row.answers]
    [(3, [4, 5], (2,)), (2, [3], (0, 3)), (2, [4], (1,))]
    >>> [row.tokens.tolist() for row in scored([([1], [2]), ([1, 2], [3])])]
    [[1], [1, 2]]
    """
    wanted: dict[bytes, dict[bytes, list[int]]] = {}
    for place, (fed, said) in enumerate(asked):
        wanted.setdefault(_ordered(fed), {}).setdefault(_ordered(said), []).append(place)
    found: list[tuple[bytes, int, list[Answer]]] = []
    for fed_bytes in sorted(wanted, reverse=True):
        own = [
            Answer(len(fed_bytes) // 4, _read(said_bytes), tuple(places))
            for said_bytes, places in wanted[fed_bytes].items()
        ]
        first = min(answer.end - len(answer.tokens) for answer in own)
        if found and found[-1][0].startswith(fed_bytes) and found[-1][1] <= first:
            found[-1][2].extend(own)
        else:
            found.append((fed_bytes, first, own))
    return [Row(_read(own), first, tuple(answers)) for own, first, answers in reversed(found)]


def prompts(asked: Sequence[Sequence[int]]) -> list[Row]:
    """Return the prompts that are to be continued, each once, in the order of their tokens.

    >>> [(row.tokens.tolist(), row.first, row.places) for row in prompts([[2, 1], [1], [2, 1]])]
    [([1], 0, (1,)), ([2, 1], 1, (0, 2))]
    """
    wanted: dict[bytes, list[int]] = {}
    for place, fed in enumerate(asked):
        wanted.setdefault(_ordered(fed), []).append(place)
    return [Row(_read(own), len(own) // 4 - 1, places=tuple(wanted[own])) for own in sorted(wanted)]


def _ordered(tokens: Sequence[int]) -> bytes:
    """Return tokens as bytes that sort as they do."""
    return np.asarray(tokens, ">u4").tobytes()


def _read(ordered: bytes) -> Tokens:
    return np.frombuffer(ordered, ">u4").astype(np.int32)


@dataclass(eq=False)
class Node:
    """A beginning that many rows share.

    Attributes:
        depth: its tokens.
        tokens: at least these.
        below: longer beginnings of many rows, which begin with this one.
        groups: rows of this beginning alone, and how many tokens each group shares, itself
            included.
    """

    depth: int
    tokens: Tokens
    below: list["Node"] = field(default_factory=list)
    groups: list[tuple[int, list[Row]]] = field(default_factory=list)


def tree(rows: Sequence[Row], share: bool = True) -> Node:
    """Return which beginnings of rows are worth to be computed once.

    Args:
        rows: in the order of their tokens.
        share: whether anything may be; else every row is a group of its own.

    >>> of = [[9, 9, 9, n, n + 1, last] for n in range(9) for last in (7, 8)]
    >>> top = tree(scored([(fed, [0]) for fed in of]))
    >>> top.depth, [node.depth for node in top.below]
    (0, [3])
    >>> {(shared, len(group)) for shared, group in top.below[0].groups}
    {(5, 2)}
    """
    if not share or not rows:
        return Node(0, np.zeros(0, np.int32), groups=[(0, [row]) for row in rows])
    shared = np.array([_common(a, b) for a, b in pairwise(rows)], np.int64)
    firsts = np.array([row.first for row in rows])
    lengths = np.array([len(row) for row in rows])

    def least(low: int, high: int) -> int:
        """Return how many tokens may be shared by rows [low, high), two or more."""
        return int(min(shared[low : high - 1].min(), firsts[low:high].min()))

    def parts(low: int, high: int) -> list[tuple[int, int]]:
        """Split rows where neighbours share the least."""
        inner = shared[low : high - 1]
        cuts = (low + 1 + np.flatnonzero(inner == inner.min())).tolist()
        return list(zip([low, *cuts], [*cuts, high], strict=True))

    def node(low: int, high: int, depth: int) -> Node:
        made = Node(depth, rows[low].tokens)
        waiting = [(low, high)]
        while waiting:
            start, stop = waiting.pop()
            if stop - start == 1:
                made.groups.append((depth, [rows[start]]))
                continue
            common = least(start, stop)
            saved = (stop - start - 1) * (common - depth)
            worth = WORTH * saved >= int(lengths[start:stop].sum()) - (stop - start) * depth
            if worth and stop - start > MANY:
                made.below.append(node(start, stop, common))
                continue
            split = parts(start, stop)
            if worth and saved >= sum(
                (b - a - 1) * max(least(a, b) - depth, 0) for a, b in split if b - a > 1
            ):
                made.groups.append((common, list(rows[start:stop])))
                continue
            waiting.extend(split)
        return made

    return node(0, len(rows), 0)


def _common(a: Row, b: Row) -> int:
    """Return how many tokens two rows begin with alike."""
    size = min(len(a), len(b))
    other = np.flatnonzero(a.tokens[:size] != b.tokens[:size])
    return int(other[0]) if len(other) else size
