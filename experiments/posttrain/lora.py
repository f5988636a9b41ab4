"""Low-rank adapters (arXiv 2106.09685): train B A beside every linear layer, then add it in."""

import math

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """A linear layer with a low-rank addition: y = W x + (alpha / rank) B A x.

    A begins random and B at zero, so that training begins at the model itself. alpha is twice the
    rank.
    """

    def __init__(self, linear: nn.Linear, rank: int, draw: torch.Generator):
        super().__init__()
        weight = linear.weight
        bound = 1 / math.sqrt(weight.shape[1])
        start = (torch.rand(rank, weight.shape[1], generator=draw) * 2 - 1) * bound
        self.linear, self.scale = linear, 2.0
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the addition."""
        y: Tensor = self.linear(x) + self.scale * ((x @ self.a.T) @ self.b.T)
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the linear layer with the addition in its weight."""
        self.linear.weight += self.scale * (self.b @ self.a)
        return self.linear


def adapt(model: nn.Module, rank: int, seed: int) -> None:
    """Freeze a model and put an adapter around every linear layer but the head."""
    draw = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, Adapted(layer, rank, draw))


def merge(model: nn.Module) -> None:
    """Add every adapter to its layer and take it away; parameters get their old names back."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Adapted):
            model.set_submodule(name, layer.merged())
    model.requires_grad_(True)
