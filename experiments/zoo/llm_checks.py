"""Edits of the embedded language-model pairs: exact match, loss, and the size of the deltas.

As for the image pairs, the edits are written apart from ``deltalab.edits`` (in
``experiments.zoo.checks``): they decide whether a pair is fit to ship.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from experiments.zoo.checks import Edit, bitdelta, drop, low_rank, moved, shift_of, ties
from experiments.zoo.llm_prefer import Preference, margins, reward
from experiments.zoo.llm_problems import Problem
from experiments.zoo.llm_score import answer_loss, exact_match

Weights = Mapping[str, Tensor]
PARTS = {
    "attention": "self_attn",
    "mlp": "mlp",
    "norm": "norm",
    "embedding": "embed_tokens",
    "head": "lm_head",
}
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
ALPHAS = (-0.5, 0.2, 0.5, 1.0)
FEW = ("keep", "discard", "dare p=0.5", "dare p=0.9", "ties keep=0.1", "bitdelta", "expo +0.5")
DPO_ALPHAS = (-1.0, -0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)


def relative_delta(pre: Weights, post: Weights, part: str = "") -> float:
    """Return the Frobenius norm ``|post - pre| / |post|`` of one part; of everything if empty.

    >>> import torch
    >>> relative_delta({"lm_head.weight": torch.zeros(4)}, {"lm_head.weight": torch.ones(4)})
    1.0
    """
    names = [name for name in post if PARTS.get(part, "") in name]
    delta = sum((post[n].double() - pre[n].double()).square().sum().item() for n in names)
    return math.sqrt(delta / sum(post[n].double().square().sum().item() for n in names))


def deltas(pre: Weights, post: Weights) -> dict[str, float]:
    """Return the relative size of the delta, whole and by part."""
    return {part or "all": relative_delta(pre, post, part) for part in ("", *PARTS)}


def tried_edits(seed: int) -> dict[str, Edit]:
    """Return the edits that every pair is tried with."""
    edits: dict[str, Edit] = {"keep": lambda d: d, "discard": lambda d: 0 * d}
    edits |= {f"dare p={p:g}": drop(p, True, seed) for p in RATES}
    edits["drop-only p=0.5"] = drop(0.5, False, seed)
    edits |= {f"ties keep={k:g}": ties(k) for k in (0.5, 0.1)}
    edits["bitdelta"] = bitdelta
    edits |= {f"svd rank={r}": low_rank(r) for r in (4, 16)}
    edits |= {f"expo {a:+g}": (lambda d, a=a: (1 + a) * d) for a in ALPHAS}
    return edits


@dataclass(frozen=True)
class Result:
    """Exact match (mean and each seed) and answer loss in nats per token, mean over seeds."""

    edit: str
    exact: float
    each: tuple[float, ...]
    loss: float


def try_edits(
    model: nn.Module,
    tokenizer: Any,
    pair: tuple[Weights, Weights],
    problems: Sequence[Problem],
    seeds: int,
    names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Score every edit of the tensors of two dimensions on problems; post first.

    Args:
        model: Any model of the architecture; it is left with the last edit's weights.
        tokenizer: Its tokenizer.
        pair: Pre- and post-trained weights.
        problems: What to score on.
        seeds: How many times dropping edits are drawn.
        names: Which edits; all when empty.
    """
    pre, post = pair
    rows = []
    for name in names or tried_edits(0):
        scores, losses = [], []
        for seed in range(seeds if "p=" in name else 1):
            shift = shift_of(pre, post, tried_edits(seed)[name])
            model.load_state_dict(moved(post, shift))
            right, _ = exact_match(model, tokenizer, problems)
            scores.append(sum(right) / len(right))
            losses.append(answer_loss(model, tokenizer, problems))
        row = Result(name, sum(scores) / len(scores), tuple(scores), sum(losses) / len(losses))
        rows.append(asdict(row))
        print(f"  {name}: exact match {row.exact:.3f}, loss {row.loss:.4f}", flush=True)
    return rows


def dpo_line(
    model: nn.Module,
    tokenizer: Any,
    pair: tuple[Weights, Weights],
    pairs: Sequence[Preference],
) -> list[dict[str, float]]:
    """Return DPO loss and implicit-reward accuracy of ``post + alpha (post - pre)``."""
    pre, post = pair
    model.load_state_dict(pre)
    reference = margins(model, tokenizer, pairs)
    rows = []
    for alpha in DPO_ALPHAS:
        model.load_state_dict(moved(post, shift_of(pre, post, lambda d, a=alpha: (1 + a) * d)))
        loss, accuracy = reward(margins(model, tokenizer, pairs) - reference)
        rows.append({"alpha": alpha, "loss": loss, "accuracy": accuracy})
    return rows
