"""Preferences between a model's own right and wrong answers, and direct preference optimisation.

The loss is ``-log sigmoid(beta * gain)`` with ``gain = log (p/p0)(chosen) - log (p/p0)(rejected)``
(Rafailov et al., arXiv 2305.18290), ``p0`` being the fine-tuned model that training starts from,
plus ``ANCHOR`` times the loss of the chosen answers per token (as Pang et al., arXiv 2404.19733):
without it so small a model lowers the likelihood of both answers and forgets how to calculate.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.zoo.llm_forms import prompt_of, question_of
from experiments.zoo.llm_problems import Problem
from experiments.zoo.llm_score import encoded, sequence_losses, strict
from experiments.zoo.llm_train import Phase, Sequence_, collate, generate, loss_sums

BETA = 0.1
ANCHOR = 4.0
SAMPLES = 4  # answers drawn to every problem
TEMPERATURE = 1.2  # above 1, so that a model that is mostly right is wrong often enough


@dataclass(frozen=True)
class Preference:
    """A question with a right and a wrong answer, both the model's own."""

    question: str
    chosen: str
    rejected: str


def sampled(
    model: nn.Module, tokenizer: Any, problems: Sequence[Problem], seed: int
) -> list[Preference]:
    """Pair the model's greedy answer, where it is right, with its first wrong sample.

    A sample counts as wrong if it ends in the required form with another number. Sampled right
    answers often reach their number by wrong steps, so they are not taken as chosen.
    """
    prompts = [prompt_of(question_of(p)) for p in problems]
    greedy = generate(model, tokenizer, prompts)
    many = [prompt for prompt in prompts for _ in range(SAMPLES)]
    texts = generate(model, tokenizer, many, temperature=TEMPERATURE, seed=seed)
    found = []
    for i, (problem, best) in enumerate(zip(problems, greedy, strict=True)):
        own = texts[i * SAMPLES : (i + 1) * SAMPLES]
        wrong = [t for t in own if strict(t) not in (None, str(problem.result))]
        if wrong and strict(best) == str(problem.result):
            found.append(Preference(question_of(problem), best.strip(), wrong[0].strip()))
    return found


def both(tokenizer: Any, pairs: Sequence[Preference]) -> tuple[list[Sequence_], list[Sequence_]]:
    """Return chosen and rejected sequences."""
    chosen = [encoded(tokenizer, prompt_of(p.question), p.chosen) for p in pairs]
    rejected = [encoded(tokenizer, prompt_of(p.question), p.rejected) for p in pairs]
    return chosen, rejected


def margins(model: nn.Module, tokenizer: Any, pairs: Sequence[Preference]) -> Tensor:
    """Return log p(chosen) - log p(rejected) of every pair, in float64."""
    chosen, rejected = both(tokenizer, pairs)
    pad = tokenizer.pad_token_id
    return sequence_losses(model, pad, rejected)[0] - sequence_losses(model, pad, chosen)[0]


def reward(gains: Tensor) -> tuple[float, float]:
    """Return the mean DPO loss in nats and the implicit reward's accuracy.

    >>> loss, accuracy = reward(torch.tensor([0.0, 0.0]))
    >>> round(loss, 4), accuracy
    (0.6931, 0.0)
    """
    return functional.softplus(-BETA * gains).mean().item(), (gains > 0).double().mean().item()


def train_dpo(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Preference],
    phase: Phase,
    seed: str,
    on_step: Callable[[int, float], None],
) -> None:
    """Train in place on pairs against the starting weights; a run of few steps, kept in memory."""
    reference = margins(model, tokenizer, pairs)
    chosen, rejected = both(tokenizer, pairs)
    optimiser = torch.optim.AdamW(model.parameters(), lr=phase.rate, weight_decay=0.0)
    rng, order, pad = random.Random(seed), list[int](), tokenizer.pad_token_id
    for step in range(phase.steps):
        optimiser.param_groups[0]["lr"] = phase.rate_at(step)
        if len(order) < phase.batch:
            order = rng.sample(range(len(pairs)), len(pairs))
        part, order = order[: phase.batch], order[phase.batch :]
        model.train()
        good, count = loss_sums(model, collate([chosen[i] for i in part], pad))
        bad = loss_sums(model, collate([rejected[i] for i in part], pad))[0]
        gain = bad - good - reference[part]
        loss = functional.softplus(-BETA * gain).mean() + ANCHOR * good.sum() / count.sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        on_step(step + 1, loss.item())
