"""Codes: what a file holds gives back the bits of the edit, and is as large as it says."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from test_edits import CONF, NAMES, built, call, needs, tensor
from torch import Tensor

from deltalab.apply import coded
from deltalab.apply.audit import TERMS
from deltalab.apply.editing import audited_tensor, edited_tensor
from deltalab.codes import KINDS, Code, integers
from deltalab.codes.grid import Grid
from deltalab.codes.indexed import Indexed, entropy, spread
from deltalab.codes.kept import Kept
from deltalab.codes.lowrank import LowRank
from deltalab.codes.nested import Patched, Sum
from deltalab.codes.raw import Raw, Zero
from deltalab.codes.signs import Signs
from deltalab.edits import Edit
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.breadcrumbs import Breadcrumbs
from deltalab.edits.chain import Chain
from deltalab.edits.dare import Dare
from deltalab.edits.darex import Darex
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.keep import Keep
from deltalab.edits.multibit import Multibit
from deltalab.edits.ties import Ties
from deltalab.edits.turning import seen
from deltalab.edits.twin import Twin
from deltalab.linear.delta import difference
from deltalab.packing import files
from deltalab.rng import Rng

SHAPES = [(24, 40), (40, 24), (7,), (1,), (), (0, 3), (6, 4, 3, 3), (2, 5, 4), (3, 1), (1, 300)]
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (BF16, F32)]
ENCODED = [name for name in NAMES if type(built(name)).encode is not Edit.encode]


def settings() -> list[Edit]:
    found = [built(name) for name in ENCODED]
    found += [Ties(keep=k, scope=s) for k, s in product((0.0, 0.02, 0.6, 1.0), ("model", "tensor"))]
    found += [
        BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis=axis)
        for axis in ("tensor", "row", "column")
    ]
    found += [Multibit(bits=n, blocks=b) for n, b in product((0, 1, 3, 9), ("equal_count",))]
    found += [Multibit(bits=2, blocks="equal_width"), Darex(p=0.9, q="closed_form")]
    found += [Twin(rank=r, rate=None) for r in (1, 3, 99)] + [Twin(rank=None, rate=1.0)]
    found += [Dare(p=p, k=0.0) for p in (0.0, 0.3, 0.99)] + [DropOnly(p=1.0), DropOnly(p=0.5)]
    found += [Chain(steps=["dare", "bitdelta"]), Chain(steps=["bitdelta", {"dare": {"p": 0.9}}])]
    found += [Chain(steps=[{"twin": {"rank": 2, "rate": None}}, {"ties": {"scope": "tensor"}}])]
    found += [Chain(steps=[{"dare": {"p": 0.3}}]), Breadcrumbs(beta=1.0, gamma=0.0)]
    return found


def sides(shape: tuple[int, ...], dtypes) -> tuple[Tensor, Tensor]:
    """A pair whose deltas are some zero, some of the other sign's zero, most small."""
    pre, shift = tensor(shape), 0.01 * tensor(shape, seed=1)
    post = torch.where(tensor(shape, seed=2) > 1.0, pre, pre + shift)
    pre, post = pre.to(dtypes[0]), post.to(dtypes[1])
    if post.numel() > 2:
        pre.view(-1)[0], post.view(-1)[0] = 0.0, -0.0
    return pre, post


