"""Learned scales and mean activations, on a model small enough to know the answer."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from deltalab.apply import editing
from deltalab.apply.extras import Extras, Memo
from deltalab.edits import needs_of
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.bitdelta_distilled import BitDeltaDistilled
from deltalab.loss import distill
from deltalab.weights.mapping import ModelPair


@dataclass(frozen=True, eq=False)
class Squares:
    """A loss that would fail if its labels mattered: they are missing."""

    batches: tuple[Tensor, ...]
    unit: str = "nats per example"

    def __call__(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        out = module(batch)
        return out.sum(1) * torch.nan, torch.ones(len(out))


def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> ModelPair:
    module = nn.Linear(6, 4, bias=True)
    pre = {"weight": tensor((4, 6), 0), "bias": tensor((4,), 1)}
    post = {"weight": pre["weight"] + 0.1 * tensor((4, 6), 2), "bias": pre["bias"]}
    module.load_state_dict(post)
    return ModelPair(pre, post, module)


def deltas(pair: ModelPair) -> dict[str, Tensor]:
    return {n: pair.post[n] - pair.pre[n] for n in pair.post}


def test_one_linear_layer_finds_the_closed_form(pair) -> None:
    """alpha* = <D x, S x> / |S x|^2 summed over the inputs, with S the signs."""
    x = tensor((50, 6), 3) * torch.tensor([5.0, 1, 1, 1, 1, 0.2])
    delta = deltas(pair)["weight"]
    signs = torch.where(delta < 0, -1.0, 1.0)
    best = ((x @ delta.T) * (x @ signs.T)).sum() / (x @ signs.T).square().sum()
    learned = distill.scales(pair.module, pair.pre, deltas(pair), Squares((x,)), steps=600, lr=0.02)
    assert set(learned) == {"weight"}
    assert abs(best - delta.abs().mean()) > 1e-3, "the start would pass"
    assert learned["weight"].item() == pytest.approx(best.item(), rel=1e-3)
    assert all(p.grad is None for p in pair.module.parameters())
    assert torch.equal(pair.module.weight, pair.post["weight"])


def test_no_steps_is_bitdelta(pair) -> None:
    edit = BitDeltaDistilled(steps=0, lr=0.1)
    loss = Squares((tensor((5, 6), 3),))
    extras = Extras.of(
        edit,
        pair,
        seed=0,
        scales=lambda d: distill.scales(
            pair.module, pair.pre, d, loss, steps=edit.steps, lr=edit.lr
        ),
    )
    got = editing.edited(pair.pre, pair.post, edit, "all", extras)
    plain = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
    expected = editing.edited(
        pair.pre, pair.post, plain, "all", Extras(needs_of(plain), memo=Memo())
    )
    for name in got:
        assert torch.equal(got[name], expected[name])


def test_learning_never_ends_worse_than_it_began(pair) -> None:
    loss = Squares((tensor((20, 6), 3), tensor((20, 6), 4)))
    wild = distill.scales(pair.module, pair.pre, deltas(pair), loss, steps=3, lr=50.0)
    assert wild["weight"] == deltas(pair)["weight"].abs().mean()


def test_scales_must_be_there(pair) -> None:
    with pytest.raises(ValueError, match="needs 'scale'"):
        Extras.of(BitDeltaDistilled(steps=1, lr=0.1), pair, seed=0)


def test_mean_inputs() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(2), nn.Linear(4, 5))
    loss = Squares((tensor((7, 3, 3, 3), 0), tensor((2, 3, 3, 3), 1)))
    means = distill.mean_inputs(module, loss)
    x = torch.cat(loss.batches)
    assert torch.allclose(means["0.weight"], x.mean((0, 2, 3)), atol=1e-6)
    with torch.no_grad():
        inner = module[1](module[0](x))
    assert torch.allclose(means["2.weight"], inner.mean((0, 1)), atol=1e-6)
    assert not module[0]._forward_pre_hooks
