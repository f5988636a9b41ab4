"""The contract that every edit keeps, and the closed forms and identities of each."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from second_device import DEVICES, SECOND, back, lent, on
from torch import Tensor

from deltalab import testing
from deltalab.apply import editing
from deltalab.apply.extras import Extras, check_needs, handed, thresholds
from deltalab.edits import Edit, multibit
from deltalab.edits.biased_product import BiasedProduct
from deltalab.edits.biased_sign import BiasedSign
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.breadcrumbs import Breadcrumbs
from deltalab.edits.chain import Chain
from deltalab.edits.dare import Dare
from deltalab.edits.darex import Darex, best_scale
from deltalab.edits.della import Della, relative_ranks
from deltalab.edits.discard import Discard
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.expo import Expo
from deltalab.edits.keep import Keep
from deltalab.edits.multibit import Multibit
from deltalab.edits.noise import Noise
from deltalab.edits.sign_flip import SignFlip
from deltalab.edits.ties import Ties
from deltalab.edits.twin import Twin
from deltalab.linear.factor import svd
from deltalab.loss import distill
from deltalab.rng import Rng
from deltalab.run.point import PROVIDED
from deltalab.weights import select
from deltalab.weights.threshold import ModelThreshold, ascending

ONE_BIT = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
CONF = Path(__file__).parents[1] / "conf"
NAMES = sorted(path.stem for path in (CONF / "edit").glob("*.yaml"))
SHAPES = [(24, 40), (40, 24), (7,), (1,), (), (0, 3), (6, 4, 3, 3), (2, 5, 4)]


def built(name: str):
    settings = yaml.safe_load((CONF / "edit" / f"{name}.yaml").read_text())
    select.check(settings.pop("select"))
    return instantiate(settings, _convert_="all")


def tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def needs(
    edit, delta: Tensor, name: str = "layer.weight", seed: int = 0, device: str = "cpu"
) -> dict:
    """What an edit asks for, on one of `DEVICES`, whichever the delta's is."""
    delta = back(delta)
    matrix = delta.ndim > 1 and delta.numel() > 0
    inputs = tensor((delta[0].numel(),), seed=98).abs() if matrix else None
    given = {
        "rng": Rng(seed, name),
        "grad": on(device, tensor(tuple(delta.shape), seed=99)),
        "fisher": on(device, tensor(tuple(delta.shape), seed=97).square()),
        "peers": lambda peer: on(device, tensor(tuple(delta.shape), seed=96)),
        "gram": on(device, testing.gram(delta)) if matrix else None,
        "acts": on(device, inputs) if matrix else None,
        "scale": lambda steps, lr: on(device, delta.abs().mean()) if matrix else None,
        "svd": lambda: tuple(on(device, factor) for factor in svd(delta.flatten(1))),
        "quantile": lambda keep: ModelThreshold().of(keep, {name: delta})[name],
    }
    return {need: given[need] for need in edit.needs}


