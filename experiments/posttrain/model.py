"""The model that trains: computing in the recipe's precision, with its weights kept in float32."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltalab.data.tokens import Tokens
from deltalab.loss.answers import answer_losses, margin
from deltalab.loss.objectives import Measured
from experiments.posttrain import lora
from experiments.posttrain.batches import Example, answers, examples, joined, micro_batches
from experiments.posttrain.recipe import Recipe


def fresh(recipe: Recipe) -> Any:
    """Return the model that a recipe starts from, in float32, with adapters if it asks for them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    if recipe.lora:
        lora.adapt(model, recipe.lora, recipe.seed)
    return model


class Run:
    """A model with its examples, and the losses of either kind of training on them.

    Args:
        recipe: the settings.
        device: where to train.

    Attributes:
        masters: the weights that train, in float32, by name; tied tensors once.
        model: the module that computes, holding them in the recipe's precision.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        from transformers import AutoTokenizer

        self.recipe, self.device = recipe, device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(recipe.model)
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad = next(token for token in known if token is not None)
        self.train, self.held = examples(recipe, self.tokenizer)
        model = fresh(recipe)
        model.config.use_cache = False
        self.masters = {
            name: p.detach().clone().to(device)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        for p in model.parameters():  # buffers, as the rotary frequencies, keep their precision
            p.data = p.data.to(getattr(torch, recipe.precision))
        self.model: Any = model.to(device).eval()  # no dropout: a resumed run is the same run
        self.margins: dict[int, Tensor] = {}
        if recipe.kind == "dpo":
            self._set_reference([*self.train, *self.held])

    def load(self) -> None:
        """Copy the float32 weights into the model that computes."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self.masters:
                    p.copy_(self.masters[name])

    def gradients(self, chosen: list[int]) -> float:
        """Give the float32 weights the gradient of these examples' mean loss; return that loss."""
        found = [self.train[i] for i in chosen]
        weight = sum(answers(e) for e in found) if self.recipe.kind == "sft" else len(found)
        total = 0.0
        for master in self.masters.values():
            master.grad = None
        for part in micro_batches(self.train, chosen, self.recipe.micro):
            losses, _ = self.losses([self.train[i] for i in part])
            loss = losses.sum() / weight
            loss.backward()  # type: ignore[no-untyped-call]
            self._collect()
            total += float(loss.detach())
        return total

    def _collect(self) -> None:
        """Add the model's gradients to those of the float32 weights, which lose nothing of them."""
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                master, gradient = self.masters[name], p.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                p.grad = None

    def losses(self, found: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return the examples' losses, and their weights: answer tokens, or 1 a preference."""
        if self.recipe.kind == "sft":
            return answer_losses(self.model, self._side(found, 0))
        gain = self._margin(found) - torch.cat([self.margins[id(e)] for e in found])
        losses = functional.softplus(-self.recipe.beta * gain)
        return losses, torch.ones_like(losses)

    @torch.no_grad()
    def measured(self, found: Sequence[Example]) -> Measured:
        """Return losses and weights of examples under the present weights, in their order."""
        losses, weights = torch.zeros(len(found)), torch.zeros(len(found))
        for chosen in micro_batches(found, list(range(len(found))), self.recipe.micro):
            values, counts = self.losses([found[i] for i in chosen])
            losses[chosen], weights[chosen] = values.float().cpu(), counts.float().cpu()
        return Measured(losses.double(), weights.double())

    def _side(self, found: Sequence[Example], side: int) -> Tokens:
        ids, mask, labels = joined([example[side] for example in found], self.pad)
        return ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def _margin(self, found: Sequence[Example]) -> Tensor:
        return margin(self.model, self._side(found, 0), self._side(found, 1))

    @torch.no_grad()
    def _set_reference(self, found: Sequence[Example]) -> None:
        for chosen in micro_batches(found, list(range(len(found))), self.recipe.micro):
            margins = self._margin([found[i] for i in chosen])
            self.margins |= {id(found[i]): m for i, m in zip(chosen, margins.split(1), strict=True)}


def trained(run: Run) -> Any:
    """Return the post-trained model in float32, adapters merged.

    It is built anew from the starting model: the one that computed was rounded to the recipe's
    precision, and a delta must not hold that rounding where nothing trained.
    """
    model = fresh(run.recipe)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in run.masters:
                p.copy_(run.masters[name])
    if run.recipe.lora:
        lora.merge(model)
    return model
