from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from deltalab.apply import editing
from deltalab.apply.extras import Extras
from deltalab.artifacts import Store
from deltalab.edits import Edit, Line, Moments, Unit
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.expo import Expo
from deltalab.loss.engine import Engine
from deltalab.loss.objectives import CrossEntropy, change, measure
from deltalab.loss.prediction import Predict
from deltalab.loss.riemann import Riemann
from deltalab.plan.planning import most_evaluations
from deltalab.weights.mapping import ModelPair, loaded

EDITS = [
    *(Dare(0.5, k) for k in (-1.0, 0.0, 0.5)),
    *(Expo(a) for a in (-0.5, 0.0, 0.5)),
    *(BitDelta(c, "mean", 0.5, "tensor") for c in (0.5, 1.0, 2.0)),
]
OFF = Predict(False)
CONF = Path(__file__).parents[1] / "conf"


def opened(dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(9, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)
    post = {n: v.detach().clone() for n, v in module.state_dict().items()}
    pre = {n: v - 0.1 * torch.randn_like(v) for n, v in post.items()}
    x, y = torch.randn(60, 9).to(dtype), torch.randint(8, (60,))
    return ModelPair(pre, post, module), CrossEntropy(((x[:40], y[:40]), (x[40:], y[40:])), most=7)


def sweep(store, settings, predict=OFF, dtype=torch.float32, edits=EDITS):
    pair, loss = opened(dtype)
    engine, before = Engine(pair, loss, store), measure(pair.module, loss)
    found = []
    for edit in edits:

        def edited(edit):
            return dict(
                editing.edited(pair.pre, pair.post, edit, "all", Extras.of(edit, pair, seed=0))
            )

        def shift_of(edit):
            return {n: w.float() - pair.post[n].float() for n, w in edited(edit).items()}

        with loaded(pair.module, edited(edit), restore=pair.post):
            true, _ = change(before, measure(pair.module, loss))
        selection = {"select": "all", "seed": 0}
        found.append((engine.changes(edit, shift_of(edit), selection, settings, predict), true))
    return found


def test_every_account_of_a_change_and_what_it_cost(tmp_path):
    store = Store(tmp_path, {"pair": "x"})
    settings = Riemann("adaptive", also={"left": 5})
    found = sweep(store, settings, Predict(True, probes=2))
    for changes, true in found:
        assert list(changes.terms) == ["adaptive", "left"]
        assert changes.terms["adaptive"].value == pytest.approx(true, rel=0.03, abs=2e-4)
    for changes, true in found[2:6]:  # small enough for two orders
        assert changes.prediction["second_order"] == pytest.approx(true, rel=0.1, abs=1e-6)
        assert abs(changes.prediction["first_order"] - true) > 0.1 * abs(true) or true == 0
    made = [changes.gradient_evaluations for changes, _ in found]
    parts = [sum(t.gradient_evaluations for t in c.terms.values()) for c, _ in found]
    assert [m - p for m, p in zip(made, parts, strict=True)] == [1] + [0] * 8
    again = sweep(store, settings, Predict(True, probes=2))
    for changes, _ in again[:6]:
        assert changes.terms["adaptive"].gradient_evaluations == 0
        assert changes.prediction["hessian_products"] == 0
    for (one, _), (two, _) in zip(found, again, strict=True):
        assert one.terms["adaptive"].value == two.terms["adaptive"].value
        assert one.terms["left"].value == two.terms["left"].value


def test_fixed_rules_without_prediction_need_no_gradient_at_post():
    found = sweep(Store(None, {}), Riemann("gauss", 2))
    assert [c.gradient_evaluations for c, _ in found] == [2, 2, 2, 2, 0, 2, 2, 2, 2]
    assert all(c.prediction is None for c, _ in found)
    off = sweep(Store(None, {}), Riemann(None))
    assert all((c.terms, c.gradient_evaluations) == ({}, 0) for c, _ in off)


def test_rounded_weights_share_no_line_and_are_told_of_once(caplog):
    found = sweep(Store(None, {}), Riemann("adaptive"), dtype=torch.bfloat16)
    made = [changes.gradient_evaluations for changes, _ in found]
    assert min(made[:4]) >= 2
    assert made[4] == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "model.dtype=float32" in caplog.text


@dataclass(frozen=True)
class Shrink(Edit):
    """D_hat = c D: all that a new method with a line and moments has to write."""

    c: float
    unit: ClassVar[Unit] = "entry"
    version: ClassVar[int] = 1

    def __call__(self, delta: Tensor) -> Tensor:
        return self.c * delta

    def line(self) -> Line | None:
        return Line("shrink", self.c - 1, -1.0, 0.0, most=5) if 0 <= self.c <= 1 else None

    def moments(self) -> Moments:
        return Moments(self.c - 1, 0.0)


def test_an_edit_brings_its_line_and_its_moments(tmp_path):
    """No module names its class: slopes are shared, the plan knows it, the closed form is there."""
    edits = [Shrink(0.4), Shrink(0.8), Shrink(0.0)]
    expo = sweep(Store(None, {}), Riemann("adaptive"), Predict(True, 2), edits=[Expo(-0.6)])
    found = sweep(Store(None, {}), Riemann("adaptive"), Predict(True, 2), edits=edits)
    made = [changes.gradient_evaluations for changes, _ in found]
    assert made[0] > 1
    assert made[1:] == [0, 0]
    for changes, true in found:
        assert changes.terms["adaptive"].value == pytest.approx(true, rel=0.03, abs=2e-4)
    ours, theirs = (each[0][0].prediction["closed_form"] for each in (found, expo))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert most_evaluations(edits, Riemann("adaptive")) == 1 + 5


@pytest.mark.parametrize("file", [*CONF.glob("riemann/*.yaml"), *CONF.glob("prediction/*.yaml")])
def test_settings_that_ship_are_valid(file):
    settings = instantiate(OmegaConf.load(file), _convert_="all")
    off = file.stem == "off"
    assert off == (settings in (Riemann(None), OFF))
