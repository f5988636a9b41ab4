"""A language model on this machine, opened to judge."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.data.text import Encoder
from deltalab.judging.comparisons import FIRST, SECOND, Messages, share
from deltalab.judging.prompts import chat_ids
from deltalab.loss.objectives import evaluating
from deltalab.store.latest import latest
from deltalab.weights import contents

log = logging.getLogger(__name__)


@latest("judge", "evaluator")
def open_model(path: str, device: str, dtype: str) -> tuple[nn.Module, Encoder]:
    """Return a causal language model and its encoder; consecutive calls share it.

    Raises:
        ValueError: nothing that transformers can open.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"evaluator.judge.path={path}: cannot be opened ({reason})") from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"evaluator.judge.device={device}: {reason}") from None
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    chat = getattr(tokenizer, "chat_template", None) is not None
    return model, Encoder(tokenizer, int(context), chat)


def identity(path: str) -> dict[str, Any]:
    """Return what identifies a model in a cache: its files' content, or a hub id."""
    place = Path(path).expanduser()
    return {"weights": contents.of_checkpoint(place)} if place.is_dir() else {"id": path}


def first_shares(
    model: nn.Module, encoder: Encoder, prompts: Sequence[Messages]
) -> list[float | None]:
    """Return the probability of `m` against `M` as the next token; None where a prompt is too long.

    The tokens that spell a letter are taken together, with and without a space in front.

    Args:
        model: a causal language model.
        encoder: its tokenizer and context.
        prompts: messages; without a chat template their texts in order.

    Raises:
        ValueError: the tokenizer has no single tokens for the two letters.
    """
    spelling = letters(encoder.tokenizer)
    rows = [_ids(encoder, prompt) for prompt in prompts]
    fits = [0 < len(row) <= encoder.context for row in rows]
    if not all(fits):
        log.warning("%d of %d prompts exceed the judge's context", fits.count(False), len(rows))
    kept = [row for row, fit in zip(rows, fits, strict=True) if fit]
    shares = iter(_shares(model, kept, spelling) if kept else [])
    return [next(shares) if fit else None for fit in fits]


def letters(tokenizer: Any) -> dict[str, list[int]]:
    """Return the tokens that spell each letter alone."""
    found: dict[str, list[int]] = {}
    for letter in (FIRST, SECOND):
        tokens = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (letter, f" {letter}")
        ]
        single = {ids[-1] for ids in tokens if ids}
        found[letter] = sorted(t for t in single if tokenizer.decode([t]).strip() == letter)
        if not found[letter]:
            raise ValueError(f"evaluator.judge.path: the tokenizer has no token for {letter!r}")
    return found


def _ids(encoder: Encoder, messages: Messages) -> list[int]:
    if not encoder.chat:
        ids: list[int] = encoder.tokenizer("\n\n".join(m["content"] for m in messages) + "\n")[
            "input_ids"
        ]
        return ids[:-1] if ids and ids[-1] == encoder.tokenizer.eos_token_id else ids
    where = "evaluator.judge"
    try:
        return chat_ids(encoder, messages, where)
    except ValueError:  # some templates know no system message
        whole = "\n\n".join(m["content"] for m in messages)
        return chat_ids(encoder, [{"role": "user", "content": whole}], where)


def _shares(
    model: nn.Module, rows: Sequence[list[int]], spelling: dict[str, list[int]]
) -> list[float | None]:
    """Return the letters' shares at the end of every row, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = next(model.parameters()).device
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with evaluating(model), torch.inference_mode():
        logits: Tensor = model(
            ids.to(device),
            attention_mask=mask.to(device),
            position_ids=places.to(device),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    chances = logits.double().log_softmax(-1).cpu()
    return [
        share({k: float(row[tokens].logsumexp(0)) for k, tokens in spelling.items()})
        for row in chances
    ]
