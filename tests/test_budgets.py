"""Budgets: what they give each tensor, what it costs, and what is said of a mistake."""

import time
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_edits import tensor

from deltalab.api import objective
from deltalab.apply import editing
from deltalab.apply.extras import Extras, Memo
from deltalab.artifacts import Store
from deltalab.budgets import Choice, Tensors
from deltalab.budgets.knapsack import Knapsack, predicted
from deltalab.budgets.shared import Shared
from deltalab.budgets.thirds import Thirds
from deltalab.budgets.uniform import Uniform
from deltalab.budgets.waterfill import Waterfill
from deltalab.compressors.delta_come import DeltaCome
from deltalab.compressors.ultradelta import Ultradelta
from deltalab.edits.dare import Dare
from deltalab.edits.keep import Keep
from deltalab.edits.twin import Twin
from deltalab.loss.objectives import measure
from deltalab.plan.planning import signal_passes
from deltalab.rng import Rng
from deltalab.run import sensitivity, shares
from deltalab.weights.mapping import ModelPair, loaded

COME = DeltaCome(total=1.0, bits="allocate", rounding="nearest", scale="max")
ULTRA = Ultradelta(rate=0.6, bits=4, gamma=1.0, rescale="per_layer")


def model(seed: int = 0):
    """Weights of a small transformer whose deltas differ in size, and their deltas."""
    shapes = {
        f"blocks.{layer}.{part}.weight": shape
        for layer, (part, shape) in product(
            range(3), [("attn.qkv", (48, 24)), ("mlp.fc1", (64, 24)), ("mlp.fc2", (24, 64))]
        )
    }
    pre = {name: tensor(shape, at) for at, (name, shape) in enumerate(shapes.items())}
    sizes = torch.logspace(-2, 0, len(pre))
    post = {
        name: pre[name] + float(size) * tensor(tuple(pre[name].shape), 50 + seed)
        for name, size in zip(pre, sizes, strict=True)
    }
    return pre, post, {name: post[name] - pre[name] for name in pre}


def run_with(edit: Shared, seed: int = 0, signal=None):
    """The edited weights, what each tensor was given, and what it is told of all."""
    pre, post, deltas = model()
    extras = Extras(edit.needs, seed, memo=Memo())
    told = shares.told_of(edit, extras, deltas, signal)
    given = edit.budget(told, edit.edit.spends)
    provider = shares.provider(edit, extras, signal)
    ready = replace(extras, providers={"share": provider})
    return dict(editing.edited(pre, post, edit, "all", ready)), given, told


def spent(told, given) -> int:
    return sum(
        next(c.bits for c in one.choices if c.share == given[name]) for name, one in told.items()
    )


def flat(_deltas):
    """A loss that minds errors of the first layer far more, where deltas are small."""
    _, _, deltas = model()
    return {name: 1e5 if "blocks.0" in name else 1.0 for name in deltas}, {}


@pytest.mark.parametrize(
    ("edit", "budget"),
    [
        (COME, Uniform(None, "bits")),
        (ULTRA, Thirds(0.0)),
        (Dare(p=0.5, k=0.0), Thirds(0.0)),
        (Twin(rank=3, rate=None), Uniform(None, "bits")),
    ],
    ids=str,
)
def test_a_budget_that_spreads_nothing_is_none_to_the_bit(edit, budget) -> None:
    pre, post, _ = model()
    plain = dict(editing.edited(pre, post, edit, "all", Extras(edit.needs, 0, memo=Memo())))
    found, given, _ = run_with(Shared(edit, {}, budget))
    assert set(given.values()) == {None}
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("signal", ["loss", "energy"])
@pytest.mark.parametrize("edit", [COME, ULTRA, Twin(rank=4, rate=None)], ids=str)
def test_knapsack_keeps_to_the_total_and_is_never_worse_than_uniform(edit, signal: str) -> None:
    shared = Shared(edit, {}, Knapsack(None, "bits", None, signal))
    _, given, told = run_with(shared, signal=flat if signal == "loss" else None)
    own = sum(t.choices[0].bits for t in told.values())
    assert spent(told, given) <= own
    losses = []
    for part in (0.9, 1.0, 1.2, 1.5, 2.0, 4.0):
        most = int(part * own)
        given = Knapsack(most / 8e6 + 1e-9, "megabytes", None, signal)(told, "")
        assert spent(told, given) <= most
        picked = {n: next(c for c in t.choices if c.share == given[n]) for n, t in told.items()}
        losses.append(sum(predicted(t, picked[n]) for n, t in told.items()))
        for at in range(len(next(iter(told.values())).choices)):
            column = [t.choices[at] for t in told.values()]
            if sum(c.bits for c in column) <= most:
                same = sum(predicted(t, c) for t, c in zip(told.values(), column, strict=True))
                assert losses[-1] <= same + 1e-9
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_what_is_told_is_what_the_code_takes_and_loses() -> None:
    pre, post, deltas = model()
    shared = Shared(COME, {}, Knapsack(None, "bits", [0.5, 2.0], "loss"))
    grads = {name: tensor(tuple(d.shape), 7) for name, d in deltas.items()}
    extras = Extras(shared.needs, 0, memo=Memo())
    told = shares.told_of(shared, extras, deltas, lambda _: (dict.fromkeys(deltas, 2.0), grads))
    for name, one in told.items():
        assert [c.share for c in one.choices] == [None, 0.5, 2.0]
        for choice, total in zip(one.choices, (1.0, 0.5, 2.0), strict=True):
            edit = replace(COME, total=total)
            code = edit.encode(deltas[name], **extras.for_tensor(name, deltas))
            off = (code.decode() - deltas[name]).double()
            assert choice.bits == code.bits.total
            assert choice.error == pytest.approx(float(off.square().sum()), rel=1e-4)
            slope = float((grads[name].double() * off).sum())
            assert choice.slope == pytest.approx(slope, rel=1e-4, abs=1e-6)
            assert predicted(one, choice) == pytest.approx(2 * choice.error + choice.slope)
    assert pre.keys() == post.keys() == told.keys()


