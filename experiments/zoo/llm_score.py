"""Scores of the embedded language models: exact match as GSM8K's filters see it, and losses."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.zoo.llm_forms import answer_of, ended, prompt_of, question_of, wondered_parts
from experiments.zoo.llm_problems import Problem
from experiments.zoo.llm_train import Sequence_, collate, generate, loss_sums

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def strict(text: str) -> str | None:
    """Return the first number behind ``####``, as GSM8K's strict filter reads it.

    >>> strict("So it is #### 7"), strict("7 apples")
    ('7', None)
    """
    found = STRICT.search(text)
    return _plain(found.group(1)) if found else None


def flexible(text: str) -> str | None:
    """Return the last number in a text, as GSM8K's flexible filter reads it.

    >>> flexible("3 + 4 = 7 apples.")
    '7'
    """
    found = FLEXIBLE.findall(text)
    return _plain(next(part for part in found[-1] if part)) if found else None


def _plain(number: str) -> str:
    return re.sub(r"[,$]|\.$", "", number)


def exact_match(
    model: nn.Module, tokenizer: Any, problems: Sequence[Problem]
) -> tuple[list[bool], list[bool]]:
    """Return for every problem whether the greedy answer is right: strictly, and flexibly."""
    texts = generate(model, tokenizer, [prompt_of(question_of(p)) for p in problems])
    pairs = list(zip(texts, (str(p.result) for p in problems), strict=True))
    return [strict(t) == r for t, r in pairs], [flexible(t) == r for t, r in pairs]


def told_match(model: nn.Module, tokenizer: Any, problems: Sequence[Problem]) -> list[bool]:
    """Return for every problem whether a tale in base training's form ends with the result."""
    texts = generate(model, tokenizer, [wondered_parts(p)[0] for p in problems])
    return [f"So {ended(p)}." in text for text, p in zip(texts, problems, strict=True)]


def encoded_tale(tokenizer: Any, problem: Problem) -> Sequence_:
    """Return a tale in base training's form, what is worked out to be learnt."""
    told, worked_out = (tokenizer(part).input_ids for part in wondered_parts(problem))
    return [*told, *worked_out, tokenizer.eos_token_id], len(told)


def encoded(tokenizer: Any, prompt: str, answer: str) -> Sequence_:
    """Return prompt, answer and end as tokens, the answer and the end to be learnt."""
    head = tokenizer(prompt).input_ids
    return head + tokenizer(f" {answer}").input_ids + [tokenizer.eos_token_id], len(head)


def encoded_problem(tokenizer: Any, problem: Problem) -> Sequence_:
    """Return a problem in the format of question and answer."""
    return encoded(tokenizer, prompt_of(question_of(problem)), answer_of(problem))


@torch.no_grad()
def sequence_losses(
    model: nn.Module, pad: int, sequences: Sequence[Sequence_], batch: int = 64
) -> tuple[Tensor, Tensor]:
    """Return -log p(answer | prompt) in nats and the number of answer tokens, in float64."""
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    sums = torch.zeros(len(order), dtype=torch.float64)
    counts = torch.zeros(len(order), dtype=torch.float64)
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        s, c = loss_sums(model, collate([sequences[j] for j in part], pad))
        sums[part], counts[part] = s.double(), c.double()
    return sums, counts


def answer_loss(
    model: nn.Module, tokenizer: Any, problems: Sequence[Problem], tale: bool = False
) -> float:
    """Return the mean loss of the answers (or of tales' endings), in nats per token."""
    form = encoded_tale if tale else encoded_problem
    sequences = [form(tokenizer, p) for p in problems]
    sums, counts = sequence_losses(model, tokenizer.pad_token_id, sequences)
    return (sums.sum() / counts.sum()).item()
