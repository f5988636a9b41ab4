"""Objectives of language models: the loss of answers given their prompts, and DPO.

Both read sources whose `open(transform, batch_size)` yields token batches (`data.tokens.Tokens`). A
preference source yields pairs of such batches, the chosen and the rejected answers to the same
prompts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltalab.artifacts import Store
from deltalab.data.tokens import IGNORED, Tokens
from deltalab.loss.objectives import Loss, evaluating, surprise
from deltalab.weights.mapping import ModelPair, loaded


def answer_losses(module: nn.Module, batch: Tokens) -> tuple[Tensor, Tensor]:
    """Return -log p(answer | prompt) of every sequence, in nats, and its number of answer tokens.

    Logits are turned to float32 at answer tokens only: with 128k entries a token they are most of
    the memory of a pass.

    Raises:
        ValueError: a label beyond the model's vocabulary.
    """
    ids, mask, labels = batch
    options = {"use_cache": False} if hasattr(module, "config") else {}
    output = module(ids, attention_mask=mask, **options)
    logits = getattr(output, "logits", output)[:, :-1]
    answer = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][answer]
    if targets.numel() and int(targets.max()) >= logits.shape[-1]:
        raise ValueError(
            f"label {int(targets.max())} in the objective's data: the model has outputs"
            f" 0 to {logits.shape[-1] - 1}"
        )
    losses = surprise(logits[answer], targets)
    rows = answer.nonzero()[:, 0]
    sums = torch.zeros(len(ids), dtype=losses.dtype, device=losses.device)
    return sums.index_add(0, rows, losses), answer.sum(1).to(losses.dtype)


@dataclass(frozen=True, eq=False)
class AnswerLoss:
    """Answer losses on opened batches."""

    batches: Sequence[Tokens]
    unit: str = "nats per token"
    together: ClassVar[int] = 8

    def __call__(self, module: nn.Module, batch: Tokens) -> tuple[Tensor, Tensor]:
        """Return every answer's loss and its number of tokens."""
        return answer_losses(module, batch)


@dataclass(frozen=True)
class Answers:
    """Causal-LM loss of answers, prompts masked; mean over answer tokens in nats.

    Args:
        data: a token source.
        batch_size: sequences a micro-batch; smaller needs less memory and changes no result.
        limit: the first so many sequences only; all when None.

    Raises:
        ValueError: on opening: no sequences, or none with an answer.
    """

    data: Any
    batch_size: int = 8
    limit: int | None = None

    def __post_init__(self) -> None:
        _check(self.batch_size, self.limit)

    def open(self, pair: ModelPair, store: Store | None = None) -> Loss:
        """Return the loss on the pair's device."""
        source = self.data.open(pair.transform, self.batch_size)
        device = next(pair.module.parameters()).device
        batches = tuple(_on(device, batch) for batch in _first(source, self.limit, _cut))
        if not any(bool((labels[:, 1:] != IGNORED).any()) for _, _, labels in batches):
            raise ValueError("objective: no answer tokens to take a loss of")
        return AnswerLoss(batches)


@dataclass(frozen=True, eq=False)
class DpoLoss:
    """Direct preference optimisation on opened batches (chosen, rejected, reference margin)."""

    batches: Sequence[tuple[Tokens, Tokens, Tensor]]
    beta: float
    unit: str = "nats per example"
    together: ClassVar[int] = 4

    def __call__(
        self, module: nn.Module, batch: tuple[Tokens, Tokens, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return every preference's loss and weight 1."""
        chosen, rejected, reference = batch
        gain = margin(module, chosen, rejected) - reference
        losses = functional.softplus(-self.beta * gain)
        return losses, torch.ones_like(losses)


def margin(module: nn.Module, chosen: Tokens, rejected: Tokens) -> Tensor:
    """Return log p(chosen) - log p(rejected) of every prompt, shape (n,)."""
    return answer_losses(module, rejected)[0] - answer_losses(module, chosen)[0]


@dataclass(frozen=True)
class Dpo:
    """The DPO loss (arXiv 2305.18290, Eq. 7), its reference model being W_pre; mean in nats.

    L = -log sigma(beta [(log p(y_w) - log p(y_l)) - (log p_pre(y_w) - log p_pre(y_l))]).

    At W = W_pre every example's loss is log 2. The reference log-probabilities are computed once,
    with W_pre loaded into the live module, and kept as the artefact `reference`.

    Args:
        data: a preference source.
        beta: strength of the preference, above 0.
        batch_size: preferences a micro-batch, each of two sequences.
        limit: the first so many preferences only; all when None.

    Raises:
        ValueError: beta out of range; on opening, no preferences.
    """

    data: Any
    beta: float = 0.1
    batch_size: int = 4
    limit: int | None = None

    def __post_init__(self) -> None:
        _check(self.batch_size, self.limit)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"objective.beta={self.beta}: must be above 0")

    def open(self, pair: ModelPair, store: Store | None = None) -> Loss:
        """Return the loss on the pair's device, its reference margins from the store if there."""
        source = self.data.open(pair.transform, self.batch_size)
        device = next(pair.module.parameters()).device
        both = [
            (_on(device, chosen), _on(device, rejected))
            for chosen, rejected in _first(source, self.limit, _cut_both)
        ]
        if not both:
            raise ValueError("objective: no preferences to take a loss of")

        def reference() -> dict[str, Tensor]:
            with loaded(pair.module, pair.pre, pair.post), evaluating(pair.module), torch.no_grad():
                return {"margins": torch.cat([margin(pair.module, c, r) for c, r in both]).cpu()}

        store = store or Store(None, {})
        margins = store.tensors("reference", reference)["margins"].to(device)
        parts = torch.split(margins, [len(chosen[0]) for chosen, _ in both])
        batches = tuple((c, r, part) for (c, r), part in zip(both, parts, strict=True))
        return DpoLoss(batches, self.beta)


def _check(batch_size: int, limit: int | None) -> None:
    for field, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"objective.{field}={value}: must be at least 1")


def _first(source: Any, limit: int | None, cut: Any) -> Iterator[Any]:
    """Yield batches until so many examples have come, the last one cut."""
    left = math.inf if limit is None else limit
    for batch in source:
        part, count = cut(batch, left)
        if count:
            yield part
        left -= count
        if left <= 0:
            return


def _cut(batch: Tokens, left: float) -> tuple[Tokens, int]:
    count = int(min(left, len(batch[0])))
    ids, mask, labels = (tensor[:count] for tensor in batch)
    return (ids, mask, labels), count


def _cut_both(batch: tuple[Tokens, Tokens], left: float) -> tuple[tuple[Tokens, Tokens], int]:
    (chosen, count), (rejected, _) = (_cut(tokens, left) for tokens in batch)
    return (chosen, rejected), count


def _on(device: torch.device, batch: Tokens) -> Tokens:
    ids, mask, labels = (tensor.to(device) for tensor in batch)
    return ids, mask, labels
