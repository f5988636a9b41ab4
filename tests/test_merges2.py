"""Merges that weigh, calibrate, share, route and adapt: identities, brute force, oracles."""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy.cluster.hierarchy import cut_tree, linkage
from second_device import DEVICES, back, lent, on
from sklearn.cluster import AgglomerativeClustering, KMeans
from torch import Tensor, nn
from torch.func import functional_call

from deltalab import keys, options, run
from deltalab.apply.extras import Extras
from deltalab.apply.merging import Expert, Family
from deltalab.artifacts import Store
from deltalab.calibration.entropy import Entropy, gradient_at
from deltalab.calibration.providing import Calibration
from deltalab.data import splits
from deltalab.edits.breadcrumbs import Breadcrumbs
from deltalab.edits.dare import Dare
from deltalab.edits.della import Della
from deltalab.edits.ties import Ties as Trim
from deltalab.edits.twin import Twin
from deltalab.linear.factor import svd
from deltalab.loss.objectives import CrossEntropy
from deltalab.merges.adamerging import Adamerging
from deltalab.merges.average import Average
from deltalab.merges.channel import HEADED, Channel
from deltalab.merges.emr import Emr
from deltalab.merges.fisher import Fisher
from deltalab.merges.sum import Sum
from deltalab.merges.svc import Svc
from deltalab.merges.ties import Ties
from deltalab.merges.twin_merging import TwinMerging
from deltalab.rng import Rng
from deltalab.settings import conf_dir, tidy
from deltalab.store import latest
from deltalab.weights.mapping import ModelPair

FISHER = Fisher(weights=None, normalise="none", ridge=0.0)
SVC = Svc(alpha=None, weight=1.0)
CHANNEL = Channel(
    groups=2, budget=None, spread="model", granularity="channel", head=None,
    similarity="distance", weight=1.0,
)  # fmt: skip
ADA = Adamerging(scope="tensor", weight=0.3, steps=3, lr=0.01, batch=8, elect=False)