def test_knapsack_minds_what_the_loss_minds() -> None:
    _, given, told = run_with(Shared(COME, {}, Knapsack(4.0, "bits", None, "loss")), signal=flat)
    _, plain, _ = run_with(Shared(COME, {}, Knapsack(4.0, "bits", None, "energy")))
    first = [name for name in told if "blocks.0" in name]
    errors = []
    for chosen in (given, plain):
        picked = {n: next(c for c in told[n].choices if c.share == chosen[n]) for n in told}
        errors.append(sum(picked[n].error for n in first))
    assert errors[0] < errors[1]


def test_more_choices_are_never_worse() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        bits = np.sort(generator.integers(1, 200, (5, 6)))[:, ::-1]
        error = np.sort(generator.random((5, 6)))
        tensors = {
            str(i): Tensors(
                100,
                choices=tuple(
                    Choice(at, int(b), float(e))
                    for at, (b, e) in enumerate(zip(bits[i], error[i], strict=True))
                ),
                sensitivity=float(generator.random()),
            )
            for i in range(5)
        }
        few = {n: replace(t, choices=t.choices[::2]) for n, t in tensors.items()}
        rule = Knapsack(float(sum(b[-2] for b in bits)) / 500 + 0.05, "bits", None, "loss")
        found = [
            sum(
                predicted(t, next(c for c in t.choices if c.share == given[n]))
                for n, t in some.items()
            )
            for some in (tensors, few)
            for given in [rule(some, "total")]
        ]
        assert found[0] <= found[1] + 1e-12


def test_thirds_keep_the_total_and_drop_more_of_what_is_small() -> None:
    shared = Shared(ULTRA, {}, Thirds(0.2))
    found, given, told = run_with(shared)
    rates = {name: ULTRA.rate if share is None else share for name, share in given.items()}
    entries = sum(t.entries for t in told.values())
    dropped = sum(t.entries * rates[n] for n, t in told.items())
    assert dropped == pytest.approx(0.6 * entries)
    order = sorted(told, key=lambda name: told[name].std)
    assert [rates[n] for n in order] == sorted(rates.values(), reverse=True)
    for third in (order[:2], order[-1:]):
        for name in third:
            pre, post, _ = model()
            zeros = float((found[name] == pre[name]).double().mean())
            assert zeros == pytest.approx(rates[name], abs=2e-3)
            assert post[name].shape == found[name].shape


def test_waterfill_takes_the_largest_singular_values_for_each_bit() -> None:
    edit = Shared(Twin(rank=4, rate=None), {}, Waterfill(None, "bits"))
    found, given, told = run_with(edit)
    uniform, _, _ = run_with(Shared(Twin(rank=4, rate=None), {}, Uniform(None, "bits")))
    _, post, deltas = model()
    errors = [
        sum(float((hat[n] - post[n]).double().square().sum()) for n in hat)
        for hat in (found, uniform)
    ]
    assert errors[0] < 0.9 * errors[1]
    cost = {n: 32 * sum(d.shape) for n, d in deltas.items()}
    assert sum(cost[n] * given[n] for n in given) <= sum(4 * c for c in cost.values())
    marginal = [float(told[n].energies[given[n] - 1]) / cost[n] for n in given if given[n] > 1]
    left = [float(told[n].energies[given[n]]) / cost[n] for n in given if given[n] < 24]
    assert min(marginal) >= 0.999 * max(left) or spent_left(given, cost) < max(cost.values())


