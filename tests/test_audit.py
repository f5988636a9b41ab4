"""The audit counts what an edit did in the pass that edits, and finds what counting apart finds."""

import math
from collections import Counter
from contextlib import nullcontext
from functools import partial, wraps

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from second_device import DEVICES, lent, on
from torch import Tensor, nn

from deltalab import run, testing
from deltalab.apply import editing
from deltalab.apply.audit import Audit, summed
from deltalab.apply.extras import Extras, Memo
from deltalab.edits.dare import Dare
from deltalab.edits.expo import Expo
from deltalab.kernels import native
from deltalab.keys import Choices
from deltalab.linear.delta import difference
from deltalab.rng import Rng
from deltalab.run.building import prepare
from deltalab.settings import conf_dir
from deltalab.store import latest
from deltalab.weights.mapping import ModelPair, delta

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
FLOATS = 5e-7
"""How far apart sums may be that add floats before doubles."""
NAMES = sorted(path.stem for path in (conf_dir() / "edit").glob("*.yaml"))
SHAPES = {"a": (40, 24), "b": (48,), "c": (), "d": (0, 3), "e": (6, 4, 3, 3), "f": (40, 24)}
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (BF16, F16), (F64, F32)]
COMPILED = [(F32, F32), (F32, BF16)]
CASES = [*(("eager", each) for each in DTYPES), *(("compiled", each) for each in COMPILED)]


def weights(dtypes: tuple[torch.dtype, torch.dtype], shapes=SHAPES) -> tuple[dict, dict]:
    """Tensors of all dimensions, with equal, zero and infinite entries, and one of integers."""
    pre, post = {"steps": torch.tensor(3)}, {"steps": torch.tensor(4)}
    for seed, (name, shape) in enumerate(shapes.items()):
        pre[name] = testing.tensor(shape, seed).to(dtypes[0])
        post[name] = (pre[name].double() + 0.1 * testing.tensor(shape, seed + 50)).to(dtypes[1])
        if len(shape) > 1 and shape[0]:
            post[name][1] = pre[name][1].to(dtypes[1])
            pre[name][2, :2], post[name][2, :2] = 0.0, -0.0
    return pre, post


def provided(edit, deltas, device: str = "cpu") -> Extras:
    """Stand-ins for what an edit asks for beside its pair, on one of `DEVICES`."""

    def stand_in(need: str, name: str, deltas) -> object:
        found = testing.needs(edit, deltas[name].cpu(), name)[need]
        return on(device, found) if isinstance(found, Tensor) and found.ndim else found

    others = {n: partial(stand_in, n) for n in ("grad", "acts", "scale", "gram", "fisher", "peers")}
    return Extras(edit.needs, 3, others, memo=Memo())


def counted_apart(pre, post, edit, extras: Extras, edited) -> dict[str, float]:
    """What the audit was before: every edit a second time, the tensor as a whole."""
    deltas = delta(pre, post)
    squared = lambda t: float(t.double().square().sum())  # noqa: E731
    zeros = entries = 0
    shift2 = delta2 = ideal2 = lost2 = 0.0
    for name in edited:
        before = deltas[name]
        ideal = edit(before, **extras.for_tensor(name, deltas)) - before
        shift = difference(post[name], edited[name])
        zeros += int((edited[name] == pre[name]).sum())
        entries += shift.numel()
        shift2 += squared(shift)
        delta2 += squared(before)
        ideal2 += squared(ideal)
        lost2 += squared(shift - ideal)
    return {
        "tensors": len(edited),
        "parameters": entries,
        "of_parameters": 12,
        "relative_shift": math.sqrt(shift2 / delta2) if delta2 else 0.0,
        "sparsity": zeros / entries if entries else 0.0,
        "lost_in_storage": math.sqrt(lost2 / ideal2) if ideal2 else 0.0,
    }


def said(audit: Audit) -> dict[str, float]:
    """Without what the codes take, which is told apart."""
    told = audit.said(ModelPair({}, {}, nn.Linear(3, 3)))
    return {k: v for k, v in told.items() if k not in ("bytes", "bits_per_weight")}


