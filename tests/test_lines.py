import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from deltalab.artifacts import Store
from deltalab.edits.dare import Dare
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.expo import Expo
from deltalab.loss.lines import Line, Lines, alone, approximate, choose, wanted
from deltalab.loss.passes import gradient
from deltalab.loss.quadrature import interpolation, local_weights
from deltalab.loss.riemann import Riemann
from deltalab.rng import Rng


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 12, dtype=torch.float64)
        self.attn = nn.Linear(12, 12, dtype=torch.float64)
        self.head = nn.Linear(12, 8, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.attn(torch.tanh(self.embed(x)))))


@dataclass
class Counting:
    batches: list
    unit: str = "nats per example"
    calls: list = field(default_factory=list)

    def __call__(self, module, batch):
        self.calls.append(1)
        losses = functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
        return losses, torch.ones_like(losses)


def opened():
    module = Net()
    post = {n: v.detach().clone() for n, v in module.state_dict().items()}
    torch.manual_seed(1)
    delta = {n: 0.12 * torch.randn_like(v) for n, v in post.items()}
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(8, (40,))
    return module, post, delta, Counting([(x, y)])


def shift_of(edit, delta, seed=0):
    if isinstance(edit, Expo):
        return {n: edit(d) - d for n, d in delta.items()}
    return {n: edit(d, rng=Rng(seed, n)) - d for n, d in delta.items()}


def true_change(loss, post, shift):
    module, means = Net(), []
    for weights in (post, {n: post[n] + shift[n] for n in post}):
        module.load_state_dict(weights)
        with torch.no_grad():
            means.append(torch.cat([loss(module, b)[0] for b in loss.batches]).mean().item())
    return means[1] - means[0]


def sweep(edits, lines, order=1):
    module, post, delta, loss = opened()
    found = {}
    for edit in edits[::order]:
        found[edit] = approximate(
            Riemann("adaptive"),
            lines,
            module,
            post,
            shift_of(edit, delta),
            loss,
            edit.line(),
            {"seed": 0},
        )["adaptive"]
        assert all(torch.equal(v, post[n]) for n, v in module.state_dict().items())
    return found


EXPO = [Expo(round(-1 + 0.1 * i, 1)) for i in range(21)]
DARE = [Dare(0.5, k) for k in (-1.0, -0.5, 0.0, 0.5, 0.8)]
OWN = [DropOnly(p) for p in (0.1, 0.5, 0.9)]


@pytest.mark.parametrize("edits", [EXPO, DARE, OWN], ids=["expo", "dare", "own"])
def test_a_line_gives_every_point_its_change_from_few_evaluations(edits):
    _, post, delta, loss = opened()
    found = sweep(edits, Lines(Store(None, {})))
    for edit, term in found.items():
        true = true_change(loss, post, shift_of(edit, delta))
        assert term.value == pytest.approx(true, rel=0.05, abs=3e-4)
        assert term.converged
        assert abs(term.value - true) <= max(5 * term.error, 1e-9)
        assert sum(term.by_tensor.values()) == pytest.approx(term.value, abs=1e-13)
    assert sum(t.gradient_evaluations for t in found.values()) <= 15
    assert (
        edits is OWN or sum(t.gradient_evaluations > 0 for t in found.values()) <= 2
    )  # the first on a line pays


def test_values_do_not_depend_on_the_order_or_on_what_is_known_and_the_disk_is_shared(tmp_path):
    alone = {edit: sweep([edit], Lines(Store(None, {})))[edit].value for edit in EXPO[::4]}
    there = sweep(EXPO, Lines(Store(tmp_path, {"pair": "x"})))
    back = sweep(EXPO, Lines(Store(tmp_path, {"pair": "x"})), order=-1)
    other = sweep(EXPO[:1], Lines(Store(tmp_path, {"pair": "y"})))
    # The direction is a point's own shift over its coordinate: equal up to rounding only.
    for edit in EXPO:
        assert back[edit].value == pytest.approx(there[edit].value, rel=1e-12, abs=1e-15)
    for edit, value in alone.items():
        assert there[edit].value == pytest.approx(value, rel=1e-12, abs=1e-15)
    assert sum(t.gradient_evaluations for t in back.values()) == 0
    assert other[EXPO[0]].gradient_evaluations > 0