def spent_left(given, cost) -> int:
    return sum(4 * c for c in cost.values()) - sum(cost[n] * given[n] for n in given)


def test_waterfill_of_bits_has_one_level_of_error() -> None:
    spread = {str(i): Tensors(100 + i, 2.0, 10.0 ** (i - 2), limits=(0.25, 8.0)) for i in range(5)}
    for rule in (Waterfill(None, "bits"), Waterfill(1.0, "bits")):
        given = rule(spread, "total")
        total = 2.0 if rule.total is None else 1.0
        entries = sum(t.entries for t in spread.values())
        assert sum(given[n] * t.entries for n, t in spread.items()) <= total * entries + 1e-6
        inner = [
            t.std**2 * 4.0 ** -given[n] for n, t in spread.items() if 0.2501 < given[n] < 7.999
        ]
        assert inner
        assert max(inner) == pytest.approx(min(inner), rel=1e-6)


@pytest.mark.parametrize("rule", ["uniform", "knapsack", "waterfill"])
def test_totals_below_the_least_possible(rule: str) -> None:
    made = {
        "uniform": Uniform(0.001, "bits"),
        "knapsack": Knapsack(1e-6, "megabytes", None, "energy"),
        "waterfill": Waterfill(0.01, "bits"),
    }[rule]
    edit = Twin(rank=4, rate=None) if rule == "waterfill" else COME
    with pytest.raises(ValueError, match=r"budget\.total: .* bits a weight are .* MB, the least"):
        run_with(Shared(edit, {}, made))


def test_mistakes_are_said_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"budget=knapsack: edit Keep spends nothing"):
        Shared(Keep(), {}, Knapsack(None, "bits", None, "loss"))
    with pytest.raises(ValueError, match=r"budget=thirds: .* it is for edits that spend rate or p"):
        Shared(COME, {}, Thirds(0.1))
    with pytest.raises(ValueError, match=r"edit\.p: given by hand and by budget=thirds"):
        Shared(Dare(p=0.5, k=0.0), {"p": {"default": 0.5}}, Thirds(0.1))
    with pytest.raises(ValueError, match=r"needs the loss of a live model"):
        shares.provider(Shared(COME, {}, Knapsack(None, "bits", None, "loss")), Extras())
    for name, value in (("total", 0), ("unit", "kB"), ("choices", []), ("signal", "what")):
        with pytest.raises(ValueError, match=rf"budget\.{name}="):
            replace(Knapsack(1.0, "bits", None, "loss"), **{name: value})
    for hand, text in (
        ({"default": 0.5, "mpl": 0.1}, r"edit\.p\.mpl: must be default, .*did you mean mlp\?"),
        ({"default": 0.5, "layers.0-2": 0.1, "layers.2": 0.2}, r"layer 2 is in layers\.0-2 and"),
        ({"default": 0.5, "mlp": 1.5}, r"edit\.p=1\.5: must be in"),
    ):
        with pytest.raises(ValueError, match=text):
            Shared(Dare(p=0.5, k=0.0), {"p": hand})


def test_values_by_hand() -> None:
    hand = {"p": {"default": 0.9, "mlp": 0.5, "layers.1-2": 0.0}}
    edit = Shared(Dare(p=0.9, k=0.0), hand)
    pre, post, _ = model()
    found = dict(editing.edited(pre, post, edit, "all", Extras(edit.needs, 0)))
    assert edit.line() is None
    assert edit.moments() is None
    for name in post:
        p = 0.0 if "blocks.0" not in name else 0.5 if "mlp" in name else 0.9
        alone = Dare(p=p, k=0.0)
        plain = dict(editing.edited(pre, post, alone, "all", Extras(alone.needs, 0)))
        assert torch.equal(found[name], plain[name])
    for keys, text in (
        (
            {"head": 0.1},
            r"edit\.p\.head: is for no tensor that is edited; parts are attention, mlp",
        ),
        ({"layers.1-9": 0.1}, r"edit\.p\.layers\.1-9: .*layers are 0 to 2"),
    ):
        wrong = Shared(Dare(p=0.9, k=0.0), {"p": {"default": 0.9, **keys}})
        with pytest.raises(ValueError, match=text):
            dict(editing.edited(pre, post, wrong, "all", Extras(wrong.needs, 0)))