@pytest.mark.parametrize(
    ("name", "kernel", "dtypes"),
    [
        *((name, *case) for case in CASES for name in NAMES),
        *((name, "compiled", each) for each in DTYPES for name in ("dare", "discard")),
    ],
    ids=str,
)
def test_the_numbers_are_those_of_counting_apart(name: str, kernel: str, dtypes) -> None:
    edit, (pre, post) = testing.built(name), weights(dtypes)
    extras, audit = provided(edit, None), Audit()
    edited = dict(editing.edited(pre, post, edit, "all", extras, kernel, audit=audit))
    assert list(edited) == list(SHAPES)
    expected = counted_apart(pre, post, edit, provided(edit, None), edited)
    close = 1e-12 if kernel == "eager" else FLOATS
    assert said(audit) == pytest.approx(expected, rel=close, abs=0)
    assert expected["relative_shift"] > 0 or name in ("keep", "safe_lora")
    plain = editing.edited(pre, post, edit, "all", provided(edit, None), kernel)
    assert all(torch.equal(plain[n], edited[n]) for n in edited), "the audit changes the edit"


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["dare", "ties", "bitdelta", "multibit", "keep", "discard"])
def test_slices_pieces_and_threads_do_not_matter(name: str, kernel: str, monkeypatch) -> None:
    """To the last bit for threads; within rounding for how a tensor is cut."""
    edit = testing.built(name)
    pre, post = weights((BF16, BF16), {"a": (400, 300), "b": (70_000,)})
    found, before = [], torch.get_num_threads()

    def counted() -> dict[str, float]:
        audit = Audit()
        dict(editing.edited(pre, post, edit, "all", provided(edit, None), kernel, audit=audit))
        return said(audit)

    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(counted())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    monkeypatch.setattr(native, "PIECE", 1000)
    monkeypatch.setitem(editing.SLICE, "cpu", 777)
    assert counted() == pytest.approx(found[0], rel=1e-12 if kernel == "eager" else FLOATS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needed", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_on_another_device_is_counted_there(name: str, needed: str, device: str) -> None:
    """Its needs come from yet another: the audit adds no way of its own to hand them over."""
    edit, (pre, post) = testing.built(name), weights((F32, F32))
    edited = dict(editing.edited(pre, post, edit, "all", provided(edit, None), audit=Audit()))
    expected = counted_apart(pre, post, edit, provided(edit, None), edited)
    audit = Audit()
    with lent() if "second" in (device, needed) else nullcontext():
        given = provided(edit, None, needed)
        where = on(device, torch.zeros(1)).device
        dict(editing.edited(pre, post, edit, "all", given, device=where, audit=audit))
    close = 1e-5 if "cuda" in (device, needed) else 1e-12
    assert said(audit) == pytest.approx(expected, rel=close)


def test_one_that_is_edited_again_counts_once() -> None:
    pre, post = weights((F32, F32))
    audit = Audit()
    edited = editing.edited(pre, post, Expo(alpha=0.5), "all", Extras(), audit=audit)
    assert said(audit)["tensors"] == 0
    for _ in range(2):
        dict(edited)
    assert said(audit)["tensors"] == len(SHAPES)
    assert said(audit)["relative_shift"] == pytest.approx(0.5, rel=1e-6)


def test_shared_infinities_and_numbers_that_are_none() -> None:
    """The former are no shift; the latter make sums that are none, on either way."""
    pre, post = testing.tensor((30, 50)), testing.tensor((30, 50), 1)
    pre[0], post[0] = torch.inf, torch.inf
    for kernel in ("eager", "compiled"):
        _, sums, _ = editing.audited_tensor(pre, post, Expo(alpha=0.5), kernel)
        assert all(map(math.isfinite, sums))
        assert sums[0] == 50
        broken = post.clone()
        broken[5, 5] = torch.nan
        _, sums, _ = editing.audited_tensor(pre, broken, Expo(alpha=0.5), kernel)
        assert math.isnan(sums[1])


def test_sums_hold_what_float32_would_lose() -> None:
    """A large and many small numbers: float32 in turn would keep the large one alone."""
    for kernel in ("eager", "compiled"):
        post = torch.full((100_001,), 1.0)
        post[0] = 2.0**26
        _, sums, _ = editing.audited_tensor(
            torch.zeros_like(post), post, Dare(0.0, 0), kernel, rng=Rng(0, "w")
        )
        # compiled, what shares a lane of a block with the large one is lost
        assert sums == pytest.approx([0, 0, 2.0**52 + 100_000, 0, 0], abs=31, rel=0)
    assert summed([post > 1, post]) == [1.0, 2.0**52 + 100_000]


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-11, 1e15, 1e21, 1e30])
def test_squares_that_float32_does_not_hold_are_counted(scale: float) -> None:
    """Below 1e-45 and above 3e38 there are none; blocks of them are added as doubles throughout."""
    pre, delta = torch.zeros(3000), testing.tensor((3000,)) * scale
    delta[700:1500] = 0  # a whole block without any
    _, sums, _ = editing.audited_tensor(pre, delta, Expo(alpha=0.5), "compiled")
    _, exact, _ = editing.audited_tensor(pre, delta, Expo(alpha=0.5), "eager")
    assert sums[0] == exact[0] == 800
    assert sums[1:4] == pytest.approx(exact[1:4], rel=FLOATS, abs=0)
    assert exact[2] == pytest.approx(float((delta.double() ** 2).sum()), rel=1e-12, abs=0)


