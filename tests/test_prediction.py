import math

import pytest
import torch
from torch import nn

from deltalab.artifacts import Store
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.expo import Expo
from deltalab.edits.noise import Noise
from deltalab.edits.sign_flip import SignFlip
from deltalab.edits.ties import Ties
from deltalab.loss.passes import gradient
from deltalab.loss.prediction import Predict, Predictor, diagonal_probe
from deltalab.rng import Rng

SIZES = {"a.weight": (8, 5), "b.weight": (9,)}


class Quadratic(nn.Module):
    """Parameters only; the loss g'w + w'Hw/2 is the objective's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Module(), nn.Module()
        self.a.weight = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
        self.b.weight = nn.Parameter(torch.randn(9, dtype=torch.float64))

    def forward(self):
        return torch.cat([self.a.weight.flatten(), self.b.weight])


class Objective:
    unit = "nats per example"
    batches = (torch.tensor([0.5, 1.5], dtype=torch.float64), torch.ones(1, dtype=torch.float64))

    def __init__(self):
        torch.manual_seed(1)
        root = torch.randn(49, 49, dtype=torch.float64)
        self.slope = torch.randn(49, dtype=torch.float64)
        self.hessian = root @ root.T / 49 + torch.diag(torch.rand(49).double())
        self.calls = 0

    def value(self, w):
        return self.slope @ w + w @ self.hessian @ w / 2

    def __call__(self, module, batch):
        self.calls += 1
        losses = self.value(module()) * batch
        return losses, torch.ones_like(losses)


def flat(weights):
    return torch.cat([weights[n].flatten() for n in SIZES])


def opened():
    module, loss = Quadratic(), Objective()
    post = {n: v.detach().clone() for n, v in module.state_dict().items()}
    torch.manual_seed(2)
    return module, loss, post, {n: torch.randn(s).double() for n, s in SIZES.items()}


def shift_of(edit, delta, seed=0):
    if isinstance(edit, Expo):
        return {n: edit(d) - d for n, d in delta.items()}
    return {n: edit(d, rng=Rng(seed, n)) - d for n, d in delta.items()}


def true_change(loss, post, shift):
    return (loss.value(flat(post) + flat(shift)) - loss.value(flat(post))).item()


def predict(edit, predictor, seed=0):
    module, loss, post, delta = opened()
    shift = shift_of(edit, delta, seed)
    found = predictor.predict(
        module,
        post,
        shift,
        delta,
        loss,
        edit,
        edit.line(),
        {"seed": seed, "select": "all"},
        gradient(module, loss),
    )
    assert all(torch.equal(v, post[n]) for n, v in module.state_dict().items())
    return found, true_change(loss, post, shift), shift


EDITS = [
    *(Dare(0.5, k) for k in (-1.0, 0.0, 0.5, 0.8, 1.0)),
    *(Expo(a) for a in (-1.0, -0.3, 0.0, 0.4)),
    *(BitDelta(c, "mean", 0.5, "tensor") for c in (0.5, 1.0)),
    DropOnly(0.3),
]


def test_second_order_is_exact_on_a_quadratic_and_first_order_short_by_the_curvature():
    predictor, products = Predictor(Predict(True), Store(None, {})), []
    objective = Objective()
    for edit in EDITS:
        found, true, shift = predict(edit, predictor)
        e = flat(shift)
        assert found["second_order"] == pytest.approx(true, rel=2e-6, abs=1e-9)
        short = (e @ objective.hessian @ e / 2).item()
        assert found["first_order"] == pytest.approx(true - short, rel=1e-9, abs=1e-11)
        assert "closed_form" not in found
        products.append(found["hessian_products"])
    # One product a line, one an edit without, none where nothing is shifted.
    assert products == [1, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1]


def test_products_are_kept_on_disk_for_the_pair_and_no_other(tmp_path):
    for _, expected in ((0, 1), (1, 0)):
        predictor = Predictor(Predict(True), Store(tmp_path, {"pair": "x"}))
        found, true, _ = predict(Dare(0.5, 0.0), predictor)
        assert found["hessian_products"] == expected
        assert found["second_order"] == pytest.approx(true, rel=1e-9)
    other, *_ = predict(Dare(0.5, 0.0), Predictor(Predict(True), Store(tmp_path, {"pair": "y"})))
    assert other["hessian_products"] == 1
    seeded, *_ = predict(Dare(0.5, 0.0), predictor, seed=1)
    assert seeded["hessian_products"] == 1


@pytest.mark.parametrize(
    "edit",
    [Dare(0.6, 0.0), Dare(0.4, -1.0), DropOnly(0.3), Noise(0.7), SignFlip(0.2, False)],
    ids=repr,
)
def test_the_closed_form_is_the_mean_over_draws(edit):
    _, loss, post, delta = opened()
    predictor = Predictor(Predict(True, probes=120), Store(None, {}))
    found, *_ = predict(edit, predictor)
    mean, variance = edit.moments()
    d = flat(delta)
    exact = (
        mean * (loss.slope + loss.hessian @ flat(post)) @ d
        + (mean**2 * d @ loss.hessian @ d + variance * loss.hessian.diagonal() @ d**2) / 2
    )
    assert abs(found["closed_form"] - exact.item()) < 4 * found["closed_form_error"]
    assert found["closed_form_error"] < 0.1 * abs(exact.item())
    draws = torch.tensor(
        [true_change(loss, post, shift_of(edit, delta, seed)) for seed in range(1000)]
    )
    assert abs(draws.mean().item() - exact.item()) < 3 * draws.std().item() / math.sqrt(1000)


def test_a_grid_needs_the_probes_once(tmp_path):
    predictor = Predictor(Predict(True, probes=5), Store(tmp_path, {}))
    made = [predict(Dare(p, k), predictor)[0] for p in (0.1, 0.5) for k in (0.0, 0.5)]
    assert [found["hessian_products"] for found in made] == [1 + 5, 0, 1, 0]
    intensity = [
        found["closed_form"] / (p / (1 - p)) for found, p in zip(made[::2], (0.1, 0.5), strict=True)
    ]
    assert intensity[0] == pytest.approx(intensity[1], rel=1e-9)
    more = Predictor(Predict(True, probes=7), Store(tmp_path, {}))
    assert predict(Dare(0.1, 0.0), more)[0]["hessian_products"] == 2


def test_probes_are_unbiased_tensor_by_tensor():
    module, loss, post, delta = opened()
    probes = [diagonal_probe(module, post, delta, loss, seed) for seed in range(300)]
    diagonal = loss.hessian.diagonal()
    for name, part in (("a.weight", slice(0, 40)), ("b.weight", slice(40, 49))):
        values = torch.tensor([p[name] for p in probes])
        exact = (diagonal[part] * flat(delta)[part] ** 2).sum().item()
        assert abs(values.mean().item() - exact) < 4 * values.std().item() / math.sqrt(300)


def test_moments_match_the_edits_own_draws():
    """Beside those of the defaults, in the contract tests."""
    ones = torch.ones(200_000)
    for edit in (Dare(0.3, -0.5), SignFlip(0.1, False), SignFlip(0.1, True)):
        x = edit(ones, rng=Rng(0, "w")) - 1
        mean, variance = edit.moments()
        assert x.mean().item() == pytest.approx(mean, abs=0.01)
        assert x.var().item() == pytest.approx(variance, rel=0.03)
    assert Expo(0.5).moments() == (0.5, 0.0)
    assert Ties(0.5, "model").moments() is None


def test_one_probe_has_no_error_estimate():
    with pytest.raises(ValueError, match="prediction.probes=1"):
        Predict(True, probes=1)


@pytest.mark.parametrize("orders", [(0, 1), (1, 0)])
def test_the_closed_form_depends_on_no_draw_and_no_order(orders):
    """Neither where a draw leaves a whole tensor as it is, nor where it is the first of a pair."""
    edit, values = DropOnly(0.1), []
    left = next(s for s in range(99) if not shift_of(edit, opened()[3], s)["b.weight"].any())
    moved = next(s for s in range(99) if shift_of(edit, opened()[3], s)["b.weight"].any())
    predictor = Predictor(Predict(True, probes=4), Store(None, {}))
    for seed in [(left, moved)[i] for i in orders]:
        found, *_ = predict(edit, predictor, seed)
        values.append((found["closed_form"], found["closed_form_error"]))
    assert values[0] == values[1]
    _, loss, post, delta = opened()
    slope = (loss.slope + loss.hessian @ flat(post)) @ flat(delta)
    mean, variance = edit.moments()
    bent = mean**2 * flat(delta) @ loss.hessian @ flat(delta)
    probes = [sum(diagonal_probe(*opened()[:3:2], delta, loss, s).values()) for s in range(4)]
    right = mean * slope + (bent + variance * sum(probes) / 4) / 2
    assert values[0][0] == pytest.approx(right.item(), rel=1e-5)