def test_evaluations_are_counted_and_a_given_gradient_saves_one():
    counts = []
    for first in (None, True):
        module, post, delta, loss = opened()
        given = first and gradient(module, loss)
        loss.calls.clear()
        lines = Lines(Store(None, {}))
        for edit in DARE:
            found = lines.term(module, post, shift_of(edit, delta), loss, edit.line(), {}, given)
            counts.append(found.gradient_evaluations)
        assert sum(counts[-len(DARE) :]) == len(loss.calls)
    assert sum(counts[: len(DARE)]) == sum(counts[len(DARE) :]) + 1


def test_more_nodes_come_where_the_first_ones_do_not_settle_it():
    module, post, delta, loss = opened()
    small, large = (alone(module, post, {n: t * d for n, d in delta.items()}, loss) for t in (1, 9))
    assert (small.gradient_evaluations, small.points, small.converged) == (3, 3, True)
    assert (large.gradient_evaluations, large.points) == (9, 6)
    first = gradient(module, loss)
    assert alone(module, post, delta, loss, first).gradient_evaluations == 2
    assert small.rule == "adaptive"


def test_an_edit_that_shifts_nothing_costs_nothing():
    for edit in (Dare(0.5, 1.0), Expo(0.0)):
        found = sweep([edit], Lines(Store(None, {})))[edit]
        assert (found.value, found.gradient_evaluations, found.converged) == (0.0, 0, True)


def test_a_line_that_runs_out_of_evaluations_says_so():
    module, post, delta, loss = opened()
    line = Line("rough", 1.0, 0.0, 1.0, most=2)
    shift = {n: 12 * d for n, d in delta.items()}
    found = Lines(Store(None, {})).term(module, post, shift, loss, line, {})
    assert found.gradient_evaluations == 3
    assert not found.converged
    assert found.error > wanted(found.value)


def test_nodes_gather_where_the_slope_is_rough():
    seen = []

    def slope(s):
        seen.append(s)
        return math.tanh(30 * (s - 0.8))

    chosen = choose(slope, -1.0, 1.0, 14)
    assert sorted(seen) == list(chosen.nodes)
    assert len(seen) == len(set(seen)) <= 15
    gaps = np.diff(chosen.nodes)
    assert gaps.max() >= 4 * gaps.min()
    assert abs(chosen.nodes[int(gaps.argmin())] - 0.8) < 0.15
    flat = choose(lambda s: 2.0 + s, 0.0, 1.0, 14)
    assert flat.nodes == (0.0, 0.25, 0.5625, 1.0)
    assert flat.error(1.0) == pytest.approx(0, abs=1e-15)
    assert chosen.error(0.2) < chosen.error(1.0)


def test_families_share_a_line_and_others_have_none():
    assert Dare(0.3, 0.0).line() == Line("dare p=0.3", 1.0, 0.0, 2.0, 9)
    assert Dare(0.3, 1.5).line().at == -0.5
    assert Dare(0.3, 1.5).line().family != Dare(0.3, 0.5).line().family
    for edit in (Dare(0.3, -1.5), Expo(2.0), DropOnly(0.5)):
        assert edit.line() is None


def test_the_interpolant_is_exact_for_parabolas_and_does_not_swing():
    rng = np.random.default_rng(0)
    for count in (3, 4, 5, 11):
        nodes = np.sort(rng.uniform(-1, 2, count))
        values = 3 * nodes**2 - 2 * nodes + 1
        at = np.concatenate([rng.uniform(nodes[0], nodes[-1], 20), nodes])
        np.testing.assert_allclose(interpolation(nodes, at) @ values, 3 * at**2 - 2 * at + 1)
        np.testing.assert_array_equal(interpolation(nodes, nodes).round(12), np.eye(count))
        low, high = nodes[0] + 0.01, nodes[-1] - 0.02
        exact = high**3 - low**3 - high**2 + low**2 + high - low
        assert local_weights(nodes, low, high) @ values == pytest.approx(exact, abs=1e-12)
        assert local_weights(nodes, high, low) @ values == pytest.approx(-exact, abs=1e-12)
    halved = np.concatenate([[0.0], 2.0 ** np.arange(-9, 1)])
    assert np.abs(interpolation(halved, np.linspace(0, 1, 199))).sum(1).max() < 2
    assert interpolation([0.0, 2.0], np.asarray([0.5])).tolist() == [[0.75, 0.25]]
