"""Do edits of a trained pair behave as they do on post-trained models? Scored off the test split.

The edits are written here once more, plainly and apart from ``deltalab.edits``: they decide
whether a pair is fit to ship, so they must not share a mistake with the code that it will test.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.zoo.data import Images
from experiments.zoo.train import example_losses, score, to_input

Weights = Mapping[str, Tensor]
Edit = Callable[[Tensor], Tensor]
PARTS = ("attention", "mlp", "norm", "embedding", "head")


def part_of(name: str) -> str:
    """Return the part of a ViT that a tensor belongs to.

    >>> [part_of(n) for n in ("blocks.0.attn.qkv.weight", "blocks.0.norm1.bias", "head.bias")]
    ['attention', 'norm', 'head']
    """
    if ".attn." in name:
        return "attention"
    if ".mlp." in name:
        return "mlp"
    if "norm" in name:
        return "norm"
    if name.startswith("head."):
        return "head"
    if name.startswith(("patch_embed.", "pos_embed", "cls_token")):
        return "embedding"
    raise ValueError(f"tensor {name!r} belongs to none of the parts {', '.join(PARTS)}")


def relative_delta(pre: Weights, post: Weights, part: str | None = None) -> float:
    """Return the Frobenius norm ``|post - pre| / |post|`` over one part, or over everything."""
    names = [name for name in post if part in (None, part_of(name))]
    delta = sum((post[n].double() - pre[n].double()).square().sum().item() for n in names)
    return math.sqrt(delta / sum(post[n].double().square().sum().item() for n in names))


def drop(p: float, rescale: bool, seed: int) -> Edit:
    """Drop every entry with probability ``p``; rescaled by ``1 / (1 - p)`` this is DARE."""
    generator = torch.Generator().manual_seed(seed)
    factor = 1 / (1 - p) if rescale else 1.0

    def edit(d: Tensor) -> Tensor:
        return torch.where(torch.rand(d.shape, generator=generator) >= p, d * factor, 0.0)

    return edit


def bitdelta(d: Tensor) -> Tensor:
    """Return ``mean|D| sign(D)``."""
    return d.sign() * d.abs().mean()


def ties(keep: float) -> Edit:
    """Keep the entries of largest magnitude, a fraction ``keep`` of each tensor."""

    def edit(d: Tensor) -> Tensor:
        least = d.abs().flatten().topk(max(1, round(keep * d.numel()))).values[-1]
        return torch.where(d.abs() >= least, d, 0.0)

    return edit


def low_rank(rank: int) -> Edit:
    """Keep the leading singular triples of a matrix (of a tensor flattened to one)."""

    def edit(d: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(d.flatten(1), full_matrices=False)
        leading: Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
        return leading.reshape(d.shape)

    return edit


def shift_of(pre: Weights, post: Weights, edit: Edit, matrices: bool = True) -> dict[str, Tensor]:
    """Return ``edit(delta) - delta`` for the tensors of two or more dimensions, or for all."""
    return {
        name: edit(post[name] - pre[name]) - (post[name] - pre[name])
        for name in post
        if post[name].ndim >= 2 or not matrices
    }


def moved(post: Weights, shift: Weights, t: float = 1.0) -> dict[str, Tensor]:
    """Return ``post + t * shift``."""
    return {name: w + t * shift[name] if name in shift else w for name, w in post.items()}


def gauss_term(model: nn.Module, post: Weights, shift: Weights, images: Images) -> float:
    """Return the loss change by three Gauss-Legendre nodes of ``<grad L(post + t E), E>``."""
    x, y = to_input(images.x), torch.from_numpy(images.y)
    total = 0.0
    half = math.sqrt(0.6) / 2
    model.eval()
    for t, weight in ((0.5 - half, 5 / 18), (0.5, 8 / 18), (0.5 + half, 5 / 18)):
        model.load_state_dict(moved(post, shift, t))
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        total += weight * sum(
            (p.grad.double() * shift[name].double()).sum().item()
            for name, p in model.named_parameters()
            if name in shift and p.grad is not None
        )
    model.zero_grad()
    return total


@dataclass(frozen=True)
class Effect:
    """What an edit does on one split: mean changes over seeds, and the paired standard error."""

    loss: float
    loss_error: float
    accuracy: float


def effect(model: nn.Module, post: Weights, shifts: Iterable[Weights], images: Images) -> Effect:
    """Score ``post + shift`` against ``post``, averaged over several shifts (seeds)."""
    model.load_state_dict(post)
    base_loss, base_right = example_losses(model, images)
    losses, rights = [], []
    for shift in shifts:
        model.load_state_dict(moved(post, shift))
        loss, right = example_losses(model, images)
        losses.append(loss - base_loss)
        rights.append(right.double() - base_right.double())
    paired = torch.stack(losses).mean(0)
    return Effect(
        paired.mean().item(),
        (paired.std() / math.sqrt(len(paired))).item(),
        torch.stack(rights).mean().item(),
    )


def standard_edits(seed: int) -> dict[str, Edit]:
    """Return the edits that every shipped pair is tried with."""
    return {
        "dare p=.5": drop(0.5, True, seed),
        "dare p=.9": drop(0.9, True, seed),
        "drop-only p=.5": drop(0.5, False, seed),
        "ties keep=.3": ties(0.3),
        "bitdelta": bitdelta,
        "svd rank=8": low_rank(8),
        "expo +.3": lambda d: 1.3 * d,
        "expo -.3": lambda d: 0.7 * d,
    }


@dataclass(frozen=True)
class Row:
    """One edit of one pair: effects on validation and objective, and the Gauss term."""

    edit: str
    validation: Effect
    objective: Effect
    term: float
    change: float

    @property
    def agrees(self) -> bool:
        """Whether the term is within 2 % of the measured change, or within 1e-4 nats."""
        return abs(self.term - self.change) <= max(1e-4, 0.02 * abs(self.change))


def check_pair(
    model: nn.Module,
    pre: Weights,
    post: Weights,
    validation: Images,
    objective: Images,
    seeds: int = 5,
) -> list[Row]:
    """Try every standard edit on a pair (float32 weights)."""
    rows = []
    for name in standard_edits(0):
        shifts = [shift_of(pre, post, standard_edits(s)[name]) for s in range(seeds)]
        if not name.startswith("d"):  # only the dropping edits are random
            shifts = shifts[:1]
        # One seed for the term: it belongs to a single shift.
        model.load_state_dict(post)
        before = score(model, objective)[0]
        model.load_state_dict(moved(post, shifts[0]))
        change = score(model, objective)[0] - before
        rows.append(
            Row(
                name,
                effect(model, post, shifts, validation),
                effect(model, post, shifts, objective),
                gauss_term(model, post, shifts[0], objective),
                change,
            )
        )
    return rows
