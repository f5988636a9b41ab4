"""Log-likelihoods of continuations, beginnings computed once, in passes that fill a budget."""

from collections.abc import Callable, Iterator, Sequence

import torch

from deltalab.inference.beginnings import Answer, Node, Row, tree
from deltalab.inference.budget import Budget, out_of_memory
from deltalab.inference.passes import Kept, Passes, before

Said = tuple[Answer, tuple[float, bool]]
"""A continuation, its log-likelihood, and whether greedy decoding would have given it."""
ALIKE = 0.75
"""Beginnings of a pass are cut to the shortest, which has at least this share of the longest."""


def answers(
    passes: Passes, rows: Sequence[Row], budget: Budget, share: bool = True
) -> Iterator[list[Said]]:
    """Yield what every pass says of its continuations.

    Args:
        passes: of the model.
        rows: in the order of their tokens, as from `beginnings.scored`.
        budget: of a pass.
        share: whether beginnings are computed once.
    """
    pending = list(rows)
    longest = max(map(len, rows), default=0)
    while pending:
        done: set[int] = set()
        sizes: list[int] = []
        ran_out = None
        try:
            for part in _below(passes, tree(pending, share), [], 0, budget, longest, sizes.append):
                done.update(id(row) for row, _ in part)
                yield [said for _, own in part for said in own]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (sizes and sizes[-1] == 1):
                raise
            ran_out = sizes[-1] if sizes else 2
        pending = [row for row in pending if id(row) not in done]
        if ran_out:  # here nothing holds the frames of what ran out any more
            budget.ran_out(ran_out)


Part = list[tuple[Row, list[Said]]]


def _below(
    passes: Passes,
    node: Node,
    kept: Kept,
    depth: int,
    budget: Budget,
    longest: int,
    told: Callable[[int], None],
) -> Iterator[Part]:
    """Yield the answers of all rows of a node, pass by pass.

    Args:
        passes: of the model.
        node: whose rows are scored.
        kept: a beginning of the node.
        depth: its tokens.
        budget: of a pass.
        longest: tokens of the longest row of all.
        told: hears how many rows a pass has, before it.
    """
    if node.depth > depth:
        told(1)
        kept = passes.extended(kept, passes.padded([node.tokens[depth : node.depth]]))
    depth = node.depth
    alone = [row for _, group in node.groups if len(group) == 1 for row in group]
    for rows in _filled(sorted(alone, key=len, reverse=True), budget, longest):
        told(len(rows))
        yield _pass(passes, rows, kept, len(rows), depth, budget)
    several = sorted((g for g in node.groups if len(g[1]) > 1), key=lambda g: -g[0])
    for groups in _filled_groups(several, depth, budget, longest):
        common = min(shared for shared, _ in groups)
        rows = [row for _, group in groups for row in group]
        told(len(rows))
        if common == depth:
            yield _pass(passes, rows, kept, len(rows), depth, budget)
            continue
        firsts = passes.padded([group[0].tokens[depth:common] for _, group in groups])
        own = passes.extended(kept, firsts)
        sizes = torch.tensor([len(group) for _, group in groups])
        which = torch.repeat_interleave(torch.arange(len(groups)), sizes).to(passes.device)
        yield _pass(passes, rows, own, which, common, budget)
    for child in node.below:
        yield from _below(passes, child, kept, depth, budget, longest, told)


def _filled(rows: Sequence[Row], budget: Budget, longest: int) -> Iterator[list[Row]]:
    """Cut rows, the longest first, into passes."""
    start = 0
    while start < len(rows):
        count = 1
        while start + count < len(rows) and budget.fits(count + 1, len(rows[start]), longest):
            count += 1
        yield list(rows[start : start + count])
        start += count


def _filled_groups(
    groups: Sequence[tuple[int, list[Row]]], depth: int, budget: Budget, longest: int
) -> Iterator[list[tuple[int, list[Row]]]]:
    """Cut groups, those that share the most first, into passes; a large one into several."""
    waiting = list(groups)[::-1]
    while waiting:
        taken: list[tuple[int, list[Row]]] = []
        length = rows = 0
        while waiting:
            shared, group = waiting[-1]
            length = max(length, *map(len, group))
            if taken and (
                shared - depth < ALIKE * (taken[0][0] - depth)
                or not budget.fits(rows + len(group), length, longest)
            ):
                break
            waiting.pop()
            most = max(budget.tokens(longest) // length, 1)
            if not taken and len(group) > most:
                waiting.append((shared, group[most:]))
                group = group[:most]
            taken.append((shared, group))
            rows += len(group)
        yield taken


def _pass(
    passes: Passes,
    rows: Sequence[Row],
    kept: Kept,
    before_each: int | torch.Tensor,
    depth: int,
    budget: Budget,
) -> Part:
    """Return the answers of rows in one pass, after a beginning of so many tokens."""
    ids = passes.padded([row.tokens[depth:] for row in rows])
    pairs = [(n, p) for n, row in enumerate(rows) for p in range(row.first, len(row))]
    at = {pair: place for place, pair in enumerate(pairs)}
    places = {p: place for place, p in enumerate(sorted({p for _, p in pairs}))}
    logits = passes(ids, [p - depth for p in places], before(kept, before_each) if kept else None)
    which = torch.tensor([(n, places[p]) for n, p in pairs], device=logits.device).T
    said = torch.log_softmax(logits[which[0], which[1]], -1)
    best = said.argmax(-1)
    wanted = [(n, answer) for n, row in enumerate(rows) for answer in row.answers]
    lines = [at[n, answer.end - len(answer.tokens)] for n, answer in wanted]
    spans = [slice(a, a + len(answer.tokens)) for a, (_, answer) in zip(lines, wanted, strict=True)]
    entries = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(said.device)
    tokens = torch.cat([torch.from_numpy(answer.tokens) for _, answer in wanted]).long()
    tokens = tokens.to(said.device)
    likely, greedy = said[entries, tokens].cpu(), (best[entries] == tokens).cpu()
    budget.passed(len(rows) * (depth + ids.shape[1]))
    found: Part = [(row, []) for row in rows]
    done = 0
    for n, answer in wanted:
        end = done + len(answer.tokens)
        value = float(likely[done:end].sum()), bool(greedy[done:end].all())
        found[n][1].append((answer, value))
        done = end
    return found
