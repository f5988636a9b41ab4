"""The contract that every edit keeps, and the closed forms and identities of each."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor

from deltalab import apply, select
from deltalab.edits import needs_of
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.discard import Discard
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.expo import Expo
from deltalab.edits.keep import Keep
from deltalab.edits.ties import Ties
from deltalab.edits.twin import Twin
from deltalab.factor import svd
from deltalab.rng import Rng
from deltalab.threshold import ModelThreshold

CONF = Path(__file__).parents[1] / "conf"
NAMES = sorted(path.stem for path in (CONF / "edit").glob("*.yaml"))
SHAPES = [(24, 40), (40, 24), (7,), (1,), (), (0, 3), (6, 4, 3, 3), (2, 5, 4)]


def built(name: str):
    settings = yaml.safe_load((CONF / "edit" / f"{name}.yaml").read_text())
    select.check(settings.pop("select"))
    return instantiate(settings, _convert_="all")


def tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def needs(edit, delta: Tensor, name: str = "layer.weight", seed: int = 0) -> dict:
    given = {
        "rng": Rng(seed, name),
        "grad": tensor(tuple(delta.shape), seed=99).to(delta.device),
        "acts": torch.ones(delta[0].numel()) if delta.ndim > 1 and len(delta) else None,
        "peers": [],
        "svd": lambda: svd(delta.flatten(1)),
        "quantile": lambda keep: ModelThreshold().of(keep, {name: delta})[name],
    }
    return {need: given[need] for need in needs_of(edit)}


def call(edit, delta: Tensor, **where) -> Tensor:
    return edit(delta, **needs(edit, delta, **where))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, shape: tuple[int, ...]) -> None:
    edit, delta = built(name), tensor(shape)
    before = delta.clone()
    hat = call(edit, delta)
    assert hat.shape == delta.shape
    assert hat.dtype == torch.float32
    assert hat.device == delta.device
    assert torch.equal(delta, before), "the input was changed"
    assert hat.numel() == 0 or hat.data_ptr() != delta.data_ptr(), "the input was returned"
    assert torch.isfinite(hat).all()
    call(edit, tensor(shape, seed=5), name="another")
    assert torch.equal(call(edit, delta), hat), "not the same bits for the same seed"
    assert torch.equal(call(edit, torch.zeros(shape)), torch.zeros(shape)), "zero must stay zero"


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str) -> None:
    edit, delta = built(name), tensor((24, 40))
    strided = delta.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(call(edit, strided), call(edit, delta))


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_the_yaml_keys(name: str) -> None:
    settings = yaml.safe_load((CONF / "edit" / f"{name}.yaml").read_text())
    assert set(settings) - {"_target_", "select"} == {f.name for f in fields(built(name))}
    assert settings["select"] in select.PRESETS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_edited_tensor_keeps_dtype_and_inputs(name: str, dtype: torch.dtype) -> None:
    edit = built(name)
    pre = tensor((16, 24)).to(dtype)
    post = (pre.float() + 0.1 * tensor((16, 24), seed=1)).to(dtype)
    copies = pre.clone(), post.clone()
    given = needs(edit, post.float() - pre.float())
    out = apply.edited_tensor(pre, post, edit, **given)
    assert out.dtype == dtype
    assert out.shape == post.shape
    assert torch.equal(pre, copies[0])
    assert torch.equal(post, copies[1])
    assert out.data_ptr() not in (pre.data_ptr(), post.data_ptr())
    expected = (pre.float() + edit(post.float() - pre.float(), **given)).to(dtype)
    assert torch.allclose(
        out.float(), expected.float(), atol=0.02 if dtype != torch.float32 else 1e-6
    )


IDENTITIES = [
    (Dare(p=0.0, k=0.0), Keep()),
    (Dare(p=0.7, k=1.0), Keep()),
    (Expo(alpha=0.0), Keep()),
    (Ties(keep=1.0, scope="model"), Keep()),
    (Ties(keep=1.0, scope="tensor"), Keep()),
    (Twin(rank=99, rate=None), Keep()),
    (Twin(rank=None, rate=0.0), Keep()),
    (DropOnly(p=0.0), Keep()),
    (DropOnly(p=1.0), Discard()),
    (Expo(alpha=-1.0), Discard()),
    (Ties(keep=0.0, scope="model"), Discard()),
    (Ties(keep=0.0, scope="tensor"), Discard()),
    (Twin(rank=None, rate=1.0), Discard()),
    (
        BitDelta(multiple=1.0, magnitudes="normal", cv=0.0, axis="tensor"),
        BitDelta(multiple=1.0, magnitudes="mean", cv=0.5, axis="tensor"),
    ),
    (
        BitDelta(multiple=1.0, magnitudes="uniform", cv=0.0, axis="tensor"),
        BitDelta(multiple=1.0, magnitudes="mean", cv=0.5, axis="tensor"),
    ),
]


@pytest.mark.parametrize(("left", "right"), IDENTITIES, ids=str)
def test_identities_are_bitwise(left, right) -> None:
    delta = tensor((24, 40))
    assert torch.equal(call(left, delta), call(right, delta))


@pytest.mark.parametrize(("edit", "source"), [(Keep(), "post"), (Discard(), "pre")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reference_lines_are_bitwise(edit, source: str, dtype: torch.dtype) -> None:
    pre, post = tensor((50, 50)).to(dtype), (3 * tensor((50, 50), seed=1)).to(dtype)
    pre[0, :4] = torch.tensor([-0.0, 0.0, torch.inf, torch.nan])
    post[0, :4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    out = apply.edited_tensor(pre, post, edit)
    word = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(out.view(word), {"pre": pre, "post": post}[source].view(word))


@pytest.mark.parametrize(
    "edit", [Dare(p=0.0, k=0.0), Dare(p=0.3, k=1.0), Expo(alpha=0.0), DropOnly(p=0.0)], ids=str
)
def test_identity_edits_give_back_post_bitwise(edit) -> None:
    """Although pre + (post - pre) is not post in floating point."""
    pre, post = 1e3 * tensor((50, 50)), 1e-3 * tensor((50, 50), seed=1)
    assert not torch.equal(pre + (post - pre), post)
    assert torch.equal(apply.edited_tensor(pre, post, edit, **needs(edit, post)), post)


def test_expo_minus_one_gives_pre_bitwise() -> None:
    pre, post = 1e-3 * tensor((50, 50)), 1e3 * tensor((50, 50), seed=1)
    assert torch.equal(apply.edited_tensor(pre, post, Expo(alpha=-1.0)), pre)


def test_dare_has_two_multipliers_of_mean_one() -> None:
    edit, delta = Dare(p=0.3, k=-0.5), torch.ones(1_000_000)
    hat = call(edit, delta)
    low, high = hat.unique().tolist()
    assert (low, high) == pytest.approx((-0.5, 1.15 / 0.7), rel=1e-6)
    dropped = (hat == low).double().mean().item()
    assert dropped == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 1e6) ** 0.5)


def test_dare_energy_is_the_closed_form() -> None:
    """||E||^2 / ||D||^2 = (1 - k)^2 p / (1 - p), here within 1 %."""
    delta = tensor((1000, 1000))
    for p, k in [(0.5, 0.0), (0.9, 0.0), (0.5, -1.0), (0.3, 0.5)]:
        shift = call(Dare(p=p, k=k), delta) - delta
        ratio = (shift.square().sum() / delta.square().sum()).item()
        assert ratio == pytest.approx((1 - k) ** 2 * p / (1 - p), rel=0.01)


def test_drop_only_is_dare_times_one_minus_p() -> None:
    delta = tensor((100, 100))
    dare, drop = call(Dare(p=0.4, k=0.0), delta), call(DropOnly(p=0.4), delta)
    assert torch.equal(dare == 0, drop == 0)
    assert torch.allclose(drop, 0.6 * dare, rtol=1e-6)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.29, 0.5, 0.9, 1.0])
def test_ties_keeps_the_exact_count_and_the_largest(scope: str, keep: float) -> None:
    delta = tensor((10, 10)).bfloat16().float().round(decimals=1)  # many ties, some zeros
    delta[delta == 0] = 0.05
    hat = call(Ties(keep=keep, scope=scope), delta)
    kept = hat != 0
    assert kept.sum() == round(keep * 100)
    assert torch.equal(hat[kept], delta[kept])
    if 0 < keep < 1:
        assert delta[kept].abs().min() >= delta[~kept].abs().max()
        tied = (delta.abs() == delta[kept].abs().min()).flatten()
        order = kept.flatten()[tied].int()
        assert torch.equal(order, order.sort(descending=True).values), "ties: first index first"


def test_ties_gaussian_energy() -> None:
    """The kept energy at density .2 of Gaussian entries is .2 + 2 t phi(t) = .650."""
    delta = tensor((1000, 1000))
    hat = call(Ties(keep=0.2, scope="tensor"), delta)
    assert (hat.square().sum() / delta.square().sum()).item() == pytest.approx(0.650, abs=0.003)


def test_model_threshold_ranks_over_all_tensors() -> None:
    deltas = {"a": tensor((300,)), "b": 10 * tensor((20, 10), seed=1), "c": torch.zeros(50)}
    deltas["a"][:100] = deltas["a"][0]
    flat = torch.cat([d.flatten() for d in deltas.values()])
    for keep in (0.0, 0.1, 0.4, 0.6, 0.8, 0.95, 1.0):
        shares = ModelThreshold().of(keep, deltas)
        masks = [shares[n].survivors(d).flatten() for n, d in deltas.items()]
        order = flat.abs().argsort(descending=True, stable=True)[: round(keep * 550)]
        expected = torch.zeros(550, dtype=torch.bool)
        expected[order] = True
        assert torch.equal(torch.cat(masks), expected)


def test_bitdelta_is_the_best_scalar_and_has_the_closed_form_error() -> None:
    delta = tensor((60, 80))
    edit = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
    hat = call(edit, delta)
    l1, l2 = delta.abs().sum().item(), delta.square().sum().item()
    error = (hat - delta).square().sum().item()
    assert error == pytest.approx(l2 - l1**2 / delta.numel(), rel=1e-5)
    assert len(hat.unique()) == 2
    assert torch.allclose(call(edit, hat), hat, rtol=1e-6)
    assert hat.abs().sum().item() == pytest.approx(l1, rel=1e-5)
    for multiple in (0.9, 1.1):
        other = BitDelta(multiple=multiple, magnitudes="mean", cv=0.0, axis="tensor")
        assert (call(other, delta) - delta).square().sum() > error


def test_bitdelta_counts_zero_as_positive() -> None:
    delta = torch.tensor([[0.0, -0.0], [1.0, -3.0]])
    edit = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
    assert call(edit, delta).tolist() == [[1.0, 1.0], [1.0, -1.0]]


@pytest.mark.parametrize("magnitudes", ["normal", "uniform"])
def test_bitdelta_sampled_magnitudes(magnitudes: str) -> None:
    """Mean c mu within 4 sigma; expected relative error 1 - (2/pi)(2c - c^2 (1 + cv^2))."""
    delta, c, cv = tensor((1000, 1000)), 0.8, 3**-0.5
    hat = call(BitDelta(multiple=c, magnitudes=magnitudes, cv=cv, axis="tensor"), delta)
    scale = c * delta.abs().mean().item()
    drawn = (hat * delta.sign()).double()
    assert drawn.mean().item() == pytest.approx(scale, abs=4 * cv * scale / 1e3)
    assert drawn.std().item() == pytest.approx(cv * scale, rel=0.01)
    error = ((hat - delta).square().sum() / delta.square().sum()).item()
    assert error == pytest.approx(1 - 2 / torch.pi * (2 * c - c**2 * (1 + cv**2)), abs=0.005)


def test_bitdelta_axes() -> None:
    delta = torch.tensor([[1.0, -3.0], [4.0, 4.0]])
    row = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="row")
    column = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="column")
    assert call(row, delta).tolist() == [[2.0, -2.0], [4.0, 4.0]]
    assert call(column, delta).tolist() == [[2.5, -3.5], [2.5, 3.5]]
    wide = tensor((30, 50)) * torch.arange(1, 31)[:, None]
    tensor_wide = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
    assert (call(row, wide) - wide).norm() < (call(tensor_wide, wide) - wide).norm()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 3, 4, 4)], ids=str)
def test_twin_error_is_the_tail_of_the_spectrum(shape: tuple[int, ...]) -> None:
    delta = tensor(shape)
    s = torch.linalg.svdvals(delta.flatten(1).double())
    for rank in (1, 3, 7):
        error = (call(Twin(rank=rank, rate=None), delta).double() - delta).square().sum()
        assert error.item() == pytest.approx(s[rank:].square().sum().item(), rel=1e-5)


def test_twin_is_exact_on_a_delta_of_low_rank_and_idempotent() -> None:
    delta = tensor((40, 3)) @ tensor((3, 30), seed=1)
    assert torch.allclose(call(Twin(rank=3, rate=None), delta), delta, atol=1e-5)
    once = call(Twin(rank=2, rate=None), delta)
    assert torch.allclose(call(Twin(rank=2, rate=None), once), once, atol=1e-5)


@pytest.mark.parametrize(("rate", "rank"), [(0.9, 10), (0.5, 50), (0.999, 1), (0.7, 30)])
def test_twin_rate_keeps_the_floor(rate: float, rank: int) -> None:
    delta = tensor((100, 120))
    by_rate, by_rank = Twin(rank=None, rate=rate), Twin(rank=rank, rate=None)
    assert torch.equal(call(by_rate, delta), call(by_rank, delta))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dare(p=1.5, k=0), "edit.p=1.5: must be in [0, 1)"),
        (lambda: Dare(p=1, k=0), "edit.p=1: must be in [0, 1)"),
        (lambda: Dare(p=float("nan"), k=0), "edit.p=nan: must be in [0, 1)"),
        (lambda: Dare(p=0.5, k="x"), "edit.k=x: must be in (-inf, inf)"),
        (lambda: DropOnly(p=-0.1), "edit.p=-0.1: must be in [0, 1]"),
        (lambda: Expo(alpha=float("inf")), "edit.alpha=inf: must be in (-inf, inf)"),
        (lambda: Ties(keep=2, scope="model"), "edit.keep=2: must be in [0, 1]"),
        (lambda: Ties(keep=0.2, scope="row"), "edit.scope=row: must be one of model, tensor"),
        (lambda: Twin(rank=0, rate=None), "edit.rank=0: must be an integer of at least 1"),
        (lambda: Twin(rank=1.5, rate=None), "edit.rank=1.5: must be an integer of at least 1"),
        (lambda: Twin(rank=None, rate=1.1), "edit.rate=1.1: must be in [0, 1]"),
        (lambda: Twin(rank=3, rate=0.5), "edit.rank=3 edit.rate=0.5: set one"),
        (lambda: Twin(rank=None, rate=None), "edit.rank=None edit.rate=None: set one"),
    ],
)
def test_mistakes_name_the_field_and_the_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
