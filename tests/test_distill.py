"""Learned scales and mean activations, on a model small enough to know the answer."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps

import pytest
import torch
from second_device import SECOND, lent, on
from torch import Tensor, nn

from deltalab.apply import editing
from deltalab.apply.extras import Extras, Memo
from deltalab.artifacts import Store
from deltalab.calibration import providing
from deltalab.edits.biased_product import BiasedProduct
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.bitdelta_distilled import BitDeltaDistilled
from deltalab.edits.dare import Dare
from deltalab.edits.darex import Darex
from deltalab.edits.ties import Ties
from deltalab.edits.twin import Twin
from deltalab.loss import distill
from deltalab.run.point import PROVIDED
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
    extras = Extras.of(edit, pair, seed=0, providers=distill.providers(pair, loss, dict))
    got = editing.edited(pair.pre, pair.post, edit, "all", extras)
    plain = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
    expected = editing.edited(pair.pre, pair.post, plain, "all", Extras(plain.needs, memo=Memo()))
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


def test_what_is_averaged_or_learned_is_so_once_for_all_tensors(pair, monkeypatch) -> None:
    calls = []
    for module, name in ((distill, "mean_inputs"), (distill, "scales")):
        original = getattr(module, name)
        counted = lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, name, counted)
    gradient = {name: tensor(tuple(t.shape), 7) for name, t in pair.post.items()}
    given = provided(pair, Squares((tensor((5, 6), 3),)), lambda: gradient)
    assert tuple(given) == PROVIDED[:-1], "all but peers, which are models"
    assert given["grad"]("bias", {}) is gradient["bias"]
    assert given["acts"]("weight", {}).shape == (6,)
    assert given["acts"]("bias", {}) is None
    scale = {name: given["scale"](name, deltas(pair)) for name in pair.post}
    assert scale["bias"](2, 0.1) is None
    assert scale["weight"](2, 0.1).ndim == 0
    assert calls == ["mean_inputs", "scales"]
    scale["weight"](3, 0.1)
    assert calls[2:] == ["scales"], "other settings are another scale"


def provided(pair, loss, gradient) -> dict:
    """All that a live pair provides, as a point puts it together."""
    calibrated = providing.Calibration(pair, loss, Store(None, {}))
    return {**distill.providers(pair, loss, gradient), **calibrated.providers()}


class Elsewhere(Squares):
    """The same objective for a module on the second device."""

    def __call__(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        return super().__call__(module, batch.to(SECOND))


EDITS = [
    BiasedProduct(k=0.5, p=None),
    BitDeltaDistilled(steps=3, lr=0.1),
    Darex(p=0.5, q="closed_form"),
    Ties(keep=0.3, scope="model"),
    Twin(rank=2, rate=None),
    Dare(p=0.5, k=0.0),
]


def watched(call, seen: list):
    """Return an edit's call that notes where the delta is."""

    @wraps(call)
    def noting(self, delta: Tensor, **needs):
        seen.append(str(delta.device))
        return call(self, delta, **needs)

    return noting


def placed(device: str) -> tuple[ModelPair, Squares, dict[str, Tensor]]:
    """A pair whose module is on a device and whose weights are not, a loss and a gradient there."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    post = {n: t.detach().clone() for n, t in module.state_dict().items()}
    pre = {n: t + 0.1 * tensor(tuple(t.shape), 5) for n, t in post.items()}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = nn.Parameter(on(device, parameter.detach()))
    loss = (Squares if device == "cpu" else Elsewhere)((tensor((5, 6), 3),))
    gradient = {n: on(device, tensor(tuple(t.shape), 6)) for n, t in post.items()}
    return ModelPair(pre, post, module), loss, gradient


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_a_pair_whose_module_is_on_another_device_is_edited_there(edit, monkeypatch) -> None:
    """Weights on the CPU, as they are mapped from files; what a live model gives is elsewhere."""
    made, seen = {}, []
    monkeypatch.setattr(type(edit), "__call__", watched(type(edit).__call__, seen))
    for device in ("cpu", "second"):
        pair, loss, gradient = placed(device)
        with lent() if device == "second" else nullcontext():
            given = provided(pair, loss, gradient.copy)
            extras = Extras.of(edit, pair, seed=0, providers=given)
            where = next(pair.module.parameters()).device
            made[device] = dict(
                editing.edited(pair.pre, pair.post, edit, "all", extras, device=where)
            )
    assert set(seen) == {"cpu", "meta"}
    assert all(type(t) is Tensor for t in made["second"].values()), "back where the weights are"
    for name, expected in made["cpu"].items():
        assert torch.equal(made["second"][name], expected), name
