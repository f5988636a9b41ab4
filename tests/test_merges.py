"""The contract that every merge keeps, closed forms and identities, and independent oracles."""

import re
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from second_device import DEVICES, back, lent, on
from torch import Tensor

from deltalab.apply.extras import NEEDS, Extras, handed
from deltalab.apply.merging import FAMILY, Expert, Family, check_merge, joined
from deltalab.calibration.providing import PROVIDED
from deltalab.edits.dare import Dare
from deltalab.edits.expo import Expo
from deltalab.merges import Merge
from deltalab.merges.average import Average
from deltalab.merges.emr import Emr
from deltalab.merges.iso import Iso
from deltalab.merges.regmean import Regmean
from deltalab.merges.slerp import Slerp
from deltalab.merges.sum import Sum
from deltalab.merges.ties import Ties
from deltalab.merges.tsv import Tsv
from deltalab.weights import select
from deltalab.weights.threshold import ModelThreshold

CONF = Path(__file__).parents[1] / "conf" / "merge"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
SHAPES = [(24, 40), (40, 24), (7,), (1,), (), (0, 3), (6, 4, 3, 3)]
EXPERTS = ("a", "b")
TA = Sum(weight=1.0, weights=None)


def built(name: str) -> Merge:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    select.check(settings.pop("select"))
    module, _, kind = settings.pop("_target_").rpartition(".")
    return getattr(import_module(module), kind)(**settings)


def tensor(shape, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def deltas_of(shape, count: int = 2, seed: int = 0) -> list[Tensor]:
    return [tensor(shape, seed + index) for index in range(count)]


def needs(merge: Merge, deltas: list[Tensor], device: str = "cpu") -> dict:
    plain = [back(delta) for delta in deltas]
    shape = tuple(plain[0].shape)
    width = plain[0][0].numel() if len(shape) > 1 and plain[0].numel() else 0
    grams = [tensor((3 * width, width), 50 + i) for i in range(len(deltas))] if width else []
    given = {
        "experts": [*"abcdefgh"[: len(deltas)]],
        "base": on(device, tensor(shape, 90)),
        "total": lambda sums: sums(deltas),
        "quantile": [
            partial(lambda d, keep, *_: ModelThreshold().of(keep, {"w": d})["w"], d) for d in plain
        ],
        "gram": [on(device, x.T @ x / len(x)) for x in grams] or [None] * len(deltas),
        "fisher": [on(device, tensor(shape, 70 + i).square()) for i in range(len(deltas))],
        "acts": [None] * len(deltas),
        "name": "blocks.0.attn.qkv.weight",
        "entropy": lambda learn: learn(["w"], [*"abcdefgh"[: len(deltas)]], falling)["w"],
    }
    return {need: given[need] for need in merge.needs}


def falling(weights, step, examples, parts) -> dict[str, list[float]]:
    """Slopes of an entropy that falls with every weight alike."""
    return {name: [-0.5] * len(shares) for name, shares in weights.items()}


def call(merge: Merge, deltas: list[Tensor], device: str = "cpu") -> list[Tensor]:
    """Return one delta for every expert, or one in a list."""
    made = merge(deltas, **handed(needs(merge, deltas, device), deltas[0].device))
    return made if merge.each else [made]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, shape: tuple[int, ...], device: str) -> None:
    merge, plain = built(name), deltas_of(shape)
    expected = call(merge, plain)
    given = [on(device, delta) for delta in plain]
    zeros = [on(device, torch.zeros(shape)) for _ in plain]
    with lent():
        found, again = call(merge, given, device), call(merge, given, device)
        nothing = call(merge, zeros, device)
    assert len(found) == (2 if merge.each else 1)
    for one, other, want, zero in zip(found, again, expected, nothing, strict=True):
        assert one.shape == torch.Size(shape)
        assert one.dtype == torch.float32
        assert one.device == given[0].device
        assert torch.equal(back(one), back(other)), "other bits for the same deltas"
        assert torch.allclose(back(one), want, atol=1e-5), "another result than on the CPU"
        assert torch.equal(back(zero), torch.zeros(shape)), "zero must stay zero"
        assert not any(back(one).data_ptr() == back(g).data_ptr() for g in given if one.numel())
    for delta, kept in zip(given, plain, strict=True):
        assert torch.equal(back(delta), kept), "the input was changed"


