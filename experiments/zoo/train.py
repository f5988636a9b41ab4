"""Training and scoring of the embedded pairs: one phase is one frozen set of hyper-parameters."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.zoo.data import Images

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS = {
    "img_size": 28,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 20,
}
MEAN, STD = 0.21, 0.34
SCORE_BATCH = 500


@dataclass(frozen=True)
class Phase:
    """Hyper-parameters of one training phase (AdamW, linear warm-up, then cosine to zero).

    Attributes:
        steps: Optimiser steps of the schedule.
        rate: Highest learning rate.
        warmup: Steps of linear warm-up.
        batch: Images per step.
        decay: AdamW's weight decay, towards zero.
        pull: Decoupled L2 pull towards the starting weights, in units of the learning rate.
        shift: Largest random translation, pixels.
        turn: Largest random rotation, degrees.
        zoom: Largest relative change of scale, and of shear.
        erase: Side of the largest erased square, pixels.
    """

    steps: int
    rate: float
    warmup: int = 50
    batch: int = 128
    decay: float = 0.0
    pull: float = 0.0
    shift: float = 0.0
    turn: float = 0.0
    zoom: float = 0.0
    erase: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step in ``0 ... steps - 1``.

        >>> Phase(steps=100, rate=1.0, warmup=10).rate_at(4)
        0.5
        >>> round(Phase(steps=110, rate=1.0, warmup=10).rate_at(60), 6)
        0.5
        """
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


def make_model(seed: int) -> nn.Module:
    """Build the randomly initialised timm ViT."""
    import timm

    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(ARCHITECTURE, pretrained=False, **ARGS)
    return model


def to_input(x: np.ndarray) -> Tensor:
    """Normalise grey bytes (n, 28, 28) to the model's input (n, 1, 28, 28)."""
    return (torch.from_numpy(x)[:, None].float() / 255 - MEAN) / STD


def augment(x: Tensor, phase: Phase, generator: torch.Generator) -> Tensor:
    """Apply one random affine map and one erased square to every image of (n, 1, 28, 28)."""
    n, _, height, width = x.shape

    def draw(span: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * span

    angle = draw(math.radians(phase.turn))
    scale_x, scale_y, shear = 1 + draw(phase.zoom), 1 + draw(phase.zoom), draw(phase.zoom)
    cos, sin = angle.cos(), angle.sin()
    # Affine maps act on coordinates in [-1, 1]; a pixel is 2 / width of that.
    rows = [
        torch.stack([cos * scale_x, shear - sin, draw(2 * phase.shift / width)], 1),
        torch.stack([sin, cos * scale_y, draw(2 * phase.shift / height)], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    background = -MEAN / STD
    x = functional.grid_sample(x - background, grid, align_corners=False) + background
    if phase.erase:
        side = torch.rand(n, generator=generator) * phase.erase
        top, left = (torch.rand(n, generator=generator) * (height - side) for _ in range(2))
        row, column = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
        inside = (row >= top[:, None, None]) & (row < (top + side)[:, None, None])
        inside = inside & (column >= left[:, None, None]) & (column < (left + side)[:, None, None])
        x = x.masked_fill(inside[:, None], background)
    return x


def draw_batch(sources: list[Images], size: int, generator: torch.Generator) -> Images:
    """Draw ``size`` images with replacement, every source with the same probability."""
    which = torch.randint(len(sources), (size,), generator=generator)
    where = torch.rand(size, generator=generator, dtype=torch.float64)
    draws = zip(which.tolist(), where.tolist(), strict=True)
    pairs = [(sources[s], int(u * len(sources[s]))) for s, u in draws]
    return Images(
        np.stack([source.x[i] for source, i in pairs]),
        np.array([source.y[i] for source, i in pairs]),
    )


def train(
    model: nn.Module,
    sources: list[Images],
    phase: Phase,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train in place; ``on_step(steps done, batch loss)`` follows every step."""
    generator = torch.Generator().manual_seed(seed)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=phase.rate, weight_decay=phase.decay)
    for step in range(phase.steps):
        rate = phase.rate_at(step)
        optimiser.param_groups[0]["lr"] = rate
        batch = draw_batch(sources, phase.batch, generator)
        x = augment(to_input(batch.x), phase, generator)
        model.train()
        loss = functional.cross_entropy(model(x), torch.from_numpy(batch.y))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if phase.pull:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.lerp_(start[name], rate * phase.pull)
        on_step(step + 1, loss.item())


@torch.no_grad()
def example_losses(model: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Return per-example cross-entropy in nats (float64) and whether the prediction is right."""
    model.eval()
    losses, right = [], []
    for i in range(0, len(images), SCORE_BATCH):
        part = images[slice(i, i + SCORE_BATCH)]
        logits, y = model(to_input(part.x)).double(), torch.from_numpy(part.y)
        losses.append(functional.cross_entropy(logits, y, reduction="none"))
        right.append(logits.argmax(1) == y)
    return torch.cat(losses), torch.cat(right)


def score(model: nn.Module, images: Images) -> tuple[float, float]:
    """Return (mean loss in nats, accuracy as a fraction)."""
    losses, right = example_losses(model, images)
    return losses.mean().item(), right.double().mean().item()


def as_shipped(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights rounded to float16, the precision of the shipped files."""
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: w.detach().half().contiguous() for name, w in state.items()}


def load_shipped(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load float16 weights into a float32 model, exactly."""
    model.load_state_dict({name: w.float() for name, w in weights.items()})
