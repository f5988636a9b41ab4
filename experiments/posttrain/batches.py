"""Examples of a run: which train, which are held out, and in what order they come."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from deltalab.data.text import Encoder
from deltalab.data.tokens import IGNORED, Tokens
from experiments.posttrain.recipe import Recipe

Example = tuple[Tokens, ...]
"""One sequence, or a chosen and a rejected one; each a batch of one."""


def examples(recipe: Recipe, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples, in the order of the file.

    Raises:
        ValueError: fewer rows than are to be held out and trained on.
    """
    encoder = Encoder(tokenizer, recipe.context, recipe.chat)
    opened = recipe.source.open(encoder, 1)
    found: list[Example] = [(one,) if len(one) == 3 else one for one in opened]
    if len(found) <= recipe.held:
        raise ValueError(f"--held {recipe.held}: {recipe.data} has {len(found)} rows")
    return found[: -recipe.held][: recipe.limit], found[-recipe.held :]


def joined(chosen: Sequence[Tokens], pad: int) -> Tokens:
    """Join batches of one, padded on the right to the longest."""
    width = max(ids.shape[1] for ids, _, _ in chosen)
    fills = (pad, 0, IGNORED)
    parts = zip(*chosen, strict=True)
    ids, mask, labels = (
        torch.cat([functional.pad(x, (0, width - x.shape[1]), value=fill) for x in part])
        for part, fill in zip(parts, fills, strict=True)
    )
    return ids, mask, labels


def length(example: Example) -> int:
    """Return the tokens of an example's longest sequence."""
    return max(ids.shape[1] for ids, _, _ in example)


def answers(example: Example) -> int:
    """Return how many answer tokens are predicted, in all of an example's sequences."""
    return sum(int((labels[:, 1:] != IGNORED).sum()) for _, _, labels in example)


def order(count: int, recipe: Recipe) -> list[list[int]]:
    """Return every step's examples: each epoch a permutation, its last step possibly short.

    >>> steps = order(5, Recipe("sft", "m", "d", batch=2, epochs=2))
    >>> [len(step) for step in steps], sorted(sum(steps[:3], []))
    ([2, 2, 1, 2, 2, 1], [0, 1, 2, 3, 4])
    """
    draw = torch.Generator().manual_seed(recipe.seed)
    steps = []
    for _ in range(recipe.epochs):
        shuffled = torch.randperm(count, generator=draw).tolist()
        steps += [shuffled[i : i + recipe.batch] for i in range(0, count, recipe.batch)]
    return steps


def micro_batches(found: Sequence[Example], chosen: list[int], size: int) -> list[list[int]]:
    """Cut a step's examples into forward passes of similar length, so that little is padded."""
    ranked = sorted(chosen, key=lambda i: length(found[i]))
    return [ranked[i : i + size] for i in range(0, len(ranked), size)]