@pytest.mark.parametrize("name", NAMES)
def test_experts_have_no_order_and_deltas_no_scale(name: str) -> None:
    merge, deltas = built(name), deltas_of((12, 16), seed=3)
    given = needs(merge, deltas)
    turned = {k: v[::-1] if isinstance(v, list) and k != "experts" else v for k, v in given.items()}
    if "total" in turned:
        turned["total"] = lambda sums: sums(deltas[::-1])
    found, other = merge(deltas, **given), merge(deltas[::-1], **turned)
    if merge.each:
        found, other = torch.stack(found), torch.stack(other[::-1])
    assert torch.allclose(found, other, atol=1e-5)
    if "base" not in merge.needs or getattr(merge, "of", "") == "delta":
        larger = call(merge, [4 * delta for delta in deltas])
        assert torch.allclose(torch.stack(larger), 4 * torch.stack(call(merge, deltas)), rtol=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_expert_alone_comes_back(name: str, shape: tuple[int, ...]) -> None:
    merge = built(name)
    if merge.alone is None:
        pytest.skip("no settings under which it would")
    own = replace(merge, **merge.alone)
    (found,) = call(own, [tensor(shape)])
    assert torch.allclose(found, tensor(shape), atol=2e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("adamerging", "sum", "iso", "tsv")])
