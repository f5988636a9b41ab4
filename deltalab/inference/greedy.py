"""Greedy decoding of many prompts: beginnings computed once, finished rows replaced by new ones.

Rows of a batch end at one place and begin where they begin, as when a tokenizer fills them up on
the left. A row that has ended is dropped from the batch, and its place given to the next prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from deltalab.inference.beginnings import Node, Row, Tokens, tree
from deltalab.inference.budget import Budget, out_of_memory
from deltalab.inference.passes import Kept, Passes, before, held, right_aligned

DROP = 8
"""Ended rows leave a batch when they are at least one in so many."""
TIE = 1e-4
"""Two best logits that differ by less than this, of the best, may change places by rounding."""


@dataclass(eq=False)
class Text:
    """What was generated for a prompt.

    Attributes:
        row: the prompt.
        tokens: its continuation so far, with what ended it.
        near: how often the two best logits were too close to tell which is the better one.
    """

    row: Row
    tokens: list[int] = field(default_factory=list)
    near: int = 0


@dataclass(eq=False)
class _Batch:
    """Rows that are being continued.

    Attributes:
        texts: of every row.
        kept: keys and values, every row's at the end.
        lengths: how many entries of `kept` are a row's.
        last: the token of every row that the next pass is fed.
    """

    texts: list[Text]
    kept: Kept
    lengths: list[int]
    last: list[int]

    def chosen(self, rows: Sequence[int]) -> "_Batch":
        """Return some of the rows, without entries that are none's."""
        size = self.kept[0][0].shape[2]
        cut = size - max(self.lengths[n] for n in rows)
        which = torch.tensor(rows, device=self.kept[0][0].device)

        def of(tensor: Tensor) -> Tensor:
            return tensor[:, :, cut:].index_select(0, which)

        return _Batch(
            [self.texts[n] for n in rows],
            [(of(keys), of(values)) for keys, values in self.kept],
            [self.lengths[n] for n in rows],
            [self.last[n] for n in rows],
        )

    def with_rows(self, other: "_Batch") -> "_Batch":
        """Return the rows of both."""
        size = max(each.kept[0][0].shape[2] for each in (self, other))

        def of(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat(
                [functional.pad(each, (0, 0, size - each.shape[2], 0)) for each in (a, b)]
            )

        kept = zip(self.kept, other.kept, strict=True)
        return _Batch(
            self.texts + other.texts,
            [(of(a[0], b[0]), of(a[1], b[1])) for a, b in kept],
            self.lengths + other.lengths,
            self.last + other.last,
        )


def continued(
    passes: Passes,
    rows: Sequence[Row],
    room: Callable[[Row], int],
    ended: Callable[[Sequence[int]], bool],
    budget: Budget,
) -> Iterator[list[Text]]:
    """Yield texts as they end.

    Args:
        passes: of a model whose beginnings can be kept (`passes.refusal`).
        rows: prompts in the order of their tokens, as from `beginnings.prompts`.
        room: the most tokens that may follow a prompt, at least 1.
        ended: whether a continuation ends with its last token.
        budget: of a pass.
    """
    pending = list(rows)
    while pending:
        done: set[int] = set()
        sizes: list[int] = []
        ran_out = None
        try:
            for texts in _stream(passes, pending, room, ended, budget, sizes.append):
                done.update(id(text.row) for text in texts)
                yield texts
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (sizes and sizes[-1] == 1):
                raise
            ran_out = sizes[-1] if sizes else 2
        pending = [row for row in pending if id(row) not in done]
        if ran_out:
            budget.ran_out(ran_out)


def _stream(
    passes: Passes,
    rows: Sequence[Row],
    room: Callable[[Row], int],
    ended: Callable[[Sequence[int]], bool],
    budget: Budget,
    told: Callable[[int], None],
) -> Iterator[list[Text]]:
    longest = max(len(row) + room(row) for row in rows)
    waiting = _Waiting(passes, rows)
    batch: _Batch | None = None
    over: set[int] = set()

    def choose(rows: _Batch, logits: Tensor) -> list[int]:
        """Give every row its next token; return which have ended."""
        logits = logits.float()
        top = logits.topk(2).values
        near = (top[:, 0] - top[:, 1] <= TIE * top[:, 0].abs()).tolist()
        rows.last = logits.argmax(-1).tolist()
        found = []
        for n, (text, token) in enumerate(zip(rows.texts, rows.last, strict=True)):
            if rows is batch and n in over:
                continue
            text.tokens.append(token)
            text.near += near[n]
            if len(text.tokens) >= room(text.row) or ended(text.tokens):
                found.append(n)
        return found

    more = True  # whether further rows may fit
    while batch is not None or waiting:
        if batch is not None and over and DROP * len(over) >= len(batch.texts):
            left = [n for n in range(len(batch.texts)) if n not in over]
            batch, over, more = (batch.chosen(left) if left else None), set(), True
        if waiting and (more or batch is None):
            live = [] if batch is None else [text.row for text in batch.texts]
            size = max((len(row) + room(row) for row in live), default=0)
            new = waiting.take(len(live), size, room, budget, longest)
            more = new is not None
            if new is not None:
                told(len(live) + len(new[2]))
                fresh, logits = _begun(passes, *new)
                out = choose(fresh, logits)
                if out:
                    yield [fresh.texts[n] for n in out]
                left = [n for n in range(len(fresh.texts)) if n not in out]
                if left:
                    fresh = fresh.chosen(left) if out else fresh
                    batch = fresh if batch is None else batch.with_rows(fresh)
                continue
        if batch is None:
            continue
        told(len(batch.texts))
        size = batch.kept[0][0].shape[2]
        ids = torch.tensor(batch.last, device=passes.device)[:, None]
        cache = before(batch.kept, len(batch.texts))
        unlike = any(length != size for length in batch.lengths)
        lengths = torch.tensor(batch.lengths, device=passes.device) if unlike else None
        logits = passes(ids, [0], cache, lengths)[:, -1]
        batch.kept = held(cache)
        batch.lengths = [n + (k not in over) for k, n in enumerate(batch.lengths)]
        budget.passed(len(batch.texts) * (size + 1))
        out = choose(batch, logits)
        if out:
            yield [batch.texts[n] for n in out]
            over.update(out)


class _Waiting:
    """Prompts that are not begun yet, by the beginning that they share."""

    def __init__(self, passes: Passes, rows: Sequence[Row]) -> None:
        self._passes = passes
        self._nodes = self._walked(tree(rows), [], 0)
        self._now: tuple[int, Kept, list[Row]] | None = next(self._nodes, None)

    def _walked(self, node: Node, kept: Kept, depth: int) -> Iterator[tuple[int, Kept, list[Row]]]:
        kept = self._longer(kept, node.tokens[depth : node.depth])
        alone = [row for _, group in node.groups if len(group) == 1 for row in group]
        if alone:
            yield node.depth, kept, sorted(alone, key=len)
        for shared, group in node.groups:
            if len(group) > 1:
                longer = self._longer(kept, group[0].tokens[node.depth : shared])
                yield shared, longer, sorted(group, key=len)
        for child in node.below:
            yield from self._walked(child, kept, node.depth)

    def _longer(self, kept: Kept, tokens: Tokens) -> Kept:
        return self._passes.extended(kept, self._passes.padded([tokens])) if len(tokens) else kept

    def __bool__(self) -> bool:
        return self._now is not None

    def take(
        self, live: int, size: int, room: Callable[[Row], int], budget: Budget, longest: int
    ) -> tuple[int, Kept, list[Row]] | None:
        """Return the longest prompts of one beginning that fit beside `live` rows of `size`."""
        if self._now is None:
            return None
        depth, kept, rows = self._now
        taken: list[Row] = []
        length = size
        while rows:
            length = max(length, len(rows[-1]) + room(rows[-1]))
            if not budget.fits(live + len(taken) + 1, length, longest):
                break
            taken.append(rows.pop())
        if not rows:
            self._now = next(self._nodes, None)
        return (depth, kept, taken) if taken else None


def _begun(passes: Passes, depth: int, kept: Kept, rows: Sequence[Row]) -> tuple[_Batch, Tensor]:
    """Return prompts with their keys and values, and the logits of what comes next."""
    ids = passes.padded([row.tokens[depth:] for row in rows])
    cache = before(kept, len(rows))
    lengths = [len(row) for row in rows]
    places = {length: place for place, length in enumerate(sorted(set(lengths)))}
    logits = passes(ids, [length - depth - 1 for length in places], cache)
    which = torch.tensor([places[length] for length in lengths], device=passes.device)
    logits = logits[torch.arange(len(rows), device=passes.device), which]
    unused = [depth + ids.shape[1] - length for length in lengths]
    texts = [Text(row) for row in rows]
    return _Batch(texts, right_aligned(held(cache), unused), lengths, [0] * len(rows)), logits