def tensor(shape, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def deltas_of(shape, count: int = 2, seed: int = 0) -> list[Tensor]:
    return [tensor(shape, seed + index) for index in range(count)]


def names_of(count: int) -> list[str]:
    return [*"abcdefgh"[:count]]


def optional(module: str):
    return pytest.importorskip(module, reason=f"{module} comes with the optional group `oracles`")


# --- fisher -------------------------------------------------------------------------------------


def fished(deltas, steep, merge=FISHER) -> Tensor:
    return merge(deltas, fisher=steep, experts=names_of(len(deltas)))


def test_fisher_is_the_minimum_of_its_quadratic() -> None:
    deltas, steep = deltas_of((6, 5), 3), [t.square() for t in deltas_of((6, 5), 3, 9)]
    shares = {"a": 1.0, "b": 2.0, "c": 0.5}
    found = fished(deltas, steep, replace(FISHER, weights=shares))
    scaled = np.stack([w * f.double().numpy() for w, f in zip(shares.values(), steep, strict=True)])
    root = np.sqrt(scaled)
    for i, j in np.ndindex(6, 5):
        side = root[:, i, j] * np.array([float(d[i, j]) for d in deltas])
        wanted = np.linalg.lstsq(root[:, i, j, None], side, rcond=None)[0]
        assert float(found[i, j]) == pytest.approx(wanted[0], rel=1e-5, abs=1e-6)


def test_fisher_of_equal_of_endless_and_of_no_information() -> None:
    deltas, one = deltas_of((4, 7), 3), tensor((4, 7), 5).square() + 0.1
    shares = {"a": 2, "b": 1, "c": 1}
    for merge, weights in ((FISHER, None), (replace(FISHER, weights=shares), shares)):
        wanted = Average(weights)(deltas, experts=names_of(3))
        assert torch.allclose(fished(deltas, [one] * 3, merge), wanted, atol=1e-6)
        assert torch.allclose(fished(deltas, [0 * one] * 3, merge), wanted, atol=1e-6)
    assert torch.allclose(fished(deltas, [1e15 * one, one, one]), deltas[0], atol=1e-6)
    assert torch.equal(fished(deltas[:1], [one]), deltas[0])
    tiny = [1e-30 * t.square() for t in deltas_of((4, 7), 3, 9)]  # their products are no float32
    large = [1e30 * each for each in tiny]
    assert torch.allclose(fished(deltas, tiny), fished(deltas, large), atol=1e-5)


def test_fisher_normalised_counts_experts_alike_and_ridged_averages() -> None:
    deltas, steep = deltas_of((4, 7), 2), [t.square() for t in deltas_of((4, 7), 2, 9)]
    alike = replace(FISHER, normalise="trace")
    found = fished(deltas, steep, alike)
    assert torch.allclose(found, fished(deltas, [50 * steep[0], steep[1]], alike), atol=1e-5)
    assert not torch.allclose(found, fished(deltas, [50 * steep[0], steep[1]]), atol=1e-1)
    mean = torch.stack(deltas).mean(0)
    ridged = replace(FISHER, ridge=1e9)
    assert torch.allclose(fished(deltas, steep, ridged), mean, atol=1e-5)
    some = fished(deltas, steep, replace(FISHER, ridge=1.0))
    level = torch.stack(steep).mean()
    weights = torch.stack(steep) + level
    wanted = (weights * torch.stack(deltas)).sum(0) / weights.sum(0)
    assert torch.allclose(some, wanted, atol=1e-5)


# --- svc ----------------------------------------------------------------------------------------


def calibrated(deltas: list[Tensor], alpha: float) -> np.ndarray:
    """The equations, one component after the other."""
    each = [d.double().numpy() for d in deltas]
    u, s, vh = np.linalg.svd(sum(each), full_matrices=False)
    found = np.zeros_like(each[0])
    for r in range(len(s)):
        parts = [u[:, r] @ d for d in each]
        overlaps = [max(alpha, (s[r] * vh[r]) @ a / (a @ a)) for a in parts]
        found += s[r] * len(each) / sum(overlaps) * np.outer(u[:, r], vh[r])
    return found


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_svc_in_numpy(shape, count: int) -> None:
    deltas = deltas_of(shape, count, seed=3)
    for alpha in (None, 0.1):
        found = Svc(alpha=alpha, weight=0.5)(deltas)
        wanted = 0.5 * calibrated(deltas, alpha or 1 / count)
        assert np.allclose(found.numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_svc_gives_equal_experts_back_and_adds_up_strangers(count: int) -> None:
    same = tensor((12, 20), 1)
    assert torch.allclose(SVC([same] * count), same, atol=1e-5)
    bias = tensor((9,), 1)
    assert torch.allclose(SVC([bias] * count), bias, atol=1e-6)
    for rows in (slice(None), None):  # no column in common, or no row either
        apart = []
        for index in range(count):
            own, place = torch.zeros(20, 20), slice(4 * index, 4 * index + 4)
            own[rows or place, place] = tensor(own[rows or place, place].shape, index)
            apart.append(own)
        assert torch.allclose(SVC(apart), sum(apart), atol=1e-5)
    low = tensor((12, 2), 3) @ tensor((2, 20), 4)
    assert torch.allclose(SVC([low] * count), low, atol=1e-5)
    assert not SVC([low, -low]).isnan().any()


def test_svc_lies_between_mean_and_sum() -> None:
    common, own = tensor((16, 24), 0), deltas_of((16, 24), 3, 5)
    sizes = []
    for share in (1.0, 0.7, 0.3, 0.0):
        deltas = [share * common + (1 - share**2) ** 0.5 * each for each in own]
        sizes.append(float(SVC(deltas).norm() / sum(deltas).norm()))
    assert sizes == sorted(sizes), "the less experts have in common, the less is taken off"
    assert sizes[0] == pytest.approx(1 / 3, abs=1e-5)


# --- channel ------------------------------------------------------------------------------------


def groupings(count: int, groups: int):
    """Yield every way to put so many into groups, as labels; the same one many times."""
    for labels in product(range(groups), repeat=count):
        yield np.array(labels)


def squared_error(rows: np.ndarray, labels: np.ndarray) -> float:
    means = {g: rows[labels == g].mean(0) for g in set(labels.tolist())}
    return sum(
        float(((r - means[g]) ** 2).sum()) for r, g in zip(rows, labels.tolist(), strict=True)
    )


def stacked(deltas: list[Tensor]) -> np.ndarray:
    return np.stack([d.flatten(1).double().numpy() for d in deltas], 1)  # (rows, experts, width)


def error_of(deltas, found) -> float:
    return sum(float((d - f).double().square().sum()) for d, f in zip(deltas, found, strict=True))


@pytest.mark.parametrize(("count", "groups"), [(2, 1), (3, 2), (4, 2), (4, 3), (5, 3), (6, 2)])
def test_channel_is_the_best_of_all_groupings(count: int, groups: int) -> None:
    deltas = deltas_of((5, 3), count)
    found = replace(CHANNEL, groups=groups)(deltas)
    for rows, made in zip(stacked(deltas), stacked(found), strict=True):
        best = min(groupings(count, groups), key=partial(squared_error, rows))
        wanted = np.stack([rows[best == g].mean(0) for g in best])
        assert np.allclose(made, wanted, atol=1e-6)


@pytest.mark.parametrize("count", [3, 6])
def test_channel_by_cosine_is_the_best_grouping_of_directions(count: int) -> None:
    deltas = [d * 10.0**i for i, d in enumerate(deltas_of((6, 3), count))]
    deltas[1][2] = 0  # a row without a direction
    found = replace(CHANNEL, similarity="cosine")(deltas)
    for rows, made in zip(stacked(deltas), stacked(found), strict=True):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        turned = np.divide(rows, lengths, where=lengths > 0, out=np.zeros_like(rows))
        best = min(groupings(count, 2), key=partial(squared_error, turned))
        wanted = np.stack([rows[best == g].mean(0) for g in best])
        assert np.allclose(made, wanted, rtol=1e-5, atol=1e-6)


def test_channel_is_no_worse_than_k_means() -> None:
    deltas = deltas_of((4, 6), 6, seed=2)
    ours = error_of(deltas, replace(CHANNEL, groups=3)(deltas))
    theirs = sum(
        KMeans(3, n_init=50, random_state=0).fit(rows).inertia_ for rows in stacked(deltas)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 5, 8])
def test_channel_of_many_experts_is_wards(groups: int) -> None:
    deltas = deltas_of((7, 5), 8, seed=4)
    found = replace(CHANNEL, groups=groups)(deltas)
    for rows, made in zip(stacked(deltas), stacked(found), strict=True):
        labels = AgglomerativeClustering(n_clusters=groups, linkage="ward").fit_predict(rows)
        wanted = np.stack([rows[labels == g].mean(0) for g in labels])
        assert np.allclose(made, wanted, atol=1e-6)


def test_channel_costs_are_scipys_heights() -> None:
    deltas = deltas_of((7, 5), 8, seed=4)
    costs, width = CHANNEL.costs(deltas)
    assert width == 5
    for rows, own in zip(stacked(deltas), costs, strict=True):
        heights = linkage(rows, "ward")[:, 2]
        assert np.allclose(own.numpy(), heights**2 / 2 / width, rtol=1e-5)


def family(tensors: dict[str, list[Tensor]], merge) -> Family:
    pre = {name: torch.zeros_like(each[0]) for name, each in tensors.items()}
    count = len(next(iter(tensors.values())))
    posts = [{name: each[t] for name, each in tensors.items()} for t in range(count)]
    return Family({n: Expert(pre, p) for n, p in zip(names_of(count), posts, strict=True)}, merge)


def outcome(whole: Family) -> list[dict[str, Tensor]]:
    return [dict(whole.merged(name)) for name in whole.experts]


def distinct(found: list[dict[str, Tensor]], name: str) -> int:
    """How many numbers different rows of all experts have."""
    rows = torch.stack([each[name].flatten(1) for each in found], 1)
    return sum(len(torch.unique(row, dim=0)) for row in rows) * rows.shape[2]


@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("budget", [0.3, 0.6, 0.85])
def test_a_budget_is_spent_where_rows_agree_over_the_whole_model(budget: float, count: int) -> None:
    if budget * count < 1:
        pytest.skip("less than one model")
    shapes = {"w": (9, 4), "v": (6, 11), "u": (3, 2, 2, 2)}
    scale = {"w": 1.0, "v": 0.5, "u": 2.0}
    tensors = {n: [scale[n] * d for d in deltas_of(s, count, 7)] for n, s in shapes.items()}
    merge = replace(CHANNEL, groups=None, budget=budget)
    whole = family(tensors, merge)
    found = outcome(whole)
    joins = []  # of Ward's method, by SciPy: cost for each number saved
    trees = {}
    for name, deltas in tensors.items():
        for i, rows in enumerate(stacked(deltas)):
            trees[name, i] = linkage(rows, "ward")
            width = rows.shape[1]
            joins += [(h**2 / 2 / width, name, i, width) for h in trees[name, i][:, 2]]
    everything = sum(count * d[0].numel() for d in tensors.values())
    left, done = everything, dict.fromkeys(trees, 0)
    for _, name, i, width in sorted(joins):
        if left <= budget * everything:
            break
        left -= width
        done[name, i] += 1
    for (name, i), steps in done.items():
        rows = stacked(tensors[name])[i]
        labels = cut_tree(trees[name, i], n_clusters=count - steps).ravel()
        wanted = np.stack([rows[labels == g].mean(0) for g in labels])
        made = np.stack([each[name].flatten(1)[i].double().numpy() for each in found])
        assert np.allclose(made, wanted, atol=1e-6), (name, i)
    assert sum(distinct(found, name) for name in tensors) == left <= budget * everything
    table = sum(d[0].shape[0] for d in tensors.values()) * count * (count - 1).bit_length() / 16
    assert whole.kept() == pytest.approx((left + table) / everything)


@pytest.mark.parametrize("device", DEVICES)
def test_a_budget_on_another_device(device: str) -> None:
    deltas = deltas_of((8, 6), 4)
    merge = replace(CHANNEL, groups=None, budget=0.5, granularity="head", head=2)
    given = [on(device, delta) for delta in deltas]
    total = lambda sums: sums(given, name="q_proj.weight")  # noqa: E731
    with lent():
        found = merge(given, name="q_proj.weight", total=total)
    there = lambda sums: sums(deltas, name="q_proj.weight")  # noqa: E731
    for own, wanted in zip(found, merge(deltas, name="q_proj.weight", total=there), strict=True):
        assert own.device == given[0].device
        assert torch.allclose(back(own), wanted, atol=1e-6)


def test_the_ends_of_a_budget_are_the_experts_and_their_mean() -> None:
    tensors = {"w": deltas_of((6, 4), 4), "b": deltas_of((6,), 4)}
    own = outcome(family(tensors, replace(CHANNEL, groups=None, budget=1.0)))
    one = outcome(family(tensors, replace(CHANNEL, groups=None, budget=0.25)))
    for t in range(4):
        assert torch.equal(own[t]["w"], tensors["w"][t])
        assert torch.allclose(one[t]["w"], torch.stack(tensors["w"]).mean(0), atol=1e-6)
        assert torch.equal(one[t]["b"], tensors["b"][t])


def test_channel_identities() -> None:
    deltas = deltas_of((8, 5), 4)
    mean = Sum(0.7 / 4, None)(deltas, experts=names_of(4))
    for each in replace(CHANNEL, groups=1, weight=0.7)(deltas):
        assert torch.allclose(each, mean, atol=1e-6)
    for groups in (4, 9):
        found = replace(CHANNEL, groups=groups)(deltas)
        assert all(torch.equal(f, d) for f, d in zip(found, deltas, strict=True))
    for count, groups in ((4, 2), (7, 2), (5, 5)):
        found = replace(CHANNEL, groups=groups)([deltas[0]] * count)
        assert all(torch.equal(each, deltas[0]) for each in found)
    pairs = [deltas[0], deltas[1], deltas[0], deltas[1]]
    found = CHANNEL(pairs)
    assert all(torch.equal(f, d) for f, d in zip(found, pairs, strict=True))
    order = [2, 0, 3, 1]
    turned = CHANNEL([deltas[i] for i in order])
    assert all(
        torch.allclose(t, CHANNEL(deltas)[i], atol=1e-6) for t, i in zip(turned, order, strict=True)
    )


@pytest.mark.parametrize("count", [4, 8])
def test_channel_errs_less_the_more_it_keeps_and_less_than_at_random(count: int) -> None:
    deltas = deltas_of((40, 6), count, seed=1)
    errors = [error_of(deltas, replace(CHANNEL, groups=k)(deltas)) for k in range(1, count + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    merge = replace(CHANNEL, groups=None, budget=0.75)
    own = outcome(family({"w": deltas}, merge))
    ours = error_of(deltas, [each["w"] for each in own])
    generator = np.random.default_rng(0)
    rows = stacked(deltas)
    for _ in range(20):  # joins of as many rows, drawn
        labels = np.tile(np.arange(count), (40, 1))
        for _ in range(10 * count):
            row = generator.integers(40)
            one, other = generator.choice(count, 2, replace=False)
            labels[row][labels[row] == labels[row, other]] = labels[row, one]
        assert ours < sum(squared_error(r, g) for r, g in zip(rows, labels, strict=True))


@pytest.mark.parametrize("head", [None, 4])
def test_a_budget_is_spread_over_the_model_or_by_tensor(head: int | None) -> None:
    """Of a tensor with small deltas the model's budget shares all, its own no more than it is."""
    tensors = {"q.weight": deltas_of((12, 5), 2), "w": [9 * d for d in deltas_of((40, 5), 2)]}
    granularity = "head" if head else "channel"
    over = replace(CHANNEL, groups=None, budget=0.75, granularity=granularity, head=head)
    shared = {}
    for spread in ("model", "tensor"):
        one, other = outcome(family(tensors, replace(over, spread=spread)))
        for name, deltas in tensors.items():
            same = (one[name] == other[name]).all(1)
            shared[spread, name] = int(same.sum())
            assert torch.equal(one[name][~same], deltas[0][~same])
            assert torch.allclose(one[name][same], (deltas[0] + deltas[1])[same] / 2, atol=1e-6)
    assert shared["model", "q.weight"] == 12
    assert shared["model", "w"] == 14
    assert shared["tensor", "q.weight"] == (8 if head else 6), "of three heads two"
    assert shared["tensor", "w"] == 20
    lone = replace(over, spread="tensor")
    assert "total" not in lone.needs
    kept = lone.kept(tensors["w"], name="w")
    assert kept == 300 + 2 * 40 / 16


def test_the_rows_of_a_head_go_together() -> None:
    deltas = deltas_of((12, 5), 4)
    by_head = replace(CHANNEL, granularity="head", head=4)
    assert by_head.needs == ("name",)
    found = by_head(deltas, name="blocks.0.attn.qkv.weight")
    flat = CHANNEL([d.reshape(3, 20) for d in deltas])
    assert all(torch.equal(f, g.reshape(12, 5)) for f, g in zip(found, flat, strict=True))
    others = by_head(deltas, name="blocks.0.mlp.fc1.weight")
    assert all(torch.equal(f, g) for f, g in zip(others, CHANNEL(deltas), strict=True))
    with pytest.raises(ValueError, match=r"merge.head=5: x.q_proj.weight has 12 rows"):
        replace(by_head, head=5)(deltas, name="x.q_proj.weight")
    budget = replace(by_head, groups=None, budget=0.5)
    names = {"x.q_proj.weight": deltas, "x.o_proj.weight": deltas_of((12, 5), 4, 9)}
    found = outcome(family(names, budget))
    for rows in torch.stack([each["x.q_proj.weight"] for each in found], 1).split(4):
        whole = rows.transpose(0, 1).flatten(1)
        kinds = len(torch.unique(whole, dim=0))
        assert all(len(torch.unique(row, dim=0)) == kinds for row in rows)


@pytest.mark.parametrize(
    ("name", "headed"),
    [
        ("blocks.0.attn.qkv.weight", True),
        ("model.layers.1.self_attn.q_proj.weight", True),
        ("model.layers.1.self_attn.k_proj.weight", True),
        ("encoder.layer.0.attention.self.query.weight", True),
        ("transformer.h.0.self_attention.query_key_value.weight", True),
        ("model.layers.1.self_attn.o_proj.weight", False),
        ("blocks.0.attn.proj.weight", False),
        ("model.layers.1.mlp.gate_proj.weight", False),
        ("model.layers.1.self_attn.q_norm.weight", False),
        ("visual.attn.in_proj_weight", True),
        ("layers.0.mixer.in_proj.weight", False),
    ],
)
def test_which_tensors_have_heads(name: str, headed: bool) -> None:
    assert bool(HEADED.search(name)) is headed


def test_what_is_kept_of_separate_experts() -> None:
    tensors = {"w": deltas_of((8, 6), 4), "b": deltas_of((8,), 4)}
    separate = 4 * (48 + 8)
    kept = lambda merge: family(tensors, merge).kept() * separate  # noqa: E731
    assert kept(Sum(1.0, None)) == pytest.approx(48 + 8)
    assert kept(Emr()) == pytest.approx(56 * (1 + 4 / 16))
    two = kept(CHANNEL)
    assert two == pytest.approx(2 * 48 + 4 * 8 + 2 * 4 * 8 / 16)
    assert kept(TwinMerging(weight=0.3, rank=2, rate=None)) == pytest.approx(
        48 + 4 * 2 * 14 + 4 * 8
    )
    assert kept(TwinMerging(weight=0.3, rank=6, rate=None)) == pytest.approx(separate)


# --- twin ---------------------------------------------------------------------------------------


def test_twin_merging_leaves_out_the_tail_of_the_rest() -> None:
    deltas = deltas_of((9, 12), 3)
    shared = 0.3 * torch.stack(deltas).double().sum(0)
    for rank in (1, 4):
        found = TwinMerging(weight=0.3, rank=rank, rate=None)(deltas)
        for own, delta in zip(found, deltas, strict=True):
            rest = (delta.double() - shared).numpy()
            u, s, vh = np.linalg.svd(rest)
            wanted = shared.numpy() + (u[:, :rank] * s[:rank]) @ vh[:rank]
            assert np.allclose(own.numpy(), wanted, atol=1e-5)
            error = float((own - delta).double().square().sum())
            assert error == pytest.approx((s[rank:] ** 2).sum(), rel=1e-4)


def test_twin_merging_identities() -> None:
    deltas = deltas_of((9, 12), 3)
    for whole in (TwinMerging(0.3, None, 0.0), TwinMerging(0.3, 99, None)):
        assert all(torch.equal(f, d) for f, d in zip(whole(deltas), deltas, strict=True))
    for own, delta in zip(TwinMerging(0.0, 3, None)(deltas), deltas, strict=True):
        alone = Twin(3, None)(delta, svd=partial(svd, delta))
        assert torch.allclose(own, alone, atol=1e-6)
    for own in TwinMerging(None, None, 1.0)(deltas):  # no rest
        assert torch.allclose(own, torch.stack(deltas).mean(0), atol=1e-6)
    for own in TwinMerging(None, 1, None)([deltas[0]] * 3):
        assert torch.allclose(own, deltas[0], atol=1e-6)
    base = tensor((9, 12), 50)
    near = [base + tensor((9, 2), t) @ tensor((2, 12), t) for t in range(3)]  # rests of rank 6
    assert all(
        torch.allclose(f, d, atol=1e-4)
        for f, d in zip(TwinMerging(None, 6, None)(near), near, strict=True)
    )


# --- adamerging ---------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.two = nn.Linear(8, 4)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


def live_family(merge, count: int = 3, labels: int = 0, dtype=torch.float32, edit=None):
    """Return a family of small networks with inputs of their own, and what it is made of."""
    pairs, losses, experts = {}, {}, {}
    pre = {n: tensor(p.shape, 3 + i, dtype) for i, (n, p) in enumerate(Net().named_parameters())}
    for t, name in enumerate(names_of(count)):
        post = {
            n: p + 0.7 * tensor(p.shape, 10 * t + i, dtype) for i, (n, p) in enumerate(pre.items())
        }
        module = Net().to(dtype)
        module.load_state_dict(post, strict=False)
        batches = [
            (tensor((5, 6), 100 * t + b), torch.full((5,), (b + labels) % 4)) for b in range(8)
        ]
        loss = CrossEntropy(tuple((x.to(dtype), y) for x, y in batches), most=3)
        pairs[name], losses[name] = ModelPair(pre, post, module), loss
        known = Calibration(pairs[name], loss, Store(None, {}))
        more = {"edit": edit, "extras": Extras(edit.needs, 0, salt=name)} if edit else {}
        experts[name] = Expert(pre, post, providers=known.providers(), **more)
    return Family(experts, merge), pairs, losses


def half(loss) -> list[Tensor]:
    return [x for x, _ in splits.halved(loss, "A").batches]


def reference(
    pairs, losses, merge: Adamerging, parts=None
) -> tuple[dict[str, Tensor], list[float]]:
    """AdaMerging by autograd through the merged weights, in float64; also every step's entropy."""
    names, experts = [*next(iter(pairs.values())).pre], [*pairs]
    pre = {n: p.double() for n, p in next(iter(pairs.values())).pre.items()}
    deltas = {n: [pairs[t].post[n].double() - pre[n] for t in experts] for n in names}
    if parts:
        deltas = {n: parts(each) for n, each in deltas.items()}
    rows = len(names) if merge.scope == "tensor" else 1
    raw = torch.full((rows, len(experts)), merge.weight, dtype=torch.float64, requires_grad=True)
    adam, module, seen = torch.optim.Adam([raw], lr=merge.lr), Net().double(), []
    inputs = {t: torch.cat(half(losses[t])).double() for t in experts}

    def merged(shares: Tensor) -> dict[str, Tensor]:
        shares = shares.clamp(0, 1)
        return {
            n: pre[n] + sum(shares[i % rows, t] * d for t, d in enumerate(deltas[n]))
            for i, n in enumerate(names)
        }

    for step in range(merge.steps):
        weights, total = merged(raw), 0.0
        for t in experts:
            cuts = inputs[t].split(merge.batch)
            logs = functional_call(module, weights, (cuts[step % len(cuts)],)).log_softmax(-1)
            total = total - (logs.exp() * logs).sum(-1).mean() / len(experts)
        adam.zero_grad()
        total.backward()
        adam.step()
        seen.append(total.item())
    return {n: w.detach() - pre[n] for n, w in merged(raw).items()}, seen


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_adamerging_in_autograd(scope: str) -> None:
    merge = replace(ADA, scope=scope, steps=12, lr=0.05)
    whole, pairs, losses = live_family(merge)
    found, pre = dict(whole.merged()), whole.experts["a"].pre
    wanted, _ = reference(pairs, losses, merge)
    for name, delta in wanted.items():
        assert torch.allclose((found[name] - pre[name]).double(), delta, atol=2e-5), name
    start, _ = reference(pairs, losses, replace(merge, steps=0))
    assert any(not torch.allclose(wanted[n], start[n], atol=0.05) for n in start)


def test_adamerging_without_steps_is_task_arithmetic_bit_for_bit() -> None:
    merge = replace(ADA, steps=0)
    whole, *_ = live_family(merge)
    plain = Family(whole.experts, Sum(0.3, None))
    for name, found in whole.merged().items():
        assert torch.equal(found, plain.merged()[name])


def test_the_entropy_falls_on_what_it_is_fitted_to() -> None:
    merge = replace(ADA, steps=20, lr=0.04, batch=100)
    whole, pairs, losses = live_family(merge)
    start, end = (
        np.mean([entropy_at(pairs[t], losses[t], dict(Family(whole.experts, m).merged()))
                 for t in pairs])
        for m in (replace(merge, steps=0), merge)
    )  # fmt: skip
    _, seen = reference(pairs, losses, merge)
    assert start == pytest.approx(seen[0], rel=1e-4)
    assert end < start - 0.02
    assert end == pytest.approx(seen[-1], abs=0.01)


def entropy_at(pair: ModelPair, loss, weights: dict[str, Tensor]) -> float:
    logs = functional_call(pair.module, weights, (torch.cat(half(loss)),)).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean().item()


def test_adamerging_sees_no_label_and_no_other_half_and_leaves_modules_alone() -> None:
    whole, pairs, losses = live_family(ADA)
    before = {
        t: {n: p.clone() for n, p in pair.module.state_dict().items()} for t, pair in pairs.items()
    }
    found = dict(whole.merged())
    for t, pair in pairs.items():
        assert all(torch.equal(p, before[t][n]) for n, p in pair.module.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in pair.module.parameters())
    other = dict(live_family(ADA, labels=1)[0].merged())
    assert all(torch.equal(found[n], other[n]) for n in found)
    for loss in losses.values():
        start = 0
        for x, _ in loss.batches:
            for row in range(len(x)):
                if splits.half_of(start + row) == "B":
                    x[row] = 100.0
            start += len(x)
    unseen = dict(whole.merged())  # what was learned is kept
    again = dict(Family(whole.experts, replace(ADA)).merged())
    assert all(torch.equal(found[n], unseen[n]) and torch.equal(found[n], again[n]) for n in found)
    assert splits.tunes(ADA.needs), "what is fitted to half A is judged on half B"


def test_the_gradient_of_the_entropy_is_that_of_differences() -> None:
    _, pairs, losses = live_family(ADA, count=1, dtype=torch.float64)
    pair, loss = pairs["a"], losses["a"]
    batches = splits.halved(loss, "A").batches
    weights = {n: t + 0.1 for n, t in pair.post.items() if n != "one.bias"}
    grads = gradient_at(pair, loss, batches, weights)
    assert [*grads] == [*weights]
    for name, grad in grads.items():
        way, step = tensor(grad.shape, 8, torch.float64), 1e-5
        ends = [
            entropy_at(pair, loss, {**weights, name: weights[name] + s * way})
            for s in (step, -step)
        ]
        assert float((grad * way).sum()) == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=1e-6
        )


def test_padding_has_no_entropy() -> None:
    class Words(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.stack([x, -x], -1)

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    words = torch.tensor([[0.0, 1.0, 50.0], [0.5, 9.0, 9.0]])
    loss = Entropy(lambda module, batch: module(batch, attention_mask=mask), ())
    values, weights = loss(Words(), words)
    p = torch.sigmoid(2 * torch.tensor([0.0, 1.0, 0.5]))
    assert torch.allclose(values, -(p * p.log() + (1 - p) * (1 - p).log()), atol=1e-6)
    assert weights.tolist() == [1, 1, 1]


def test_adamerging_plus_plus_elects_as_ties_does() -> None:
    merge = replace(ADA, elect=True, scope="model")
    deltas = deltas_of((30,), 3)
    sign = torch.where(sum(deltas) >= 0, 1.0, -1.0)
    wanted = [torch.where(d.sign() == sign, d, 0.0) for d in deltas]
    assert all(torch.equal(a, b) for a, b in zip(merge.parts(deltas), wanted, strict=True))
    trim = Trim(keep=0.4, scope="tensor")
    whole, pairs, losses = live_family(merge, edit=trim)

    def trimmed(each: list[Tensor]) -> list[Tensor]:
        kept = [trim(d.float(), quantile=lambda keep: None) for d in each]
        return [d.double() for d in merge.parts(kept)]

    wanted, _ = reference(pairs, losses, merge, trimmed)
    pre = whole.experts["a"].pre
    for name, found in whole.merged().items():
        assert torch.allclose((found - pre[name]).double(), wanted[name], atol=2e-5)


def test_weights_stay_between_0_and_1() -> None:
    up = lambda sign: lambda learn: learn(["w"], ["a"], lambda w, *_: {"w": [sign]})["w"]  # noqa: E731
    merge, one = replace(ADA, steps=50, lr=0.1), [torch.ones(2)]
    assert torch.equal(merge(one, entropy=up(-1.0)), torch.ones(2))
    assert torch.equal(merge(one, entropy=up(1.0)), torch.zeros(2))


# --- edits, then a merge ------------------------------------------------------------------------


def experts_of(count: int = 3) -> tuple[dict, list[dict]]:
    shapes = {"a.weight": (64, 32), "b.weight": (48, 40), "b.bias": (100,)}
    pre = {n: tensor(s, i) for i, (n, s) in enumerate(shapes.items())}
    posts = [
        {n: t + 0.1 * tensor(t.shape, 10 * k + i) for i, (n, t) in enumerate(pre.items())}
        for k in range(1, count + 1)
    ]
    return pre, posts


def edited(pre: dict, posts: list[dict], edit) -> dict[str, Expert]:
    return {
        name: Expert(pre, post, edit, extras=Extras(edit.needs, 0, salt=name))
        for name, post in zip(names_of(len(posts)), posts, strict=True)
    }


TIES = Ties(keep=1.0, scope="tensor", weight=1.0)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_dare_then_ties_is_pefts_dare_ties(p: float, monkeypatch) -> None:
    """With the same masks in both, as PEFT's come from the global generator."""
    theirs = optional("peft.utils.merge_utils")
    pre, posts = experts_of()
    experts = edited(pre, posts, Dare(p=p, k=0.0))
    for name, found in Family(experts, TIES).merged().items():
        masks = iter([(each.edited(name, None) != 0).float() for each in experts.values()])
        monkeypatch.setattr(theirs.torch, "bernoulli", lambda _, own=masks: next(own))
        wanted = theirs.dare_ties(
            [post[name] - pre[name] for post in posts], torch.ones(3), 1 - p, "total"
        )
        assert torch.allclose(found, pre[name] + wanted, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_where_mergekits_dare_ties_differs(p: float, monkeypatch) -> None:
    """It brings what is left to the whole tensor's L1 norm, where DARE divides by 1 - p.

    Its `rescale=false` with a lambda of 1 / (1 - p) is ours, given the same masks. Ours has the
    expected value of the delta; its own rescaling is a factor that depends on the mask, the same
    for all entries of one tensor of one expert.
    """
    sparsify = optional("mergekit.sparsify")
    method = optional("mergekit.merge_methods")
    pre, posts = experts_of()
    experts = edited(pre, posts, Dare(p=p, k=0.0))
    hats = {n: [e.edited(n, None) for e in experts.values()] for n in pre}
    masks = {}  # by shape and expert, the order in which theirs asks
    for name, each in hats.items():
        masks[tuple(pre[name].shape)] = iter([(h != 0).float() for h in each] * 2)
    monkeypatch.setattr(sparsify.torch, "bernoulli", lambda t: next(masks[tuple(t.shape)]))
    models = {"base": pre} | {f"m{i}": post for i, post in enumerate(posts)}
    found = {}
    for rescale in (True, False):
        parameters = {"weight": 1.0, "density": 1 - p, "normalize": True, "rescale": rescale}
        parameters |= {} if rescale else {"lambda": 1 / (1 - p)}
        found[rescale] = method.merge_state_dicts(
            dict(models), "dare_ties", base="base", parameters=parameters
        )
    for name, each in hats.items():
        raw = [post[name] - pre[name] for post in posts]
        own = Family(experts, TIES).merged()[name]
        assert torch.allclose(found[False][name], own, rtol=0, atol=1e-6), name
        ratios = [
            float(d.abs().sum() / d[h != 0].abs().sum()) for d, h in zip(raw, each, strict=True)
        ]
        scaled = [r * (1 - p) * hat for r, hat in zip(ratios, each, strict=True)]
        theirs = pre[name] + TIES(scaled, quantile=())
        assert torch.allclose(found[True][name], theirs, rtol=0, atol=2e-5), name
        assert any(abs(r * (1 - p) - 1) > 1e-3 for r in ratios), "and that is not 1 / (1 - p)"


def test_breadcrumbs_then_ties_is_mergekits_where_a_tensor_is_one_row() -> None:
    """Ours ranks within rows, as the authors' code does; mergekit's within the whole tensor."""
    method = optional("mergekit.merge_methods")
    pre, posts = experts_of()
    parameters = {"weight": 1.0, "density": 0.5, "gamma": 0.1, "normalize": True, "rescale": False}
    models = {"base": pre} | {f"m{i}": post for i, post in enumerate(posts)}
    theirs = method.merge_state_dicts(
        models, "breadcrumbs_ties", base="base", parameters=parameters
    )
    found = dict(Family(edited(pre, posts, Breadcrumbs(beta=0.5, gamma=0.1)), TIES).merged())
    assert torch.allclose(found["b.bias"], theirs["b.bias"], rtol=0, atol=1e-6)
    assert not torch.allclose(found["a.weight"], theirs["a.weight"], rtol=0, atol=1e-3)


def test_where_mergekits_della_differs(monkeypatch) -> None:
    """The same probabilities of keeping, but its rescaling is one factor for the whole tensor.

    Divided by its own probability every entry has the delta's expected value, as the paper has it;
    brought to the tensor's L1 norm, the large entries, which are kept more often, have more.
    """
    sparsify = optional("mergekit.sparsify")
    delta, asked = tensor((64, 32), 1), []

    def bernoulli(probabilities: Tensor) -> Tensor:
        asked.append(probabilities.clone())
        return torch.ones_like(probabilities)

    monkeypatch.setattr(sparsify.torch, "bernoulli", bernoulli)
    whole = sparsify.della_magprune(delta, 0.5, 0.2, sparsify.RescaleNorm.l1)
    assert torch.allclose(whole, delta), "all kept: its factor is 1, whatever the probabilities"
    draws = 500
    kept, mean = torch.zeros_like(delta), torch.zeros_like(delta)
    for seed in range(draws):
        hat = Della(p=0.5, window=0.4)(delta, rng=Rng(seed, "w"))
        kept += hat != 0
        mean += hat / draws
    p = asked[0]
    assert ((kept / draws - p).abs() < 5 * (p * (1 - p) / draws).sqrt()).all()
    error = ((1 - p) / p / draws).sqrt() * delta.abs()
    assert ((mean - delta).abs() < 5 * error + 1e-6).all()


# --- a point ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge", "half", "kept"),
    [
        (("fisher",), "B", 0.5),
        (("channel", "merge.groups=null", "merge.budget=0.75"), None, None),
        (("adamerging", "merge.steps=2", "merge.batch=4"), "B", 0.5),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_point_of_a_family(tmp_path, merge: tuple[str, ...], half, kept) -> None:
    more = ("objective.limit=12", "evaluator=none", "riemann=off", f"results={tmp_path}")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", ["model=vit_family", f"merge={merge[0]}", *merge[1:], *more])
    choices = keys.Choices("vit_family", "keep", "classification")
    try:
        record, _ = run.run(tidy(options.plain(cfg)), choices)
    finally:
        latest.forget()
    assert record["status"] == "ok"
    assert record["loss"].get("half") == half, "what is fitted to half A is judged on half B"
    share = record["touched"]["kept"]
    assert share == pytest.approx(kept) if kept else 0.5 < share < 0.9
    changes = [own["loss"]["change"] for own in record["experts"].values()]
    assert all(abs(change) > 1e-4 for change in changes)
    if merge[0] == "channel":
        assert share == pytest.approx(0.75, abs=0.01)


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: replace(FISHER, weights={"a": -1}), "merge.weights.a=-1: must be 0 or more"),
        (lambda: replace(FISHER, weights={"a": 1}).check(["a", "b"]), "has none for expert b"),
        (lambda: replace(FISHER, normalise="norm"), "merge.normalise=norm: must be one of none, "),
        (lambda: replace(FISHER, ridge=-1.0), "merge.ridge=-1.0: must be 0 or more"),
        (lambda: replace(SVC, alpha=0.0), "merge.alpha=0.0: must be above 0, or null"),
        (lambda: replace(CHANNEL, budget=0.5), "merge.groups=2 merge.budget=0.5: set one"),
        (lambda: replace(CHANNEL, groups=None), "merge.groups=None merge.budget=None: set one"),
        (lambda: replace(CHANNEL, groups=0), "merge.groups=0: must be a whole number from 1"),
        (lambda: replace(CHANNEL, groups=None, budget=1.5), r"merge.budget=1.5: must be in \(0, "),
        (lambda: replace(CHANNEL, groups=None, budget=0.2).check("abcd"), "at least 0.25 is kept"),
        (lambda: replace(CHANNEL, granularity="head"), "merge.head=None: goes with"),
        (lambda: replace(CHANNEL, head=8), "merge.head=8: goes with merge.granularity=head"),
        (lambda: replace(CHANNEL, spread="tensor"), "merge.spread=tensor: goes with merge.budget"),
        (lambda: replace(CHANNEL, spread="row"), "merge.spread=row: must be one of model, tensor"),
        (lambda: replace(CHANNEL, similarity="dot"), "merge.similarity=dot: must be one of"),
        (lambda: TwinMerging(0.3, 2, 0.5), "merge.rank=2 merge.rate=0.5: set one"),
        (lambda: TwinMerging(0.3, 0, None), "merge.rank=0: must be"),
        (lambda: TwinMerging(float("inf"), 2, None), "merge.weight=inf: must be a number"),
        (lambda: replace(ADA, scope="layer"), "merge.scope=layer: must be one of model, tensor"),
        (lambda: replace(ADA, weight=1.5), r"merge.weight=1.5: must be in \[0, 1\]"),
        (lambda: replace(ADA, steps=-1), "merge.steps=-1: must be a whole number from 0"),
        (lambda: replace(ADA, batch=0), "merge.batch=0: must be a whole number from 1"),
        (lambda: replace(ADA, lr=0.0), "merge.lr=0.0: must be above 0"),
    ],
)  # fmt: skip
def test_mistakes_are_told(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