def encoded(edit: Edit, pre: Tensor, post: Tensor, turned: bool = False):
    """The code as `pack` makes it, and what the edit stores."""
    delta = difference(pre, post)
    mine, given = seen(edit, turned), needs(edit, delta)
    if turned and "acts" in given:
        given |= {"acts": needs(edit, delta.mT)["acts"]}
    code = mine.encode(delta, post=post, **given)
    stored = edited_tensor(pre, post, mine, "eager", **given)
    exact = None if code is None else Patched.exact(code, pre, stored)
    assert exact is code or not code.is_exact(pre, post, delta), "says to be exact, and is not"
    return exact, stored, mine, given, delta


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits, signs of zeros included."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    equal = one.dtype == other.dtype and one.shape == other.shape
    return equal and torch.equal(
        one.contiguous().reshape(-1).view(words), other.contiguous().reshape(-1).view(words)
    )


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("edit", settings(), ids=str)
def test_what_is_loaded_gives_the_bits_of_the_edit(edit: Edit, dtypes, tmp_path) -> None:
    codes, wanted = {}, {}
    for turned, shape in product((False, True), SHAPES):
        if turned and len(shape) != 2:
            continue
        pre, post = sides(shape, dtypes)
        code, stored, *_ = encoded(edit, pre, post, turned)
        assert code is not None
        assert code.shape == shape
        codes[name := f"{shape} {turned}"] = code
        wanted[name] = pre, stored
    files.save(tmp_path / "codes.safetensors", codes)
    for name, code in files.load(tmp_path / "codes.safetensors").items():
        pre, stored = wanted[name]
        assert same(code.onto(pre, stored.dtype), stored), name
        assert code.bits == codes[name].bits


@pytest.mark.parametrize("edit", settings(), ids=str)
def test_decoding_gives_the_edited_delta(edit: Edit) -> None:
    """Without W_post a code holds the delta's own numbers, and gives the call's bits."""
    for shape in SHAPES:
        delta = tensor(shape)
        hat, code = call(edit, delta), edit.encode(delta, **needs(edit, delta))
        assert torch.equal(code.decode(), hat)
        pre, post = sides(shape, (F32, BF16))
        delta = difference(pre, post)
        given = needs(edit, delta)
        assert torch.equal(edit.encode(delta, post=post, **given).decode(pre), edit(delta, **given))


@pytest.mark.parametrize("edit", settings(), ids=str)
def test_the_size_is_told_as_the_code_has_it(edit: Edit) -> None:
    """Sliced, compiled or whole, of entries of all widths, and of matrices that are seen turned."""
    for shape, dtypes, turned in product(SHAPES, PAIRS[3:5], (False, True)):
        if turned and len(shape) != 2:
            continue
        pre, post = sides(shape, dtypes)
        _, _, mine, given, delta = encoded(edit, pre, post, turned)
        wanted = mine.encode(delta, post=post, **given).bits
        for kernel in ("eager", "compiled"):
            _, sums, bits = audited_tensor(pre, post, mine, kernel, **given)
            assert bits == wanted
            assert len(sums) == TERMS