def test_a_point_edits_every_tensor_once(monkeypatch, tmp_path) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    call = Dare.__call__

    @wraps(call)
    def counted(self, delta, **needs):
        seen[tuple(delta.shape)] += delta.numel()
        return call(self, delta, **needs)

    monkeypatch.setattr(editing.fused, "SMALLEST", 1 << 62)
    overrides = ["model=digits_vit", "edit=dare", "evaluator=none", f"results={tmp_path}"]
    overrides += ["data.objective.limit=8", "riemann.rule=left", "riemann.points=2"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("config", overrides)
    settings = OmegaConf.to_container(cfg, resolve=True)
    point = prepare(settings, Choices("digits_vit", "dare", "classification"))
    latest.forget()
    known = run.reference(point)
    monkeypatch.setattr(Dare, "__call__", counted)
    found, _ = run.evaluate(point)
    chosen = editing.chosen(known.pair.post, point.select)
    assert sum(seen.values()) == sum(known.pair.post[n].numel() for n in chosen)
    assert found["touched"]["parameters"] == sum(seen.values())


def test_what_codes_take_is_told_for_touched_entries_and_for_the_model() -> None:
    """Half of the weights touched, at a bit each; the others as they are stored."""
    pre, post = weights((BF16, BF16), {"a": (400, 300), "b.weight": (300, 400)})
    both, edit = ModelPair(pre, post, nn.Linear(3, 3)), testing.built("bitdelta")
    found = {}
    for select in ("all", {"preset": "all", "exclude": ["a"]}):
        audit = Audit()
        chosen = editing.chosen(post, select)
        dict(editing.edited(pre, post, edit, select, provided(edit, None), audit=audit))
        told = found[len(chosen)] = audit.said(both)
        size = sum(edit.encode(delta(pre, post)[n], rng=None).bits.total for n in chosen)
        assert told["bytes"] == -(-size // 8)
        assert told["bits_per_weight"]["payload"] == 1.0
        assert 0 < told["bits_per_weight"]["metadata"] < 0.02
    assert found[2]["bits_per_weight"]["model"] == pytest.approx(1.0, abs=0.02)
    assert found[1]["bits_per_weight"]["model"] == pytest.approx(8.5, abs=0.02)
    audit, edit = Audit(), testing.built("expo")
    dict(editing.edited(pre, post, edit, "all", provided(edit, None), audit=audit))
    assert not {"bytes", "bits_per_weight"} & set(audit.said(both))
