"""Batched generation that is kept as it comes, so that a killed run goes on where it stopped."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltalab.data.text import Encoder
from deltalab.judging.decoding import Decoding, sampler
from deltalab.judging.kept import add_lines, lines
from deltalab.loss.objectives import evaluating
from deltalab.store.digests import key_of
from deltalab.terminal.console import steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What a model said: the text, its tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def digest(module: nn.Module) -> str:
    """Return a hash of all parameters and buffers, and of the architecture, in 16 digits.

    Every byte counts: two edits that differ in one weight are two models.
    """
    found = hashlib.sha256()
    held: Any = getattr(module, "config", None)
    config: dict[str, Any] = held.to_dict() if hasattr(held, "to_dict") else {}
    kept = {k: repr(v) for k, v in config.items() if k[0] != "_" and k != "transformers_version"}
    found.update(repr(sorted(kept.items())).encode())
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        for piece in flat.split(1 << 26):
            found.update(piece.cpu().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def outputs(
    module: nn.Module,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    batch_size: int,
    directory: Path,
    state: str,
) -> list[Output]:
    """Return the module's output to every prompt, generating what is not kept.

    Batches are cut from the prompts in order of length, whatever is kept already, so that a run
    that goes on generates the same batches; each is kept when it is done. How they are cut decides
    nothing beyond the rounding of logits.

    Args:
        module: a causal language model of transformers.
        encoder: its tokenizer and context.
        prompts: tokens; different ones.
        decoding: how to draw.
        batch_size: prompts at once.
        directory: where outputs are kept, in one file for each model and decoding.
        state: what identifies the module's weights, `digest`.

    Raises:
        ValueError: a prompt that fills the context.
    """
    path = directory / f"{key_of({'state': state, **asdict(decoding)})}.jsonl"
    keys = [_key(ids) for ids in prompts]
    held = {str(row["prompt"]): row for row in lines(path) if _whole(row)}
    if done := sum(key in held for key in keys):
        log.info("%d of %d outputs are kept in %s", done, len(keys), path)
    cut = list(_batches(prompts, decoding.max_new_tokens, encoder.context, batch_size))
    left = [(batch, limit) for batch, limit in cut if any(keys[n] not in held for n in batch)]
    with steps("outputs", len(left)) as step:
        for batch, limit in left:
            names = [keys[n] for n in batch]
            said = _generate(module, encoder, [prompts[n] for n in batch], names, decoding, limit)
            rows = {key: asdict(output) for key, output in zip(names, said, strict=True)}
            fresh = {key: {"prompt": key, **rows[key]} for key in rows if key not in held}
            add_lines(path, fresh.values())
            held |= fresh
            step()
    return [Output(held[k]["text"], held[k]["tokens"], held[k]["ended"]) for k in keys]


def _key(ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()[:16]


def _whole(row: dict[str, Any]) -> bool:
    kinds = {"prompt": str, "text": str, "tokens": int, "ended": bool}
    return all(type(row.get(name)) is kind for name, kind in kinds.items())


def _batches(
    prompts: Sequence[list[int]], most: int, context: int, size: int
) -> Iterator[tuple[list[int], int]]:
    """Yield positions of prompts by length and how many tokens each may get.

    A prompt that leaves less than `most` tokens of the context comes alone: with others, how many
    it gets would depend on them.
    """
    order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), n))
    for number in order:
        if not 0 < len(prompts[number]) < context:
            raise ValueError(
                f"the prompt of instruction {number} has {len(prompts[number])} tokens, the model's"
                f" context {context}"
            )
    short = [n for n in order if len(prompts[n]) + most <= context]
    for start in range(0, len(short), size):
        yield short[start : start + size], most
    for number in order[len(short) :]:
        yield [number], context - len(prompts[number])


def _generate(
    module: nn.Module,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    decoding: Decoding,
    limit: int,
) -> list[Output]:
    """Generate one batch, padded on the left."""
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(map(len, prompts))
    ends = end_tokens(module, encoder)
    pad = ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    device = next(module.parameters()).device
    model: Any = module
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            max_new_tokens=limit, do_sample=False, eos_token_id=ends or None, pad_token_id=pad
        ),
    )  # the checkpoint's own may hold penalties and temperatures, which would join in
    try:
        with evaluating(module), torch.inference_mode():
            drawn = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=LogitsProcessorList(sampler(decoding, names, width)),
            )
    finally:
        model.generation_config = own
    said = []
    for row in drawn[:, width:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        text = encoder.tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
        said.append(Output(text, len(row[:stop]), stop is not None))
    return said


def end_tokens(module: nn.Module, encoder: Encoder) -> list[int]:
    """Return the tokens that end an output: the tokenizer's, and those of the checkpoint."""
    own = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    found = [encoder.tokenizer.eos_token_id, *listed]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