def test_identical_experts_come_back(name: str) -> None:
    """But of sums, which are theirs together, and TSV, of which they are the bad case."""
    merge = built(name)
    own = replace(merge, **(merge.alone or {}))
    for found in call(own, [tensor((12, 16))] * 2):
        assert torch.allclose(found, tensor((12, 16)), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_asks_for_is_in_the_table_and_provided(name: str) -> None:
    merge = built(name)
    assert set(merge.needs) <= set(NEEDS)
    check_merge(merge, PROVIDED, EXPERTS)
    assert set(merge.needs) <= {*FAMILY, *PROVIDED}


# --- closed forms -------------------------------------------------------------------------------


def test_sum_and_average() -> None:
    deltas = deltas_of((5, 6), 3)
    half = Sum(weight=1.0, weights={"a": 1, "b": 2, "c": -1})(deltas, experts=("a", "b", "c"))
    assert torch.allclose(half, deltas[0] + 2 * deltas[1] - deltas[2], atol=1e-6)
    third = Sum(weight=1 / 3, weights=None)(deltas, experts=("a", "b", "c"))
    mean = Average(weights=None)(deltas, experts=("a", "b", "c"))
    assert torch.allclose(third, mean, atol=1e-6)
    assert torch.equal(mean, torch.stack(deltas).double().mean(0).float())
    own = Average(weights={"a": 0, "b": 5, "c": 0})(deltas, experts=("a", "b", "c"))
    assert torch.equal(own, deltas[1])


def test_ties_in_numpy() -> None:
    deltas = deltas_of((40, 30), 4)
    for scope in ("tensor", "model"):
        found = call(Ties(keep=0.3, scope=scope, weight=0.7), deltas)[0]
        stack = np.stack([d.numpy() for d in deltas])
        for one in stack:
            one[np.abs(one) < np.sort(np.abs(one).ravel())[-360]] = 0
        sign = np.where(stack.sum(0) >= 0, 1, -1)
        agree = (np.sign(stack) == sign) & (stack != 0)
        wanted = 0.7 * (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)
        assert np.allclose(found.numpy(), wanted, atol=1e-6)
    everything = Ties(keep=1.0, scope="model", weight=1.0)
    assert torch.allclose(
        call(everything, [d.abs() for d in deltas])[0],
        torch.stack([d.abs() for d in deltas]).mean(0), atol=1e-6,
    )  # fmt: skip


def test_emr_in_numpy_and_its_bits() -> None:
    """The equations of fusion_bench: elected maxima, masks, and scales that keep the L1 norm."""
    tensors = [deltas_of((20, 30), 3), deltas_of((11,), 3, seed=9)]
    total = lambda sums: sum(sums(deltas) for deltas in tensors)  # noqa: E731
    found = [Emr()(deltas, total=total) for deltas in tensors]
    flat = np.stack([np.concatenate([d[t].numpy().ravel() for d in tensors]) for t in range(3)])
    flag = np.where(flat.sum(0) > 0, 1, -1)
    unified = flag * np.where(np.sign(flat) == flag, np.abs(flat), 0).max(0)
    masks = flat * flag > 0
    scales = np.abs(flat).sum(1) / np.abs(unified * masks).sum(1)
    for t in range(3):
        got = np.concatenate([each[t].numpy().ravel() for each in found])
        assert np.allclose(got, scales[t] * masks[t] * unified, atol=1e-5)
        assert np.abs(got).sum() == pytest.approx(np.abs(flat[t]).sum(), rel=1e-5)
    spread = [each[0] for each in found]
    assert len(torch.unique(torch.cat([s.flatten() for s in spread]))) > 100
    tiny = [1e-30 * d for d in deltas_of((4, 4), 2)]  # products of which float32 does not hold
    assert all(each.any() for each in call(Emr(), tiny))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_tsv_adds_up_experts_of_orthogonal_spaces(shape: tuple[int, int]) -> None:
    u, v = (torch.linalg.qr(tensor((n, n), n, torch.float64))[0] for n in shape)
    parts = [(u[:, s] * torch.tensor([3.0, 2.0, 1.0])) @ v[:, s].T
             for s in (slice(0, 3), slice(3, 6), slice(6, 9))]  # fmt: skip
    found = Tsv(weight=1.0)([p.float() for p in parts])
    assert torch.allclose(found, sum(parts).float(), atol=1e-5)


def test_iso_keeps_the_sum_of_singular_values_and_makes_them_equal() -> None:
    deltas = [*deltas_of((12, 20), 2), torch.zeros(12, 20)]
    deltas[0][6:] = 0
    deltas[1][6:] = 0  # of rank 6
    found, summed = Iso(weight=1.0)(deltas), sum(deltas)
    values = torch.linalg.svdvals(found.double())
    assert values[:6].max() - values[:6].min() < 1e-6
    assert values[6:].max() < 1e-6
    assert values.sum() == pytest.approx(
        float(torch.linalg.svdvals(summed.double()).sum()), rel=1e-5
    )


def test_regmean_is_the_least_squares_answer() -> None:
    deltas, inputs = deltas_of((6, 9), 3), [tensor((30, 9), 20 + t) for t in range(3)]
    grams = [x.T @ x / 30 for x in inputs]
    plain = {"normalise": "none", "off_diagonal": 1.0, "ridge": 0.0, "towards": "mean"}
    found = Regmean(gram="inputs", **plain)(deltas, gram=grams)
    stack = np.concatenate([x.numpy() for x in inputs]).astype(np.float64)
    outputs = np.concatenate([(x @ d.T).numpy() for x, d in zip(inputs, deltas, strict=True)])
    wanted = np.linalg.lstsq(stack, outputs.astype(np.float64), rcond=None)[0].T
    assert np.allclose(found.numpy(), wanted, atol=1e-5)

    def error(m: Tensor) -> float:
        both = zip(deltas, inputs, strict=True)
        return sum(float(((m - d) @ x.T).square().sum()) for d, x in both)

    assert error(found) < min(map(error, (*deltas, torch.stack(deltas).mean(0))))
    equal = Regmean(gram="inputs", **plain)(deltas, gram=[grams[0]] * 3)
    assert torch.allclose(equal, torch.stack(deltas).mean(0), atol=1e-5)
    alone = Regmean(gram="inputs", **{**plain, "off_diagonal": 0.0})(deltas, gram=grams)
    weight = torch.stack([g.diagonal() for g in grams])[:, None]
    assert torch.allclose(alone, (torch.stack(deltas) * weight).sum(0) / weight.sum(0), atol=1e-5)
    far = Regmean(gram="inputs", **{**plain, "ridge": 1e9, "towards": "sum"})(deltas, gram=grams)
    assert torch.allclose(far, sum(deltas), atol=1e-4)


def test_regmean_of_deltas_is_the_optimum_of_wudi() -> None:
    deltas = [tensor((14, 8), t, torch.float64) for t in range(3)]
    merge = Regmean("delta", normalise="trace", off_diagonal=1.0, ridge=0.0, towards="mean")
    found = merge([d.float() for d in deltas]).double()
    x = torch.zeros(14, 8, dtype=torch.float64, requires_grad=True)
    loss = lambda m: sum(((m - d) @ d.T).square().sum() / d.square().sum() for d in deltas)  # noqa: E731
    best = torch.optim.LBFGS([x], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        best.zero_grad()
        value = loss(x)
        value.backward()
        return value

    best.step(closure)
    assert torch.allclose(found, x.detach(), atol=1e-5)
    assert loss(found) <= loss(x.detach()) * (1 + 1e-6)


def test_regmean_of_few_inputs_leaves_what_nobody_saw_to_the_mean() -> None:
    deltas, inputs = deltas_of((6, 9), 2), [tensor((2, 9), 20 + t) for t in range(2)]
    grams = [x.T @ x / 2 for x in inputs]
    merge = Regmean("inputs", normalise="none", off_diagonal=1.0, ridge=0.0, towards="mean")
    found, mean = merge(deltas, gram=grams), torch.stack(deltas).mean(0)
    unseen = torch.linalg.svd(torch.cat(inputs))[2][4:]
    assert torch.allclose(found @ unseen.T, mean @ unseen.T, atol=1e-4)
    assert not torch.allclose(found, mean, atol=1e-2)


# --- oracles ------------------------------------------------------------------------------------


def optional(module: str):
    return pytest.importorskip(module, reason=f"{module} comes with the optional group `oracles`")


def family_of(dtype=torch.float32, count: int = 3) -> tuple[dict, list[dict]]:
    shapes = {"a.weight": (64, 32), "b.weight": (48, 40), "b.bias": (100,)}
    pre = {n: tensor(s, i).to(dtype) for i, (n, s) in enumerate(shapes.items())}
    posts = [
        {n: (t.float() + 0.1 * tensor(t.shape, 10 * k + i)).to(dtype)
         for i, (n, t) in enumerate(pre.items())}
        for k in range(1, count + 1)
    ]  # fmt: skip
    return pre, posts


def merged(pre: dict, posts: list[dict], merge: Merge, edit=None, seed: int = 0) -> dict:
    experts = {}
    for name, post in zip("abc", posts, strict=False):
        more = {"edit": edit, "extras": Extras(edit.needs, seed, salt=name)} if edit else {}
        experts[name] = Expert(pre, post, **more)
    return dict(Family(experts, merge).merged())


@pytest.fixture(scope="module")
def mergekit():
    methods = optional("mergekit.merge_methods")

    def run(pre: dict, posts: list[dict], method: str, **parameters) -> dict:
        models = {"base": dict(pre)} | {f"m{i}": dict(post) for i, post in enumerate(posts)}
        return methods.merge_state_dicts(models, method, base="base", parameters=parameters)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("merge", "method", "parameters"),
    [
        (Sum(0.4, None), "task_arithmetic", {"weight": 0.4, "normalize": False}),
        (Average(None), "task_arithmetic", {"weight": 1.0, "normalize": True}),
        (Ties(0.3, "tensor", 1.0), "ties", {"weight": 1.0, "density": 0.3, "normalize": True}),
        (Ties(1.0, "tensor", 1.0), "ties", {"weight": 1.0, "density": 1.0, "normalize": True}),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_mergekits(mergekit, merge, method, parameters, dtype) -> None:
    pre, posts = family_of(dtype)
    if isinstance(merge, Ties) and dtype != torch.float32:
        pytest.skip("it ranks deltas rounded to 16 bits, ours are exact")
    theirs, own = mergekit(pre, posts, method, **parameters), merged(pre, posts, merge)
    for name, found in own.items():
        assert found.dtype == dtype
        close = (
            {"atol": 1e-6, "rtol": 0} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
        )
        assert torch.allclose(found.float(), theirs[name].float(), **close), name


def test_slerp_is_mergekits() -> None:
    theirs = optional("mergekit.merge_methods.slerp").slerp
    pre, posts = family_of(count=2)
    far = [{n: tensor(t.shape, 77 + k) for n, t in pre.items()} for k in range(2)]
    for sides in (posts, far):  # along the straight line, and along the arc
        for t in (0.0, 0.3, 1.0):
            own = merged(pre, sides, Slerp(t=t, of="weights"))
            for name, found in own.items():
                a, b = (side[name] for side in sides)
                wanted = theirs(torch.tensor([t]), a[None], b[None])[0]
                assert torch.allclose(found, wanted, atol=2e-6), (name, t)
    ends = [merged(pre, far, Slerp(t=t, of="weights")) for t in (0.0, 1.0)]
    for end, side in zip(ends, far, strict=True):
        assert all(torch.allclose(end[n], side[n], atol=1e-6) for n in pre)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_it_is_pefts(density: float) -> None:
    theirs = optional("peft.utils.merge_utils")
    deltas, ones = deltas_of((40, 30), 3), torch.ones(3)
    wanted = theirs.task_arithmetic(deltas, 0.4 * ones)
    assert torch.allclose(call(Sum(0.4, None), deltas)[0], wanted, atol=1e-6)
    wanted = theirs.ties(deltas, ones, density, "total")
    found = call(Ties(density, "tensor", 1.0), deltas)[0]
    assert torch.allclose(found, wanted, atol=1e-6)


# --- a family -----------------------------------------------------------------------------------


def test_what_is_an_experts_or_the_bases_has_its_bits() -> None:
    pre, posts = family_of(torch.bfloat16)
    alone = merged(pre, posts[:1], TA)
    assert all(torch.equal(alone[n], posts[0][n]) for n in pre)
    base = merged(pre, posts, Sum(0.0, None))
    assert all(torch.equal(base[n], pre[n]) for n in pre)
    for t in (0, 1):
        own = merged(pre, posts[:2], Sum(1.0, {"a": 1 - t, "b": t}))
        assert all(torch.equal(own[n], posts[t][n]) for n in pre)
    assert joined(pre["b.bias"], [posts[0]["b.bias"]], [torch.ones(100)], torch.zeros(100)).equal(
        pre["b.bias"]
    )


def test_every_expert_is_edited_with_numbers_of_its_own() -> None:
    pre, posts = family_of()
    same = [posts[0]] * 3
    edit = Dare(p=0.5, k=0.0)
    found = merged(pre, same, Average(None), edit)
    values = {n: ((found[n] - pre[n]) / (posts[0][n] - pre[n])).flatten() for n in pre}
    kinds = torch.cat([*values.values()]).mul(3).round().unique(return_counts=True)
    assert kinds[0].tolist() == [0, 2, 4, 6], "three masks that have nothing to do with each other"
    shares = kinds[1] / kinds[1].sum()
    assert torch.allclose(shares, torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8, atol=0.03)
    one = merged(pre, [posts[0]], TA, edit)
    again = merged(pre, [posts[0]], TA, edit)
    assert all(torch.equal(one[n], again[n]) for n in pre)


def test_the_edit_comes_first_and_touches_what_it_selects() -> None:
    pre, posts = family_of(count=2)
    experts = {
        n: Expert(pre, p, Expo(alpha=1.0), "matrices") for n, p in zip("ab", posts, strict=True)
    }
    found = dict(Family(experts, TA).merged())
    for name in pre:
        factor = 2.0 if pre[name].ndim > 1 else 1.0
        wanted = pre[name] + factor * sum(p[name] - pre[name] for p in posts)
        assert torch.allclose(found[name], wanted, atol=1e-5)
    some = Family(experts, TA, select="matrices")
    assert list(some.merged()) == ["a.weight", "b.weight"]


def test_thresholds_and_totals_are_of_the_whole_model_once_edited() -> None:
    pre, posts = family_of(count=2)
    posts[0]["b.bias"] = pre["b.bias"] + 100.0
    found = merged(pre, posts, Ties(keep=0.01, scope="model", weight=1.0), Expo(alpha=-0.5))
    assert torch.allclose(found["b.bias"][:30], pre["b.bias"][:30] + 50, rtol=1e-4)
    experts = {n: Expert(pre, p) for n, p in zip("ab", posts, strict=True)}
    family = Family(experts, Emr())
    for index, name in enumerate("ab"):
        own = dict(family.merged(name))
        norm = sum(float((own[n] - pre[n]).abs().sum()) for n in pre)
        wanted = sum(float((posts[index][n] - pre[n]).abs().sum()) for n in pre)
        assert norm == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Sum(float("nan"), None), "merge.weight=nan: must be a number"),
        (lambda: Sum(1.0, {"a": 1}).check(EXPERTS), "merge.weights: has none for expert b"),
        (lambda: Sum(1.0, {"a": 1, "b": 1, "c": 2}).check(EXPERTS), "c is no expert, which are a"),
        (lambda: Sum(1.0, {"a": 1, "b": "x"}).check(EXPERTS), "merge.weights.b=x: must be"),
        (lambda: Average({"a": -1.0}), "merge.weights.a=-1.0: must be 0 or more"),
        (lambda: Average({"a": 0, "b": 0}), "one must be above 0"),
        (lambda: Ties(2, "model", 1.0), r"merge.keep=2: must be in \[0, 1\]"),
        (lambda: Ties(0.5, "row", 1.0), "merge.scope=row: must be one of model, tensor"),
        (lambda: Slerp(0.5, "weights").check(("a",)), "is of two experts, model.experts has 1"),
        (lambda: Regmean("hidden", "none", 1.0, 0.0, "mean"), "merge.gram=hidden: must be one of"),
        (lambda: check_merge(Regmean("inputs", "none", 1.0, 0.0, "mean"), (), EXPERTS), "'gram'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_every_merge_says_what_it_is_and_names_the_tensors() -> None:
    for name in NAMES:
        text = (CONF / f"{name}.yaml").read_text()
        assert text.startswith("# "), name
        assert re.search(r"^select: all ", text, re.MULTILINE), name