def call(edit, delta: Tensor, **where) -> Tensor:
    return edit(delta, **handed(needs(edit, delta, **where), delta.device))


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_every_package_tests_too(name: str, check) -> None:
    check(name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, shape: tuple[int, ...], device: str) -> None:
    edit, expected = built(name), call(built(name), tensor(shape))
    delta, zero = on(device, tensor(shape)), on(device, torch.zeros(shape))
    with lent():
        hat = call(edit, delta)
        assert hat.shape == delta.shape
        assert hat.dtype == torch.float32
        assert hat.device == delta.device
        assert torch.equal(back(delta), tensor(shape)), "the input was changed"
        returned = back(hat).data_ptr() == back(delta).data_ptr()
        assert hat.numel() == 0 or not returned, "the input itself"
        assert torch.isfinite(back(hat)).all()
        call(edit, on(device, tensor(shape, seed=5)), name="another")
        assert torch.equal(back(call(edit, delta)), back(hat)), "other bits for the same seed"
        assert torch.equal(back(call(edit, zero)), torch.zeros(shape)), "zero must stay zero"
    compare = torch.allclose if device == "cuda" else torch.equal
    assert compare(back(hat), expected), "another result than on the CPU"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_needs_come_from_any_device(name: str, kernel: str, device: str) -> None:
    """Tensors on one device, what they need on another, as a GPU's gradient for mapped weights."""
    edit, (pre, post) = built(name), (tensor((16, 24)), tensor((16, 24), seed=1))
    expected = editing.edited_tensor(pre, post, edit, "eager", **needs(edit, post - pre))
    for other in DEVICES:
        given = needs(edit, post - pre, device=other)
        with lent():
            out = editing.edited_tensor(
                *(on(device, t) for t in (pre, post)), edit, kernel, **given
            )
        assert out.device == on(device, pre).device
        compare = torch.allclose if "cuda" in (device, other) else torch.equal
        assert compare(back(out), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_code_comes_from_any_device_to_the_cpu(name: str) -> None:
    edit, delta = built(name), tensor((24, 40))
    with lent():
        given = needs(edit, delta, device="second")
        code = edit.encode(on("second", delta), **given)
    assert code is None or torch.equal(code.decode(), call(edit, delta))


def test_the_second_device_refuses_what_a_gpu_does() -> None:
    here, there = tensor((3, 4)), on("second", tensor((3, 4)))
    assert there.device == SECOND != here.device
    assert torch.equal(back(there + there), here + here)
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        here + there
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        BiasedProduct(k=0.5, p=None)(there, grad=here)
    with lent():
        total = there + here.to(SECOND) + torch.ones(4, device=SECOND)
    assert torch.equal(back(total), 2 * here + 1)


def settings_of(name: str) -> list[dict]:
    """The settings of an edit's own grid, or its defaults."""
    path = CONF / "grid" / f"{name}.yaml"
    axes = yaml.safe_load(path.read_text()) if path.exists() else {}
    values = {k.removeprefix("edit."): yaml.safe_load(f"[{v}]") for k, v in axes.items()}
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


@pytest.mark.parametrize("name", NAMES)
def test_edits_on_one_line_shift_in_one_direction(name: str) -> None:
    default, delta = built(name), tensor((16, 24))
    if type(default).line is Edit.line:
        assert default.line() is None
        return
    families: dict[str, list[Tensor]] = {}
    for settings in settings_of(name):
        edit = replace(default, **settings)
        if (line := edit.line()) is None:
            continue
        shift = call(edit, delta) - delta
        assert line.low <= line.at <= line.high
        assert line.at or torch.equal(shift, torch.zeros_like(shift))
        families.setdefault(line.family, [])
        families[line.family] += [shift / line.at] if line.at else []
    grid = CONF / "grid" / f"{name}.yaml"
    assert not grid.exists() or max(map(len, families.values())) > 1, "a line that nothing shares"
    for first, *others in families.values():
        for other in others:
            assert torch.allclose(first, other, atol=1e-5)


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
    (Darex(p=0.3, q=1 - 0.3), Dare(p=0.3, k=0.0)),
    (Darex(p=0.0, q=1.0), Keep()),
    (Della(p=0.0, window=0.0), Keep()),
    (SignFlip(fraction=0.3, balanced=True), Dare(p=0.3, k=-1.0)),
    (SignFlip(fraction=0.0, balanced=False), Keep()),
    (SignFlip(fraction=1.0, balanced=False), Expo(alpha=-2.0)),
    (Noise(sigma=0.0), Keep()),
    (BiasedSign(k=1.0, p=0.5), Keep()),
    (BiasedProduct(k=1.0, p=0.5), Keep()),
    (Breadcrumbs(beta=1.0, gamma=0.0), Keep()),
    (Breadcrumbs(beta=0.0, gamma=0.0), Discard()),
    (Chain(steps=[{"dare": {"p": 0.3}}]), Dare(p=0.3, k=0)),
    (Chain(steps=["keep", {"drop_only": {"p": 0.0}}]), Keep()),
    (
        Chain(steps=[{"ties": {"keep": 0.3, "scope": "model"}}, {"expo": {"alpha": -1.0}}]),
        Discard(),
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
    out = editing.edited_tensor(pre, post, edit)
    word = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(out.view(word), {"pre": pre, "post": post}[source].view(word))


@pytest.mark.parametrize(
    "edit", [Dare(p=0.0, k=0.0), Dare(p=0.3, k=1.0), Expo(alpha=0.0), DropOnly(p=0.0)], ids=str
)
def test_identity_edits_give_back_post_bitwise(edit) -> None:
    """Although pre + (post - pre) is not post in floating point."""
    pre, post = 1e3 * tensor((50, 50)), 1e-3 * tensor((50, 50), seed=1)
    assert not torch.equal(pre + (post - pre), post)
    assert torch.equal(editing.edited_tensor(pre, post, edit, **needs(edit, post)), post)


def test_expo_minus_one_gives_pre_bitwise() -> None:
    pre, post = 1e-3 * tensor((50, 50)), 1e3 * tensor((50, 50), seed=1)
    assert torch.equal(editing.edited_tensor(pre, post, Expo(alpha=-1.0)), pre)


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


CLOSE = [
    (Multibit(bits=0, blocks="equal_count"), ONE_BIT, 1e-6),
    (Multibit(bits=0, blocks="equal_width"), ONE_BIT, 1e-6),
    (Multibit(bits=10, blocks="equal_count"), Keep(), 1e-6),  # more blocks than entries
    (Della(p=0.4, window=0.0), Dare(p=0.4, k=0.0), 1e-6),
    (Twin(rank=23, rate=None), Keep(), 2e-1),
]


@pytest.mark.parametrize(("left", "right", "tolerance"), CLOSE, ids=str)
def test_identities_up_to_rounding(left, right, tolerance: float) -> None:
    delta = tensor((24, 40))
    assert torch.allclose(call(left, delta), call(right, delta), atol=tolerance)


UNBIASED = [
    Dare(p=0.5, k=0.0),
    Dare(p=0.9, k=0.0),
    Dare(p=0.3, k=-1.0),
    Della(p=0.3, window=0.14),
    Della(p=0.7, window=0.5),
    SignFlip(fraction=0.2, balanced=True),
    Noise(sigma=0.5),
    Darex(p=0.6, q=0.4),
]


@pytest.mark.parametrize("shape", [(64,), (16, 12)], ids=str)
@pytest.mark.parametrize("edit", UNBIASED, ids=str)
def test_unbiased(edit, shape: tuple[int, ...]) -> None:
    """Over 2000 seeds the mean is the delta within 4 sigma, on tensors of 64 entries too.

    By entry within 5 of its own standard errors, for there are many; summed over entries within 4.
    """
    delta, runs = tensor(shape), 2000
    hats = torch.stack([call(edit, delta, seed=s) for s in range(runs)]).double()
    error = hats.mean(0) - delta
    sigma = hats.std(0) / runs**0.5
    assert (error.abs() <= 5 * sigma + 1e-6 * delta.abs()).all()
    assert (error * delta).sum().abs() <= 4 * (sigma * delta).square().sum().sqrt()


def test_drop_only_is_interpolation_on_average() -> None:
    delta = tensor((64,))
    mean = torch.stack([call(DropOnly(p=0.3), delta, seed=s) for s in range(2000)]).mean(0)
    expected = call(Expo(alpha=-0.3), delta)
    assert ((mean - expected).abs() <= 5 * delta.abs() * (0.21 / 2000) ** 0.5).all()


def test_noise_and_sign_flips_have_their_intensity() -> None:
    delta = tensor((1000, 1000))
    energy = delta.square().sum()
    shift = call(Noise(sigma=1.5), delta) - delta
    assert (shift.square().sum() / energy).item() == pytest.approx(1.5**2, rel=0.01)
    shift = call(SignFlip(fraction=0.2, balanced=False), delta) - delta
    assert (shift.square().sum() / energy).item() == pytest.approx(4 * 0.2, rel=0.01)
    assert ((shift * delta).sum() / energy).item() == pytest.approx(-2 * 0.2, rel=0.01)


@pytest.mark.parametrize("k", [0.5, 1.5])
def test_biased_controls(k: float) -> None:
    """The first-order term of the product control is (1 - k)(|S-| + p/(1-p) S+)."""
    delta, grad = tensor((50, 60)), tensor((50, 60), seed=99)
    by_sign = call(BiasedSign(k=k, p=None), delta)
    p = (delta < 0).double().mean().item()
    assert torch.equal(by_sign[delta < 0], k * delta[delta < 0])
    expected = (1 - k * p) / (1 - p) * delta[delta > 0]
    assert torch.allclose(by_sign[delta > 0], expected)
    assert (by_sign / delta).double().mean().item() == pytest.approx(1, abs=1e-6)
    s = (delta * grad).double()
    p = (s < 0).double().mean().item()
    term = ((call(BiasedProduct(k=k, p=None), delta) - delta) * grad).double().sum().item()
    expected = (1 - k) * (-s[s < 0].sum() + p / (1 - p) * s[s > 0].sum()).item()
    assert term == pytest.approx(expected, rel=1e-5)
    up, down = (
        ((call(BiasedProduct(k=c, p=0.5), delta) - delta) * grad).sum().item() for c in (k, 2 - k)
    )
    assert up == pytest.approx(-down, rel=1e-4)


def test_biased_controls_where_all_signs_agree() -> None:
    negative = -tensor((4, 5)).abs()
    assert torch.equal(call(BiasedSign(k=0.5, p=None), negative), 0.5 * negative)
    assert torch.equal(call(BiasedSign(k=0.5, p=None), -negative), -negative)


def test_della_keeps_large_entries_more_often() -> None:
    delta = torch.arange(1.0, 65.0).repeat(8, 1) * tensor((8, 64)).sign()
    kept = torch.stack([call(Della(p=0.5, window=0.6), delta, seed=s) != 0 for s in range(1000)])
    rate = kept.double().mean((0, 1))
    wanted = 0.2 + 0.6 * torch.arange(64) / 63
    assert (rate - wanted).abs().max() < 5 * 0.5 / (1000 * 8) ** 0.5
    ranks = relative_ranks(torch.tensor([[2.0, -2.0, 1.0], [0.0, 0.0, 0.0]]))
    assert ranks.tolist() == [[0.5, 1.0, 0.0], [0.0, 0.5, 1.0]]


def test_della_varies_less_than_dare_on_heavy_tails() -> None:
    delta = tensor((64, 64)) ** 3
    error = {
        edit: sum((call(edit, delta, seed=s) - delta).square().sum().item() for s in range(50))
        for edit in (Della(p=0.5, window=0.8), Dare(p=0.5, k=0.0))
    }
    assert error[Della(p=0.5, window=0.8)] < 0.8 * error[Dare(p=0.5, k=0.0)]


def test_darex_closed_form_minimises_the_output_error() -> None:
    """Against a scan over q of the closed mean squared error, summed over rows."""
    delta, x, p = tensor((6, 40)) + 0.3, torch.rand(40), 0.9
    c = delta.double() * x.double()
    s2, q2 = c.sum(1).square().sum().item(), c.square().sum().item()

    def error(scale: float) -> float:
        return (1 - (1 - p) * scale) ** 2 * s2 + p * (1 - p) * scale**2 * q2

    best = best_scale(delta, x, p).item()
    scan = min((error(s / 1000), s / 1000) for s in range(1, 12_000))
    assert best == pytest.approx(scan[1], abs=1e-3)
    assert 0 < best <= 1 / (1 - p)
    edit, given = Darex(p=p, q="closed_form"), {"acts": x}
    hats = [edit(delta, rng=Rng(s, "w"), **given).double() @ x.double() for s in range(2000)]
    found = torch.stack([(h - c.sum(1)).square().sum() for h in hats])
    assert found.mean().item() == pytest.approx(error(best), abs=5 * found.std().item() / 2000**0.5)
    without = edit(delta, rng=Rng(0, "w"), acts=None)
    assert torch.equal(without, call(Dare(p=p, k=0.0), delta, name="w"))


def test_breadcrumbs_counts_and_order() -> None:
    delta = tensor((5, 40))
    hat = call(Breadcrumbs(beta=0.5, gamma=0.1), delta)
    for row, kept in zip(delta.abs(), hat != 0, strict=True):
        order = row.sort(descending=True).values
        assert kept.sum() == 20
        assert torch.equal(row[kept].sort(descending=True).values, order[4:24])
    trimmed = call(Breadcrumbs(beta=0.25, gamma=0.0), delta)
    rows = [call(Ties(keep=0.25, scope="tensor"), row) for row in delta]
    assert torch.equal(trimmed, torch.stack(rows)), "gamma = 0 is a row-wise trim"
    tied = call(Breadcrumbs(beta=0.5, gamma=0.25), torch.ones(8))
    assert tied.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


GAUSSIAN_ERROR = {0: 0.363, 1: 0.140, 2: 0.055, 3: 0.0225, 4: 0.0094, 5: 0.0040}


def test_multibit_on_gaussian_entries_has_the_published_errors() -> None:
    delta = tensor((1000, 1000))
    errors = []
    for bits, wanted in GAUSSIAN_ERROR.items():
        hat = call(Multibit(bits=bits, blocks="equal_count"), delta)
        assert len(hat.abs().unique()) == 2**bits
        assert hat.abs().double().sum().item() == pytest.approx(
            delta.abs().double().sum().item(), rel=1e-6
        )
        errors.append(((hat - delta).square().sum() / delta.square().sum()).item())
        assert errors[-1] == pytest.approx(wanted, rel=0.03)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("blocks", ["equal_count", "equal_width"])
@pytest.mark.parametrize("bits", [1, 3, 6, 8])
def test_multibit_against_a_plain_reference(bits: int, blocks: str) -> None:
    """Also where many magnitudes are equal and blocks are empty."""
    delta = tensor((30, 50)).round(decimals=1)
    flat = delta.abs().flatten().double()
    if blocks == "equal_count":
        smaller = (flat[None, :] < flat[:, None]).sum(1)
        block = smaller * 2**bits // len(flat)
    else:
        width = flat.max() / 2**bits
        block = ((flat / width - 1e-6).ceil() - 1).clamp(0, 2**bits - 1).long()
    expected = torch.zeros_like(flat)
    for b in block.unique():
        expected[block == b] = flat[block == b].mean()
    hat = call(Multibit(bits=bits, blocks=blocks), delta)
    assert torch.allclose(hat.abs().flatten().double(), expected, rtol=1e-6)
    assert torch.equal(hat < 0, (delta < 0) & (hat != 0))


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("spread", ["wide", "narrow", "denormal"])
def test_blocks_are_looked_up_as_by_a_search(bits: int, spread: str) -> None:
    magnitude = tensor((300, 401)).abs()
    magnitude = {"wide": magnitude, "narrow": 1 + 1e-4 * magnitude, "denormal": 1e-41 * magnitude}[
        spread
    ]
    values = ascending(magnitude)
    limits, means = multibit._levels(
        values, Multibit(bits=bits, blocks="equal_count")._ends(values)
    )
    found = multibit._looked_up(magnitude, limits, means)
    block = torch.bucketize(magnitude, torch.from_numpy(limits[:-1]))
    assert torch.equal(found, torch.from_numpy(means)[block])


def test_chain_steps_have_their_own_random_numbers() -> None:
    delta = torch.ones(100, 100)
    twice = call(Chain(steps=[{"drop_only": {"p": 0.5}}, {"drop_only": {"p": 0.5}}]), delta)
    assert (twice != 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    both = Chain(steps=[{"dare": {"p": 0.9}}, {"bitdelta": {"multiple": 2.0}}])
    by_hand = BitDelta(multiple=2.0, magnitudes="mean", cv=0.0, axis="tensor")
    dropped = call(Dare(p=0.9, k=0), tensor((20, 30)))
    assert torch.equal(call(both, tensor((20, 30))), call(by_hand, dropped))


MISTAKES = [
    (lambda: Della(p=0.5, window=1.0), "edit.window=1.0: must be at most 2p and below 2(1 - p)"),
    (lambda: Della(p=0.1, window=0.3), "edit.window=0.3: must be at most 2p"),
    (lambda: Darex(p=0.9, q="auto"), "edit.q=auto: must be in (0, 1] or closed_form"),
    (lambda: Darex(p=0.9, q=0), "edit.q=0: must be in (0, 1]"),
    (lambda: Breadcrumbs(beta=0.8, gamma=0.3), "edit.gamma=0.3: must be at most 1 - beta"),
    (lambda: Multibit(bits=17, blocks="equal_count"), "edit.bits=17: must be an integer from 0"),
    (lambda: Multibit(bits=2.5, blocks="equal_count"), "edit.bits=2.5: must be an integer"),
    (lambda: Multibit(bits=2, blocks="rows"), "edit.blocks=rows: must be one of equal_count"),
    (lambda: SignFlip(fraction=1.0, balanced=True), "edit.fraction=1.0: must be in [0, 1)"),
    (lambda: SignFlip(fraction=0.1, balanced="x"), "edit.balanced=x: must be true or false"),
    (lambda: Noise(sigma=-1), "edit.sigma=-1: must be in [0, inf)"),
    (lambda: BiasedSign(k=0.5, p=1.0), "edit.p=1.0: must be in [0, 1)"),
    (lambda: BiasedProduct(k=float("nan"), p=None), "edit.k=nan: must be in (-inf, inf)"),
    (lambda: BitDelta(multiple=-1, magnitudes="mean", cv=0, axis="row"), "edit.multiple=-1:"),
    (lambda: BitDelta(multiple=1, magnitudes="max", cv=0, axis="row"), "edit.magnitudes=max:"),
    (lambda: Chain(steps=[]), "edit.steps=[]: must be a list of at least one edit"),
    (lambda: Chain(steps=["dara"]), "edit.steps=dara: must name one of biased_product"),
    (lambda: Chain(steps=[{"dare": {"q": 1}}]), "edit.steps.dare.q: must be one of p, k"),
    (lambda: Chain(steps=["dare", "ties"]), "edit.steps=ties: needs the whole model"),
    (lambda: Chain(steps=[{"dare": {"p": 2}}]), "edit.p=2: must be in [0, 1)"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=lambda v: v if type(v) is str else "")
def test_further_mistakes_name_the_field_and_the_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_need_outside_the_vocabulary_is_an_error() -> None:
    class Odd(Edit):
        def __call__(self, delta, *, hessian):
            return delta

    class Told(Odd):
        @property
        def needs(self):
            return ("rng", "hessian")

    for edit in (Odd(), Told(), Chain(steps=["dare", Odd()])):
        with pytest.raises(ValueError, match="needs 'hessian', which is not one of rng, grad"):
            check_needs(edit, distill.PROVIDED)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_edits_ask_for_is_provided(name: str) -> None:
    check_needs(built(name), PROVIDED)


@pytest.mark.parametrize("need", ["peers", "base", "share"])
def test_what_nobody_provides_yet_is_an_error_before_a_model_is_opened(need: str) -> None:
    class Early(Edit):
        needs = (need,)

        def __call__(self, delta, **given):
            return delta

    text = (
        f"edit Early needs '{need}', which is not available here; rng, svd, quantile, grad, scale"
    )
    with pytest.raises(ValueError, match=text):
        check_needs(Early(), distill.PROVIDED)
    with pytest.raises(ValueError, match=f"needs '{need}', which is not available here"):
        Extras((need,))


def test_what_a_slice_has_not_cannot_be_asked_for_in_slices() -> None:
    class Sliced(Edit):
        unit = "entry"

        def __call__(self, delta, *, svd):
            return delta

    with pytest.raises(ValueError, match=r"edit Sliced needs 'svd', .* unit=entry goes with rng,"):
        check_needs(Sliced())
    with pytest.raises(ValueError, match="in slices cannot ask for 'svd'"):
        editing.edited_tensor(tensor((2, 2)), tensor((2, 2), seed=1), Sliced(), svd=lambda: ())


def test_what_is_no_edit_is_told_what_to_derive_from() -> None:
    with pytest.raises(ValueError, match=r"edit int: must be derived from deltalab\.edits\.Edit"):
        check_needs(3)


def test_a_threshold_is_asked_for_at_whatever_fraction_an_edit_likes() -> None:
    """Compiled too: no field has to be called `keep`."""

    class Middle(Edit):
        fuses = True

        def __init__(self, low: float, high: float) -> None:
            self.low, self.high = low, high

        def __call__(self, delta, *, quantile):
            outer, inner = quantile(self.low), quantile(self.high)
            return torch.where(inner.survivors(delta) & ~outer.survivors(delta), delta, 0.0)

    pre, post = tensor((300, 301)), tensor((300, 301), seed=1)
    edit, delta = Middle(0.1, 0.4), post - pre
    given = needs(edit, delta)
    assert sorted(thresholds(edit, given)) == [0.1, 0.4]
    hat = edit(delta, **given)
    kept = delta.abs()[hat != 0]
    assert len(kept) == 4 * delta.numel() // 10 - delta.numel() // 10
    ranked = delta.abs().flatten().sort(descending=True).values
    assert kept.max() == ranked[delta.numel() // 10]
    eager = editing.edited_tensor(pre, post, edit, "eager", **given)
    assert torch.equal(editing.edited_tensor(pre, post, edit, "compiled", **given), eager)
