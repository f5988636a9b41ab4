"""Compressors by their identities, closed forms and independent oracles."""

from itertools import product

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import scipy.optimize
import torch
from test_edits import call, tensor
from torch import Tensor

from deltalab.codes.factorised import (
    allocated,
    component_losses,
    left_factor,
    paper_widths,
    quantised,
)
from deltalab.codes.factors import Factors
from deltalab.codes.levelled import Levelled
from deltalab.codes.rounding import rounded, steps
from deltalab.compressors.delta_come import DeltaCome
from deltalab.compressors.delta_dct import DeltaDct
from deltalab.compressors.delta_mix import DeltaMix
from deltalab.compressors.dqrelo import Dqrelo
from deltalab.compressors.impart import Impart, even, expected_error, probabilities
from deltalab.compressors.impart_qt import ImpartQt, grouped
from deltalab.compressors.shifted import Shifted
from deltalab.compressors.ultradelta import Ultradelta, survivors
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.twin import Twin
from deltalab.linear.factor import svd
from deltalab.rng import Rng
from deltalab.statistics.knapsack import knapsack

SHAPES = [(48, 64), (64, 24), (40, 40)]
ONE_BIT = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")


def impart(**changed) -> Impart:
    own = {"total": 4.0, "beta": 0.3, "exponent": 1.0, "masks": "exact", "rescale": True}
    return Impart(**{**own, "importance": True, "values": "float32", **changed})