@pytest.mark.parametrize("keep", [0.0, 1e-5, 1e-3, 0.02, 0.2, 0.9])
def test_gaps_are_counted_across_the_pieces_of_a_compiled_pass(keep: float) -> None:
    """Long and short ones, pieces without any, and entries that are no multiple of a word."""
    pre = tensor((1061, 2003))
    post = pre + 0.01 * tensor(pre.shape, seed=1)
    post[400:1000] = pre[400:1000]
    delta = difference(pre, post)
    for edit in (Ties(keep=keep, scope="model"), DropOnly(p=1 - keep)):
        given = needs(edit, delta)
        wanted = edit.encode(delta, post=post, **given)
        _, _, bits = audited_tensor(pre, post, edit, "compiled", **given)
        assert bits == wanted.bits
    index = np.flatnonzero((delta.abs() > 0.02).numpy())
    gaps = np.diff(index, prepend=-1) - 1
    shares = [float((gaps // ((1 << w) - 1)).sum()) for w in range(1, 9)]
    assert spread(delta.abs() > 0.02) == (len(index), *shares)


@pytest.mark.parametrize("name", ENCODED)
def test_a_file_is_as_large_as_it_says(name: str, tmp_path) -> None:
    edit, (pre, post) = built(name), sides((64, 384), (BF16, BF16))
    code, *_ = encoded(edit, pre, post)
    size = files.save(tmp_path / "one.safetensors", {"layer.weight": code})
    assert abs(size - code.bits.total / 8) <= 0.05 * code.bits.total / 8 + 4096
    assert size >= code.bits.payload / 8
    arrays = sum(a.numel() * a.element_size() for a in code.arrays.values())
    assert arrays <= code.bits.total / 8 <= arrays + 1000


def test_bits_are_those_of_a_checkpoint_s_own_type() -> None:
    for dtype, width in ((BF16, 16), (F32, 32)):
        pre, post = sides((100, 100), (dtype, dtype))
        code, *_ = encoded(Dare(p=0.9, k=0.0), pre, post)
        kept = int((~Rng(0, "layer.weight").below(pre, 0.9)).sum())
        assert code.bits.payload == width * kept
    code, *_ = encoded(BitDelta(multiple=1, magnitudes="mean", cv=0.0, axis="tensor"), pre, post)
    assert code.bits.payload == 10_000


@pytest.mark.parametrize("q", [0.0, 0.003, 0.03, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_places_take_little_more_than_their_entropy(q: float) -> None:
    delta = tensor((1 << 16,))
    places = torch.rand(1 << 16, generator=torch.Generator().manual_seed(3)) < q
    code = Indexed.at(delta, None, places)
    assert torch.equal(code.decode(), torch.where(places, delta, 0.0))
    assert isinstance(code, Zero) == (not places.any())
    if isinstance(code, Indexed):
        held = sum(a.numel() for n, a in code.arrays.items() if n != "values") * 8
        least = len(delta) * entropy(float(places.float().mean()))
        assert least <= held + 8 <= max(1.12 * least, len(delta)) + 16
        assert code.bits.bound == pytest.approx(code.bits.total - held + least)


@pytest.mark.parametrize("width", range(1, 17))
def test_packing_is_the_order_of_numpy(width: int) -> None:
    for count in (0, 1, 7, 8, 9, 1 << 16, (1 << 16) + 1):
        given = np.random.default_rng(count).integers(0, 1 << width, count)
        octets = integers.pack(torch.from_numpy(given), width)
        assert octets.numel() == integers.size(count, width)
        assert integers.unpack(octets, width, count).tolist() == given.tolist()
        if width <= 8 and count:
            bits = (given[:, None] >> np.arange(width - 1, -1, -1)) & 1
            assert octets.tolist() == np.packbits(bits.astype(np.uint8).reshape(-1)).tolist()


@pytest.mark.parametrize("name", ENCODED)
def test_half_the_bits_lose_what_half_precision_does(name: str) -> None:
    """`values: float16` rounds what is held and nothing else."""
    edit, delta = built(name), 0.01 * tensor((24, 40))
    code = edit.encode(delta, **needs(edit, delta))
    narrow = code.narrowed()
    assert not any(a.dtype == F32 for a in narrow.arrays.values())
    wide = code.decode()
    assert torch.allclose(narrow.decode(), wide, rtol=2e-3, atol=1e-5)
    assert torch.equal(narrow.decode() == 0, wide == 0) or name == "twin"
    if type(code) in (Kept, Indexed):
        values = delta if not isinstance(code, Indexed) else None
        exact = float(code.settings["scale"]) * code.arrays["values"].half().float()
        assert torch.equal(narrow.decode()[wide != 0], exact[exact != 0]) or values is None


def test_no_code_where_every_entry_has_a_number_of_its_own() -> None:
    delta = tensor((4, 6))
    for edit in (
        Dare(p=0.5, k=-1.0),
        BitDelta(multiple=1.0, magnitudes="normal", cv=0.1, axis="tensor"),
        Chain(steps=["bitdelta", "expo"]),
        built("expo"),
        built("noise"),
    ):
        assert edit.encode(delta, **needs(edit, delta)) is None


def test_a_kind_is_looked_up_in_the_table_alone() -> None:
    assert [type(Code.of(k, (), {}, {})).kind for k in KINDS] == list(KINDS)
    with pytest.raises(ValueError, match=r"kind='os': must be one of raw, zero, kept"):
        Code.of("os", (), {}, {})


GIVEN = [
    Kept.drawn(torch.ones(9), None, Rng(0, "w"), 0.5),
    Indexed.at(torch.ones(99), None, torch.arange(99) % 33 == 1),
    Signs.of_delta(torch.ones(3, 3), torch.ones(()), "tensor"),
    Grid.of_delta(torch.ones(3, 3), torch.tensor([1.0, 2.0])),
    LowRank.of_factors((3, 3), torch.ones(3, 2), torch.ones(2, 3)),
    Raw.holding(torch.ones(3), None),
    Sum.of_codes([Raw.holding(torch.ones(3), None)]),
]


@pytest.mark.parametrize("code", GIVEN, ids=lambda code: code.kind)
def test_a_code_that_does_not_fit_together_is_refused(code: Code) -> None:
    assert code.decode().shape == code.shape
    for name, array in code.arrays.items():
        short = {**code.arrays, name: array[:-1].clone()}
        with pytest.raises(ValueError, match="must be|must have|entry|entries"):
            dataclasses.replace(code, arrays=short).decode()
        gone = {k: v for k, v in code.arrays.items() if k != name}
        with pytest.raises(ValueError, match="missing"):
            dataclasses.replace(code, arrays=gone).decode()
    for name, value in code.settings.items():
        if name in ("turned", "holds", "across", "0.holds"):
            continue
        wrong = {**code.settings, name: 7 if isinstance(value, str) else "x"}
        with pytest.raises(ValueError, match="must be|no code"):
            dataclasses.replace(code, settings=wrong).decode()


def test_what_holds_the_tuned_model_s_entries_asks_for_the_base() -> None:
    pre, post = sides((4, 6), (BF16, BF16))
    code = Keep().encode(difference(pre, post), post=post)
    with pytest.raises(ValueError, match="give the base's"):
        code.decode()
    with pytest.raises(ValueError, match=r"of shape \(4, 6\), the base's tensor \(6, 4\)"):
        code.onto(pre.mT, BF16)
    with pytest.raises(ValueError, match="above 65504"):
        Keep().encode(torch.tensor([1e6])).narrowed()


def test_the_defaults_have_codes() -> None:
    """The edits that compress: a new one is added to neither list without being looked at."""
    without = {"biased_product", "biased_sign", "expo", "noise", "sign_flip"}
    assert not without & set(ENCODED)
    assert {"dare", "drop_only", "ties", "bitdelta", "multibit", "twin", "chain"} <= set(ENCODED)
    grid = yaml.safe_load((CONF / "edit" / "dare.yaml").read_text())
    assert grid["k"] == 0, "DARE's default is the compressor"


def test_values_of_sixteen_bits_are_a_setting_of_their_own(tmp_path) -> None:
    """What is measured is what is held; the default is no other point than before."""
    assert coded.held(built("dare"), "exact") == built("dare")
    edit, (pre, post) = coded.held(built("dare"), "float16"), sides((40, 24), (F32, F32))
    delta = difference(pre, post)
    given = needs(edit, delta)
    expected = 2 * torch.where(given["rng"].below(delta, 0.5), 0.0, delta.half().float())
    assert torch.equal(edit(delta, **given), expected)
    code = Patched.exact(
        edit.encode(delta, post=post, **given), pre, edited_tensor(pre, post, edit, **given)
    )
    files.save(tmp_path / "one.safetensors", {"w": code})
    (again,) = files.load(tmp_path / "one.safetensors").values()
    assert same(again.onto(pre, F32), edited_tensor(pre, post, edit, **given))
    kept = int((~given["rng"].below(delta, 0.5)).sum())
    assert code.bits.payload <= 16 * kept < 32 * kept
    with pytest.raises(ValueError, match="values=float16: edit Expo with these settings has no"):
        coded.held(built("expo"), "float16")
    with pytest.raises(ValueError, match="values=half: must be one of exact, float16"):
        coded.held(built("dare"), "half")
