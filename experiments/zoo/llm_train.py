"""Training of the embedded language models: one phase is one frozen set of hyper-parameters."""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
Sequence_ = tuple[list[int], int]  # token ids and the index of the first one that is learnt
ARCHITECTURE = {
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Untied as in the paper's Llama-3-8B, Mistral-7B and Qwen2-7B, so that an edit of the head is
    # an edit of the head alone; with 507 words it costs a twentieth of the parameters.
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
SMALL = ARCHITECTURE | {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
}
POOL = 16  # batches that are drawn together and sorted by length


@dataclass(frozen=True)
class Phase:
    """Hyper-parameters of one training phase: AdamW, warm-up, cosine to a tenth, cool-down.

    Attributes:
        steps: Optimiser steps.
        rate: Highest learning rate.
        batch: Sequences per step.
        warmup: Steps of linear warm-up.
        horizon: Steps over which the cosine falls to a tenth; `steps` when None.
        cool: Last steps, over which the rate is taken linearly to zero besides.
        decay: AdamW's weight decay, towards zero.
        fast: Whether matrix products run in bfloat16 (weights and optimiser stay in float32) and
            the step is compiled, which needs a C++ compiler; twice as fast on a processor.
    """

    steps: int
    rate: float
    batch: int = 64
    warmup: int = 50
    horizon: int | None = None
    cool: int = 0
    decay: float = 0.0
    fast: bool = False

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step in ``0 ... steps - 1``.

        >>> Phase(steps=100, rate=1.0, warmup=10).rate_at(4)
        0.5
        >>> round(Phase(steps=110, rate=1.0, warmup=10).rate_at(60), 6)
        0.55
        """
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, (self.horizon or self.steps) - self.warmup)
        left = min(1.0, (self.steps - step) / self.cool) if self.cool else 1.0
        return self.rate * left * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def make_model(
    tokenizer: Any, seed: int, architecture: Mapping[str, Any] = ARCHITECTURE
) -> nn.Module:
    """Build the randomly initialised Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **architecture,
    )
    # Written out, attention is twice as fast in bfloat16 on a processor as torch's fused one.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def collate(sequences: list[Sequence_], pad: int) -> tuple[Tensor, Tensor]:
    """Pad on the right; return ids and labels, both (n, longest), labels of prompts ignored."""
    longest = max(len(ids) for ids, _ in sequences)
    tokens = torch.full((len(sequences), longest), pad)
    labels = torch.full((len(sequences), longest), IGNORED)
    for row, (ids, first) in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, first : len(ids)] = torch.tensor(ids[first:])
    return tokens, labels


def loss_sums(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return every sequence's summed loss in nats and its number of learnt tokens."""
    tokens, labels = batch
    # Causal attention and padding on the right: no mask is needed.
    logits = module(tokens, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(1), (targets != IGNORED).sum(1)


def batches(
    draw: Callable[[random.Random], Sequence_], size: int, seed: str, start: int
) -> Iterator[list[Sequence_]]:
    """Yield batches of sequences of similar length for ever, from batch ``start`` on.

    Every pool of ``POOL`` batches has a generator of its own, so that a resumed training sees
    what an uninterrupted one sees.
    """
    pool = start // POOL
    skip = start % POOL
    while True:
        rng = random.Random(f"{seed}:{pool}")
        sequences = sorted((draw(rng) for _ in range(size * POOL)), key=lambda s: len(s[0]))
        cut = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        rng.shuffle(cut)
        yield from cut[skip:]
        pool, skip = pool + 1, 0


def train(
    model: nn.Module,
    draw: Callable[[random.Random], Sequence_],
    phase: Phase,
    seed: str,
    on_step: Callable[[int, float], None],
    checkpoint: Path,
    every: int = 250,
) -> None:
    """Train in place, resuming from ``checkpoint`` if it exists; it is removed at the end.

    Args:
        model: The model, in float32.
        draw: Draws one training sequence.
        phase: Hyper-parameters.
        seed: Of the drawing.
        on_step: Called as ``on_step(steps done, loss per token of the batch)`` after each step.
        checkpoint: Where the state goes every ``every`` steps.
        every: See there.
    """
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=phase.rate, weight_decay=phase.decay, betas=(0.9, 0.95)
    )
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["done"]
    stream = batches(draw, phase.batch, seed, done)
    pad = model.config.pad_token_id
    losses = torch.compile(loss_sums, dynamic=True) if phase.fast else loss_sums
    for step in range(done, phase.steps):
        optimiser.param_groups[0]["lr"] = phase.rate_at(step)
        model.train()
        with torch.autocast("cpu", torch.bfloat16) if phase.fast else nullcontext():
            sums, counts = losses(model, collate(next(stream), pad))
        loss = sums.sum() / counts.sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        on_step(step + 1, loss.item())
        if (step + 1) % every == 0 and step + 1 < phase.steps:
            keep(checkpoint, model, optimiser, step + 1)
    checkpoint.unlink(missing_ok=True)


def keep(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, done: int) -> None:
    """Write a training's state; a crash in between leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "done": done}
    torch.save(state, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 256,
) -> list[str]:
    """Continue prompts up to ``</s>``, greedily at temperature 0; the text without the prompt."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        rows = continued(
            model, tokenizer, [prompts[j] for j in part], tokens, temperature, generator
        )
        for j, row in zip(part, rows, strict=True):
            texts[j] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def continued(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Return the new tokens of one batch of prompts, padded on the left, with a cache."""
    end = tokenizer.eos_token_id
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = mask.cumsum(1) - 1
    cache, new, open_ = None, [], torch.ones(len(ids), dtype=torch.bool)
    for _ in range(tokens):
        output = model(
            ids,
            attention_mask=mask,
            position_ids=position.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        if temperature:
            chances = (logits / temperature).softmax(1)
            ids = torch.multinomial(chances, 1, generator=generator)
        else:
            ids = logits.argmax(1, keepdim=True)
        ids[~open_] = end
        new.append(ids)
        open_ &= ids[:, 0] != end
        if not open_.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position[:, -1:] + 1
    rows = torch.cat(new, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