def spiked(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A delta whose singular values fall: a power law and noise."""
    rank = min(shape)
    u, v = (torch.linalg.qr(tensor((n, rank), seed + n))[0] for n in shape)
    return (u * (4.0 / torch.arange(1, rank + 1))) @ v.T + 0.02 * tensor(shape, seed)


def inputs(columns: int, count: int = 200, seed: int = 5) -> Tensor:
    """Correlated inputs X (count, columns)."""
    mixed = tensor((columns, columns), seed) / columns**0.5 + 0.3 * torch.ones(columns, columns)
    return tensor((count, columns), seed + 1) @ mixed


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def error(hat: Tensor, delta: Tensor) -> float:
    return float((hat - delta).double().square().sum())


# Rounding


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_grid_is_symmetric_and_rounds_to_the_nearest_level(bits: int) -> None:
    columns = tensor((200, 3))
    width = torch.full((3,), bits)
    step = steps(columns, width, "max")
    q = rounded(columns, width, step).numpy()
    levels = (np.arange(1 << bits) - 2 ** (bits - 1) + 0.5) * step.numpy()[:, None]
    for at in range(3):
        nearest = np.abs(columns.numpy()[:, at, None] - levels[at]).argmin(1)
        assert np.abs(levels[at][nearest] - levels[at][q[:, at]]).max() < 1e-6
    if bits == 1:
        assert torch.allclose(step / 2, columns.abs().mean(0))
    else:
        assert np.allclose(levels[:, -1], columns.abs().amax(0).numpy())
    best = steps(columns, width, "best")
    near = (rounded(columns, width, best) - 2 ** (bits - 1) + 0.5) * best
    plain = (rounded(columns, width, step) - 2 ** (bits - 1) + 0.5) * step
    assert error(near, columns) <= error(plain, columns)
    if bits == 2:
        assert error(near, columns) < 0.75 * error(plain, columns)


# ImPart


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("masks", "rescale"), product(("exact", "bernoulli"), (True, False)))
def test_impart_s_error_is_its_closed_form(shape, masks: str, rescale: bool) -> None:
    delta = spiked(shape)
    edit, factors = impart(masks=masks, rescale=rescale), svd(delta)
    drop = edit.drop(factors[1], shape)
    told = expected_error(factors[1], drop, shape, masks == "exact", rescale)
    draws = np.array(
        [
            error(call(edit, delta, seed=seed), delta) / error(delta, 0 * delta)
            for seed in range(150)
        ]
    )
    assert abs(draws.mean() - told) < 4 * draws.std() / len(draws) ** 0.5
    code = edit.encode(delta, svd=lambda: factors, rng=Rng(0, "w"))
    assert code.settings["expected_error"] == pytest.approx(told, rel=1e-3)


def test_impart_s_error_is_the_formula_of_independent_masks() -> None:
    """sum_i s_i^2 (1 / (1 - p_i)^2 - 1), and what is left out."""
    delta = spiked((40, 40))
    s = svd(delta)[1].double().numpy()
    p = impart(masks="bernoulli").drop(torch.from_numpy(s).float(), (40, 40)).double().numpy()
    kept = p < 1
    by_hand = (s[kept] ** 2 * (1 / (1 - p[kept]) ** 2 - 1)).sum() + (s[~kept] ** 2).sum()
    told = expected_error(torch.from_numpy(s), torch.from_numpy(p), (40, 40), False)
    assert told == pytest.approx(by_hand / (s**2).sum(), rel=1e-6)


def authors(s: np.ndarray, alpha: float, beta: float, exponent: float) -> np.ndarray:
    """The probabilities of the authors' sparsifier for a square matrix."""
    a_uv, rank = (1 + alpha) / 2, len(s)
    kept = int(rank * (1 - beta))
    gamma = (a_uv - beta) / (1 - beta)
    p = (1 - (s[:kept] / s[0]) ** exponent) * gamma
    last = kept - 1
    while p.mean() < gamma:
        p[last], last = 1.0, last - 1
    return np.append(p, np.ones(rank - kept))


@pytest.mark.parametrize(("beta", "exponent"), [(0.625, 1.0), (0.75, 0.5), (0.0, 1.0)])
def test_impart_drops_what_the_authors_do(beta: float, exponent: float) -> None:
    s = svd(spiked((64, 64)))[1]
    found = probabilities(s, (64, 64), (1 + 7 / 8) / 2, beta, exponent)
    wanted = authors(s.double().numpy(), 7 / 8, beta, exponent)
    assert np.allclose(found.numpy(), wanted, atol=1e-6)
    assert found[0] == 0
    assert bool((found.diff() >= 0).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("total", [1.0, 4.0, 8.0])
def test_impart_keeps_what_the_total_says(shape, total: float) -> None:
    edit, factors = impart(total=total, values="float16"), svd(spiked(shape))
    code = edit.encode(spiked(shape), svd=lambda: factors, rng=Rng(3, "w"))
    assert isinstance(code, Factors)
    wanted = total * shape[0] * shape[1]
    one = 16 * sum(shape)  # the boundary shift takes whole components
    assert wanted - one <= code.bits.payload <= wanted + 16 * 2 * min(shape)


def test_impart_without_importance_has_one_share_and_more_error() -> None:
    s = svd(spiked((40, 40)))[1]
    same = even(s, (40, 40), 4 / 32, 0.3)
    told = probabilities(s, (40, 40), 1 - 4 / 64, 0.3, 1.0)
    assert len(same.unique()) == 2
    assert float(same.mean()) == pytest.approx(float(told.mean()), abs=1 / 40)
    assert expected_error(s, same, (40, 40), False) > 5 * expected_error(s, told, (40, 40), False)


def test_impart_with_exponent_zero_is_truncation() -> None:
    delta = spiked((40, 48))
    edit = impart(exponent=0.0)
    rank = int((edit.drop(svd(delta)[1], (40, 48)) < 1).sum())
    low = call(Twin(rank=rank, rate=None), delta)
    assert 0 < rank < 40
    assert torch.allclose(call(edit, delta), low, atol=1e-5)


def test_impart_is_the_truncation_in_the_mean() -> None:
    delta = spiked((24, 32))
    edit = impart(masks="bernoulli")
    factors = svd(delta)
    rank = int((edit.drop(factors[1], (24, 32)) < 1).sum())
    low = call(Twin(rank=rank, rate=None), delta)
    draws = torch.stack([call(edit, delta, seed=seed) for seed in range(400)]).double()
    score = (draws.mean(0) - low) / (draws.std(0) / 400**0.5).clamp(min=1e-9)
    assert float(score.abs().max()) < 5
    assert float(score.std()) < 1.3


# Delta-CoMe


def by_numpy(delta: Tensor, widths: np.ndarray) -> np.ndarray:
    """Singular vectors rounded to the nearest level of symmetric grids, by scipy and numpy."""
    u, s, vh = scipy.linalg.svd(delta.double().numpy(), full_matrices=False)
    out = np.zeros(delta.shape)
    for at, bits in enumerate(widths):
        if not bits:
            continue
        sides = []
        for x in (u[:, at], vh[at]):
            top = np.abs(x).mean() if bits == 1 else np.abs(x).max()
            grid = np.linspace(-top, top, 1 << bits)
            sides.append(grid[np.abs(x[:, None] - grid).argmin(1)])
        out += s[at] * np.outer(*sides)
    return out


@pytest.mark.parametrize("shape", [(48, 64), (64, 24)], ids=str)
def test_delta_come_is_rounding_to_the_nearest(shape) -> None:
    delta = spiked(shape)
    edit = DeltaCome(total=2.0, bits="paper", rounding="nearest", scale="max")
    widths = paper_widths(shape, 2.0)
    assert set(widths.tolist()) <= {8, 3, 2, 0}
    assert np.allclose(call(edit, delta).numpy(), by_numpy(delta, widths.numpy()), atol=2e-5)


@pytest.mark.parametrize(("width", "near"), [(32, 1e-6), (16, 2e-3)])
def test_wide_components_are_truncation(width: int, near: float) -> None:
    delta = spiked((24, 40))
    widths = torch.zeros(24, dtype=torch.int64)
    widths[:7] = width
    low = call(Twin(rank=7, rate=None), delta)
    hat = quantised((24, 40), svd(delta), widths, "max").decode()
    assert torch.allclose(hat, low, atol=near)
    full = quantised((24, 40), svd(delta), torch.full((24,), width), "max").decode()
    assert torch.allclose(full, delta, atol=near)


@pytest.mark.parametrize("bits", ["paper", "allocate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_come_keeps_to_its_total(bits: str, shape) -> None:
    delta, before = spiked(shape), np.inf
    for total in (0.5, 1.0, 2.0, 4.0):
        edit = DeltaCome(total=total, bits=bits, rounding="nearest", scale="best")
        code = edit.encode(delta, svd=lambda: svd(delta))
        assert code.bits.payload <= total * delta.numel() + 16 * 8
        now = error(code.decode(), delta)
        assert now <= before * 1.001
        before = now


def test_rounding_that_is_made_good_loses_less_of_the_outputs() -> None:
    plain, good = [], []
    for seed in range(6):
        delta, x = spiked((32, 48), seed), inputs(48, seed=seed)
        given = {"svd": lambda delta=delta: svd(delta)}
        for rounding, into in (("nearest", plain), ("gptq", good)):
            edit = DeltaCome(total=1.5, bits="paper", rounding=rounding, scale="max")
            more = {"gram": gram_of(x)} if rounding == "gptq" else {}
            hat = edit.encode(delta, **given, **more).decode()
            into.append(error(hat @ x.T, delta @ x.T))
    assert np.mean(good) < 0.8 * np.mean(plain)


def test_inputs_that_do_not_correlate_need_nothing_made_good() -> None:
    delta = spiked((32, 48))
    widths = paper_widths((32, 48), 2.0)
    v_only = quantised((32, 48), svd(delta), widths, "max")
    with_gram = quantised((32, 48), svd(delta), widths, "max", 3.0 * torch.eye(48))
    assert torch.equal(v_only.arrays["v.2"], with_gram.arrays["v.2"])


# DeltaMix


def test_the_program_is_that_of_an_integer_solver_and_of_enumeration() -> None:
    generator = np.random.default_rng(0)
    for _ in range(40):
        items, choices = generator.integers(1, 6), generator.integers(1, 5)
        costs = generator.integers(0, 9, (items, choices))
        losses = generator.random((items, choices))
        total = int(generator.integers(costs.min(1).sum(), costs.max(1).sum() + 2))
        found = knapsack(costs, losses, total)
        every = np.arange(items)
        assert costs[every, found].sum() <= total
        loss = losses[every, found].sum()
        least = min(
            losses[every, list(p)].sum()
            for p in product(range(choices), repeat=int(items))
            if costs[every, list(p)].sum() <= total
        )
        once = np.kron(np.eye(items), np.ones(choices))
        solved = scipy.optimize.milp(
            losses.reshape(-1),
            constraints=[
                scipy.optimize.LinearConstraint(once, 1, 1),
                scipy.optimize.LinearConstraint(costs.reshape(1, -1), -np.inf, total),
            ],
            integrality=np.ones(costs.size),
            bounds=scipy.optimize.Bounds(0, 1),
        )
        assert loss == pytest.approx(least, abs=1e-12)
        assert loss == pytest.approx(solved.fun, abs=1e-6)
    with pytest.raises(ValueError, match="a total of 1 is less than the least cost, 4"):
        knapsack(np.array([[2], [2]]), np.zeros((2, 1)), 1)


@pytest.mark.parametrize("total", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_allocation_is_never_worse_than_the_fixed_plan(shape, total: float) -> None:
    factors, gram = svd(spiked(shape)), gram_of(inputs(shape[1]))
    fixed, every = paper_widths(shape, total), np.arange(min(shape))
    for given in (None, gram):
        losses = component_losses(factors, [*range(9)], "max", given)
        plan = losses[every, fixed.numpy()].sum()
        best = allocated(shape, factors, total, "max", given)
        three = allocated(shape, factors, total, "max", given, 3)
        one = allocated(shape, factors, total, "max", given, 1)
        found = [losses[every, w.numpy()].sum() for w in (best, three, one)]
        assert found[0] <= found[1] <= found[2]
        assert found[1] <= plan
        assert len(set(three.tolist()) - {0}) <= 3
        assert len(set(one.tolist()) - {0}) == 1
        assert int(best.sum()) * sum(shape) <= total * shape[0] * shape[1]


def test_what_a_rounded_v_costs_is_exact() -> None:
    """sum_i s_i^2 dv_i H dv_i', for U is orthonormal."""
    delta, gram = spiked((32, 48)), gram_of(inputs(48)).double()
    u, s, vh = svd(delta)
    near = quantised((32, 48), (u, s, vh), torch.full((32,), 3), "max").sides()[1]
    step = steps(vh.T, torch.full((32,), 3), "max")
    dv = (near * step).double() - vh.T.double()
    told = float((s.double() ** 2 * (dv * (gram @ dv)).sum(0)).sum())
    off = (u * s).double() @ dv.T
    assert told == pytest.approx(float(((off @ gram) * off).sum()), rel=1e-5)


def test_the_corrected_factor_is_that_of_least_squares() -> None:
    delta, x = spiked((32, 48)).double(), inputs(48).double()
    y = tensor((9, 48), 3).double()
    left = left_factor(delta, y, gram_of(x)).double()
    wanted = np.linalg.lstsq((y @ x.T).T.numpy(), (delta @ x.T).T.numpy(), rcond=None)[0].T
    assert np.allclose(left.numpy(), wanted, atol=1e-4)
    rest = (delta - torch.from_numpy(wanted) @ y) @ x.T
    assert float((rest @ (y @ x.T).T).abs().max()) < 1e-8 * float(rest.norm() * (y @ x.T).norm())
    off = (delta - left @ y) @ x.T
    plain = (delta - torch.from_numpy(wanted + 1e-3) @ y) @ x.T
    assert float(off.norm()) < float(plain.norm())


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_deltamix_corrects_what_it_rounds(rounding: str) -> None:
    found = {True: [], False: []}
    for seed, correct in product(range(5), (True, False)):
        delta, x = spiked((32, 48), seed), inputs(48, seed=seed)
        edit = DeltaMix(total=1.0, widths=3, correct=correct, rounding=rounding, scale="max")
        more = {"gram": gram_of(x)} if rounding == "gptq" else {}
        hat = edit.encode(delta, svd=lambda delta=delta: svd(delta), **more).decode()
        by = x.T if rounding == "gptq" else torch.eye(48)
        found[correct].append(error(hat @ by, delta @ by))
    assert np.mean(found[True]) < np.mean(found[False])


# ImPart-Qt


@pytest.mark.parametrize("charge", ["paper", "code"])
@pytest.mark.parametrize("shape", [(96, 128), (128, 64)], ids=str)
def test_impart_qt_keeps_what_the_total_says(charge: str, shape) -> None:
    s, widths = svd(spiked(shape))[1], grouped(min(shape))
    edit = ImpartQt(0.5, 0.6, 1.0, "exact", charge, "nearest", "max")
    drop = edit.drop(s, shape, widths)
    charged = torch.where((widths == 3) & (charge == "code"), 4, widths)
    spent = float(((1 - drop.double()) * charged).sum()) * sum(shape)
    wanted = 0.5 * shape[0] * shape[1]
    assert wanted - 3 * sum(shape) <= spent <= wanted  # the boundary shift takes whole components
    assert spent >= 0.9 * wanted


def test_impart_qt_with_all_entries_is_delta_come() -> None:
    delta = spiked((40, 40))
    edit = ImpartQt(8.0, 0.0, 1.0, "exact", "paper", "nearest", "max")
    hat = call(edit, delta)
    widths = grouped(40)
    assert torch.equal(hat, quantised((40, 40), svd(delta), widths, "max").decode())


def test_masked_entries_take_no_part_in_what_is_made_good() -> None:
    delta, x = spiked((32, 48)), inputs(48)
    plain = ImpartQt(0.8, 0.2, 1.0, "exact", "paper", "nearest", "max")
    good = ImpartQt(0.8, 0.2, 1.0, "exact", "paper", "gptq", "max")
    given = {"svd": lambda: svd(delta), "rng": Rng(1, "w")}
    one, other = plain.encode(delta, **given), good.encode(delta, **given, gram=gram_of(x))
    for a, b in zip(one.sides(), other.sides(), strict=True):
        assert torch.equal(a == 0, b == 0)
        assert not torch.equal(a, b)


# UltraDelta


def ultra(**changed) -> Ultradelta:
    return Ultradelta(**{"rate": 0.7, "bits": 3, "gamma": 1.0, "rescale": "per_layer", **changed})


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.97])
def test_survivors_have_the_histogram_of_all(rate: float) -> None:
    levels = (3 + 2 * tensor((60, 70))).round().clamp(0, 15).int()
    kept = survivors(levels, -1, rate, Rng(0, "w"))
    before = np.bincount(levels.reshape(-1), minlength=16)
    after = np.bincount(levels[kept], minlength=16)
    assert np.abs(after - (1 - rate) * before).max() <= 1
    assert abs(after.sum() - (1 - rate) * before.sum()) <= 0.5
    zero = survivors(levels, 3, 0.5, Rng(0, "w"))
    assert not zero[levels == 3].any()
    assert abs(int(zero.sum()) - 2100) <= 1


def test_ultradelta_is_its_grid_in_the_mean() -> None:
    """Every entry of a level survives with the share of its level, (1 - rate) to within one."""
    delta = tensor((12, 20))
    low, high = delta.min(), delta.max()
    level = ((delta - low) / (high - low) * 7).round().int()
    grid = (low + level * (high - low) / 7).double()
    kept = survivors(level, -1, 0.7, Rng(0, "w"))
    before, after = (np.bincount(level[m], minlength=8) for m in (kept | ~kept, kept))
    share = torch.from_numpy(after / np.maximum(before, 1))[level]
    draws = torch.stack([call(ultra(), delta, seed=seed) for seed in range(800)]).double()
    spread = (grid / 0.3).abs() * (share * (1 - share) / 800).sqrt()
    off = (draws.mean(0) - grid * share / 0.3).abs()
    assert bool((off <= 4.5 * spread + 1e-6).all())
    assert float((share * before.sum()).mean() / before.sum()) == pytest.approx(0.3, abs=1 / 240)


def test_ultradelta_rescales_globally_or_by_layer() -> None:
    edit = ultra(rescale="global")
    delta = tensor((12, 20))
    own, shared = ultra(rate=0.9), edit.with_share(0.9)
    one, other = (x.encode(delta, rng=Rng(0, "w")) for x in (own, shared))
    assert one.settings["scale"] == pytest.approx(10.0)
    assert other.settings["scale"] == pytest.approx(1 / 0.3)
    assert torch.equal(one.arrays["values"], other.arrays["values"])
    near = call(ultra(rate=0.0, bits=16), delta)
    assert torch.allclose(near, delta, atol=float(delta.max() - delta.min()) / 65535)


def test_ultradelta_s_bits_are_four_a_survivor_and_their_places() -> None:
    delta = tensor((256, 256))
    code = ultra(rate=0.9, bits=4).encode(delta, rng=Rng(0, "w"))
    assert isinstance(code, Levelled)
    q = 0.1
    h2 = -(q * np.log2(q) + (1 - q) * np.log2(1 - q))
    assert code.bits.payload == pytest.approx(4 * q * delta.numel(), abs=64)
    assert code.bits.bound / delta.numel() == pytest.approx(4 * q + h2, rel=0.04)
    assert code.bits.total / delta.numel() < 4 * q + 1.12 * h2 + 0.04


# Delta-DCT


def dct(**changed) -> DeltaDct:
    own = {"side": 8, "shares": {3: 1.0}, "fill": "mean", "range": "minmax", "rescale": "off"}
    return DeltaDct(**{**own, "transform": "dct", **changed})


def dct_by_scipy(delta: np.ndarray, side: int, bits: int) -> np.ndarray:
    out = np.zeros_like(delta)
    for i, j in product(range(0, delta.shape[0], side), range(0, delta.shape[1], side)):
        c = scipy.fft.dctn(delta[i : i + side, j : j + side], norm="ortho")
        step = (c.max() - c.min()) / (2**bits - 1)
        near = c.min() + np.round((c - c.min()) / step) * step
        out[i : i + side, j : j + side] = scipy.fft.idctn(near, norm="ortho")
    return out


@pytest.mark.parametrize("side", [4, 8, 16])
def test_delta_dct_is_scipy_s(side: int) -> None:
    delta = tensor((32, 48))
    hat = call(dct(side=side, shares={8: 1.0}), delta).double().numpy()
    wanted = dct_by_scipy(delta.double().numpy(), side, 8)
    assert np.abs(hat - wanted).max() < 0.03 * np.abs(delta.numpy()).max()
    assert error(torch.from_numpy(hat), torch.from_numpy(wanted)) < 0.01 * float(delta.norm()) ** 2


@pytest.mark.parametrize("kind", ["minmax", "absmax"])
def test_coefficients_are_off_by_half_a_step_at_most(kind: str) -> None:
    delta, basis = tensor((16, 24)), scipy.fft.dct(np.eye(8), norm="ortho", axis=0)
    for bits in range(2, 9):
        hat = call(dct(shares={bits: 1.0}, range=kind), delta)
        for i, j in product(range(0, 16, 8), range(0, 24, 8)):
            own, got = (
                basis @ x[i : i + 8, j : j + 8].double().numpy() @ basis.T for x in (delta, hat)
            )
            span = own.max() - own.min() if kind == "minmax" else 2 * np.abs(own).max()
            assert np.abs(own - got).max() <= 0.51 * span / (2**bits - 1) + 1e-3 * span
            near = error(hat[i : i + 8, j : j + 8], delta[i : i + 8, j : j + 8])
            assert ((own - got) ** 2).sum() == pytest.approx(near, rel=1e-5)


def test_the_largest_patches_have_the_most_bits_in_exact_shares() -> None:
    delta = tensor((40, 56)) * torch.linspace(0.1, 3, 40)[:, None]
    edit = dct(shares={4: 0.34, 2: 0.33, 0: 0.33})
    norms = torch.tensor([[float(p.norm()) for p in r.split(8, 1)] for r in delta.split(8, 0)])
    level = edit.allotted(norms.reshape(-1).square())
    assert np.bincount(level).tolist() == [12, 12, 11]
    ordered = norms.reshape(-1)
    assert ordered[level == 0].min() >= ordered[level == 1].max()
    assert ordered[level == 1].min() >= ordered[level == 2].max()
    code = edit.encode(delta)
    assert code.bits.payload == 64 * (12 * 4 + 12 * 2)
    held = {name: array.numel() * array.element_size() for name, array in code.arrays.items()}
    assert held["range.4"] == held["range.2"] == 12 * 4
    assert (held["fill"], held["level"]) == (11 * 2, 9)


def test_patches_may_change_places_and_entries_within_only_without_a_transform() -> None:
    delta = tensor((16, 16))
    swapped = torch.cat([delta[8:], delta[:8]])
    shuffled = delta.clone()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled[:8] = delta[:8][order]
    for transform in ("dct", "identity"):
        edit = dct(transform=transform, shares={2: 0.5, 0: 0.5}, rescale="auto")
        hat = call(edit, delta)
        assert torch.allclose(torch.cat([hat[8:], hat[:8]]), call(edit, swapped), atol=1e-6)
        same = torch.allclose(call(edit, shuffled)[:8], hat[:8][order], atol=1e-6)
        assert same == (transform == "identity")


@pytest.mark.parametrize("shape", [(20, 30), (8, 8), (5, 40)], ids=str)
def test_fills_and_rescaling(shape) -> None:
    delta = tensor(shape)
    hat = call(dct(shares={2: 0.5, 0: 0.5}, rescale="auto"), delta)
    assert float(hat.abs().double().mean()) == pytest.approx(float(delta.abs().mean()), rel=1e-6)
    flat = torch.full(shape, 0.7)
    assert torch.allclose(call(dct(shares={0: 1.0}), flat), flat, rtol=1e-3)
    assert torch.equal(call(dct(shares={0: 1.0}, fill="zero"), flat), 0 * flat)
    assert torch.allclose(call(dct(side=1, shares={0: 1.0}), delta), delta, atol=2e-3)


def test_shares_that_cannot_be() -> None:
    for shares in ({}, {2: 0.5}, {9: 1.0}, {2: 1.5, 0: -0.5}, {"two": 1.0}):
        with pytest.raises(ValueError, match=r"edit\.shares=.*must be shares that add up to 1"):
            dct(shares=shares)


# D-QRELO


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dqrelo_is_bitdelta_and_the_best_low_rank_of_the_rest(shape) -> None:
    delta = spiked(shape)
    one_bit = call(ONE_BIT, delta)
    none = Dqrelo(total=1.0, order="sign_svd", values="float16")
    assert torch.equal(call(none, delta), one_bit)
    edit = Dqrelo(total=4.0, order="sign_svd", values="float32")
    rank = edit.rank(shape)
    s = scipy.linalg.svdvals((delta - one_bit).double().numpy())
    now = error(call(edit, delta), delta)
    assert 0 < rank < min(shape)
    assert now == pytest.approx((s[rank:] ** 2).sum(), rel=1e-4)
    assert now < error(one_bit, delta)
    full = Dqrelo(total=100.0, order="sign_svd", values="float32")
    assert torch.allclose(call(full, delta), delta, atol=1e-5)


def test_dqrelo_s_order_and_bits() -> None:
    delta = spiked((64, 96))
    first = Dqrelo(total=2.0, order="svd_sign", values="float16")
    rank = first.rank((64, 96))
    low = call(Twin(rank=rank, rate=None), delta)
    rest = delta - low
    wanted = low + rest.abs().mean() * torch.where(rest < 0, -1.0, 1.0)
    assert rank == int(np.ceil(64 * 96 / 16 / 160))
    assert error(call(first, delta), wanted) < 1e-4 * error(delta, 0 * delta)
    code = first.encode(delta, svd=lambda: svd(delta))
    assert code.bits.payload == 64 * 96 + 16 * rank * (64 + 96)


# The axis of BitDelta


def test_the_best_axis() -> None:
    delta, x = tensor((24, 40)) * torch.linspace(0.1, 2, 24)[:, None], inputs(40)
    gram, errors, outputs = gram_of(x), {}, {}
    for axis in ("tensor", "row", "column"):
        hat = call(BitDelta(1.0, "mean", 0.0, axis), delta)
        errors[axis], outputs[axis] = error(hat, delta), error(hat @ x.T, delta @ x.T)
    assert max(errors["row"], errors["column"]) <= errors["tensor"]
    data_free = BitDelta(1.0, "mean", 0.0, "best")
    assert data_free.along(delta, None).axis == min(errors, key=errors.get) == "row"
    assert data_free.along(delta.T, None).axis == "column"
    assert BitDelta(1.0, "mean", 0.0, "best_output").along(delta, gram).axis == min(
        outputs, key=outputs.get
    )
    assert torch.equal(call(data_free, delta), call(BitDelta(1.0, "mean", 0.0, "row"), delta))


# DBMS


def test_a_base_that_is_not_moved_leaves_the_compressor() -> None:
    delta = spiked((24, 40))
    edit = Shifted(base=["bitdelta"], edit=["bitdelta"], amount=0.0, scale=1.0)
    assert torch.equal(call(edit, delta), call(ONE_BIT, delta))
    exact = Shifted(base=["keep"], edit=["bitdelta"], amount=1.0, scale=1.0)
    assert torch.allclose(call(exact, delta), delta, atol=1e-6)
    kept = Shifted(base=["bitdelta"], edit=["keep"], amount=0.37, scale=1.0)
    assert torch.allclose(call(kept, delta), delta, atol=1e-6)


def test_amount_and_scale_are_those_of_least_squares() -> None:
    delta = spiked((24, 40))
    low = {"twin": {"rank": 2, "rate": None}}
    edit = Shifted(base=[low], edit=["bitdelta"], amount="fit", scale="fit")
    code = edit.encode(delta, svd=lambda: svd(delta), rng=Rng(0, "w"))
    v = call(Twin(rank=2, rate=None), delta)
    amount, scale = code.settings["weight.0"], code.settings["weight.1"]
    assert amount == pytest.approx(float((delta * v).sum() / (v * v).sum()), rel=1e-5)
    assert scale == pytest.approx(1.0, abs=1e-6)  # BitDelta's own scale is that already
    half = Shifted(base=[low], edit=[{"bitdelta": {"multiple": 0.5}}], amount="fit", scale="fit")
    code = half.encode(delta, svd=lambda: svd(delta), rng=Rng(0, "w"))
    assert code.settings["weight.1"] == pytest.approx(2.0, rel=1e-6)
    assert error(call(edit, delta), delta) < error(call(ONE_BIT, delta), delta)


def test_the_expected_error_of_dare_on_a_moved_base() -> None:
    """p / (1 - p) ||D - a v||^2, least at the fitted a."""
    delta = spiked((24, 40))
    v = call(ONE_BIT, delta).double()
    fit = float((delta * v).sum() / (v * v).sum())
    expected = {}
    for amount in (0.0, fit):
        edit = Shifted(base=["bitdelta"], edit=[{"dare": {"p": 0.8}}], amount=amount, scale=1.0)
        draws = [error(call(edit, delta, seed=seed), delta) for seed in range(200)]
        expected[amount] = 4 * error(amount * v, delta)
        assert abs(np.mean(draws) - expected[amount]) < 4 * np.std(draws) / 200**0.5
    assert expected[fit] < expected[0.0]
    assert torch.equal(
        call(Shifted(base=["bitdelta"], edit=["dare"], amount=0.5, scale=1.0), delta),
        call(Shifted(base=["bitdelta"], edit=["dare"], amount=0.5, scale=1.0), delta),
    )
    assert Dare(p=0.8, k=0.0).moments().variance == pytest.approx(4.0)


def test_parts_without_a_code_are_refused() -> None:
    delta = spiked((24, 40))
    with pytest.raises(ValueError, match=r"edit\.edit=\['expo'\]: has no code, so saves nothing"):
        call(Shifted(base=["bitdelta"], edit=["expo"], amount=0.5, scale=1.0), delta)
    with pytest.raises(ValueError, match=r"edit\.base=nope: must name one of"):
        Shifted(base=["nope"], edit=["dare"], amount=0.5, scale=1.0)
    with pytest.raises(ValueError, match=r"edit\.amount=most: must be a number, or fit"):
        Shifted(base=["keep"], edit=["dare"], amount="most", scale=1.0)