@pytest.mark.slow
def test_the_solver_of_an_8b_model_takes_seconds() -> None:
    """Synthetic statistics of 224 matrices; they time the solver and say nothing else."""
    generator = np.random.default_rng(0)
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)] + [(14336, 4096)] * 3
    tensors = {}
    for at, (d, k) in enumerate(shapes * 32):
        bits = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
        scale = float(generator.lognormal())
        choices = [Choice(None, int(1.03 * d * k), scale * 0.25)]
        choices += [Choice(b, int((b + 0.03) * d * k), scale * 4.0**-b) for b in bits]
        tensors[str(at)] = Tensors(d * k, choices=tuple(choices), sensitivity=1.0)
    start = time.process_time()
    given = Knapsack(2.0, "bits", None, "loss")(tensors, "total")
    took = time.process_time() - start
    picked = [next(c for c in t.choices if c.share == given[n]) for n, t in tensors.items()]
    entries = sum(t.entries for t in tensors.values())
    assert 0.999 * 2 * entries <= sum(c.bits for c in picked) <= 2 * entries
    assert took < 60


def linear_pair():
    """A linear layer under half a squared error: a quadratic loss, with its open reference."""
    pre, post = ({"weight": tensor((5, 7), s), "bias": tensor((5,), s)} for s in (1, 2))
    module = torch.nn.Linear(7, 5)
    module.load_state_dict(post)
    x, target = tensor((64, 7), 3), tensor((64, 5), 4)

    def losses(own, batch):
        off = own(batch[0]) - batch[1]
        return off.square().sum(1) / 2, torch.ones(len(off))

    loss = objective([(x, target)], losses, "squares")
    pair = ModelPair(pre, post, module)
    judge = SimpleNamespace(loss=loss, post=measure(module, loss))
    store = Store(None, {})
    return SimpleNamespace(pair=pair, judge=lambda _: judge, store=lambda _: store), x


def test_sensitivities_are_the_curvature_along_the_noise() -> None:
    known, x = linear_pair()
    deltas = {name: known.pair.post[name] - known.pair.pre[name] for name in known.pair.post}
    found = sensitivity.sensitivities(known, deltas)
    noise = Rng(0, "weight/sensitivity").normal(deltas["weight"]) * deltas["weight"]
    by_hand = float(((x @ noise.T).square().sum(1) / 2).mean() / noise.square().sum())
    assert found["weight"] == pytest.approx(by_hand, rel=1e-3)
    assert found["bias"] == pytest.approx(0.5, rel=1e-3)
    assert torch.equal(known.pair.module.weight, known.pair.post["weight"])


def test_the_gradient_half_way_gives_the_change_of_a_quadratic_loss() -> None:
    known, _ = linear_pair()
    pair, judge = known.pair, known.judge("A")
    deltas = {name: pair.post[name] - pair.pre[name] for name in pair.post}
    edit = Dare(p=0.5, k=0.0)
    extras = Extras(edit.needs, 3)
    grad = sensitivity.midway(known, edit, extras, deltas)
    edited = dict(editing.edited(pair.pre, pair.post, edit, "all", extras))
    told = sum(float((grad[n] * (edited[n] - pair.post[n])).sum()) for n in edited)
    with loaded(pair.module, edited, restore=pair.post):
        change = measure(pair.module, judge.loss).mean - judge.post.mean
    assert told == pytest.approx(change, rel=1e-4)


def test_a_plan_counts_the_passes_of_a_budget() -> None:
    for signal, passes in (("loss", 96), ("noise", 96), ("energy", 0)):
        assert signal_passes(Shared(COME, {}, Knapsack(None, "bits", None, signal)), 24) == passes
    assert signal_passes(COME, 24) == 0
    assert signal_passes(Shared(COME, {}, Uniform(None, "bits")), 24) == 0


def test_random_errors_count_along_the_delta_alone() -> None:
    _, _, deltas = model()
    name, edit = next(iter(deltas)), Shared(ULTRA, {}, Knapsack(None, "bits", [0.5], "loss"))
    grads = {n: tensor(tuple(d.shape), 7) for n, d in deltas.items()}
    extras = Extras(edit.needs, 0, memo=Memo())
    told = shares.told_of(edit, extras, deltas, lambda _: ({}, grads))
    delta = deltas[name].double()
    off = ULTRA.encode(deltas[name], rng=Rng(0, name)).decode().double() - delta
    along = float((off * delta).sum() / (delta * delta).sum())
    assert told[name].choices[0].slope == pytest.approx(
        along * float((grads[name].double() * delta).sum()), rel=1e-4
    )
