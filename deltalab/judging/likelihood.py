"""The log-probability that a language model gives to an output, as a reward."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from deltalab.data.text import Encoder
from deltalab.data.tokens import IGNORED
from deltalab.judging.prompts import Prompts
from deltalab.loss.answers import answer_losses
from deltalab.loss.objectives import evaluating

log = logging.getLogger(__name__)
Said = tuple[str, str]
"""An instruction and an output to it."""


def log_likelihoods(
    module: nn.Module,
    encoder: Encoder,
    prompts: Prompts,
    said: Sequence[Said],
    per_token: bool,
    batch_size: int,
) -> list[float]:
    """Return log p(output | instruction) of every output with its end, in nats.

    What goes beyond the context is left out, which is logged.

    Args:
        module: a causal language model on any device.
        encoder: its tokenizer and context.
        prompts: how an instruction becomes tokens.
        said: instructions and outputs.
        per_token: divide by the number of the output's tokens.
        batch_size: sequences at once; changes nothing beyond rounding.

    Raises:
        ValueError: an instruction that fills the context.
    """
    rows, cut = [], 0
    for instruction, output in said:
        prompt = prompts.ids(encoder, instruction)
        answer = answer_ids(encoder, output, spaced=not prompts.in_chat(encoder))
        if len(prompt) >= encoder.context or not prompt:
            raise ValueError(
                f"the judge's prompt has {len(prompt)} tokens, its context {encoder.context}"
            )
        cut += len(prompt) + len(answer) > encoder.context
        rows.append((prompt, answer[: encoder.context - len(prompt)]))
    if cut:
        log.warning("%d of %d outputs are cut at the judge's context", cut, len(rows))
    order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]) + len(rows[n][1]))
    found = [0.0] * len(rows)
    device = next(module.parameters()).device
    with evaluating(module), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask, labels = (t.to(device) for t in _tensors([rows[n] for n in batch]))
            losses, counts = answer_losses(module, (ids, mask, labels))
            value = -losses.double() / (counts.double() if per_token else 1.0)
            for number, likelihood in zip(batch, value.tolist(), strict=True):
                found[number] = likelihood
    return found


def answer_ids(encoder: Encoder, output: str, spaced: bool) -> list[int]:
    """Return an output's tokens and its end; after a plain prompt a space stands between."""
    text = f" {output}" if spaced and output else output
    ids: list[int] = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = encoder.tokenizer.eos_token_id
    return ids if end is None and ids else [*ids, end if end is not None else 0]


def _tensors(
    rows: Sequence[tuple[list[int], list[int]]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and labels, padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for place, (prompt, answer) in enumerate(rows):
        whole = torch.tensor(prompt + answer)
        ids[place, : len(whole)] = whole
        mask[place, : len(whole)] = 1
        labels[place, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids, mask, labels
