"""Edits written in C give the bits that PyTorch gives, or are refused."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_apply import FUSED, bits, tensor
from torch import Tensor

from deltalab.apply import editing
from deltalab.apply.extras import Extras, Memo
from deltalab.edits import Edit
from deltalab.edits.biased_product import BiasedProduct
from deltalab.edits.biased_sign import BiasedSign
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.expo import Expo
from deltalab.edits.ties import Ties
from deltalab.edits.twin import Twin
from deltalab.kernels import fused, native, translation
from deltalab.rng import Rng
from deltalab.weights import mapping
from deltalab.weights.threshold import ModelThreshold, kept_count

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
EDITS = [
    *FUSED,
    BiasedSign(k=0.5, p=0.3),
    BiasedProduct(k=-1, p=0.3),
    BitDelta(multiple=1.5, magnitudes="normal", cv=0.4, axis="tensor"),
]


def pair(dtype: torch.dtype, other: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weights with equal, denormal, infinite and zero entries, and a ragged end."""
    pre = (0.02 * tensor((241, 173))).to(dtype)
    post = (pre.float() + 1e-3 * tensor((241, 173), seed=1)).to(other or dtype)
    post[0, :50] = pre[0, :50]
    pre[1, :50], post[1, :50] = 1e-40, 3e-40
    pre[2, :9], post[2, :9] = torch.inf, torch.inf
    pre[3, :9], post[3, :9] = 0.0, -0.0
    return pre, post


def needed(edit, dtype: torch.dtype = F32) -> dict:
    needs = {"rng": Rng(3, "w"), "grad": tensor((241, 173), seed=2).to(dtype)}
    return {k: v for k, v in needs.items() if k in edit.needs}


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (F64, F64), (F32, BF16)], ids=str)
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_c_and_eager_give_the_same_bits(edit, dtypes) -> None:
    (pre, post), needs = pair(*dtypes), needed(edit, dtypes[0])
    dtypes = (*dtypes, *(t.dtype for name, t in needs.items() if name == "grad"))
    matrix = edit.unit != "entry"
    assert fused._program(edit, dtypes, matrix, editing._edited, {}), "not translated"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = editing.edited_tensor(pre, post, edit, "compiled", **needs)
    eager = editing.edited_tensor(pre, post, edit, "eager", **needs)
    assert torch.equal(bits(compiled), bits(eager))


@pytest.mark.parametrize("edit", [Dare(p=0.5, k=0.5), EDITS[-1]], ids=str)
def test_neither_pieces_nor_threads_nor_pages_of_indices_matter(edit, monkeypatch) -> None:
    (pre, post), threads = pair(BF16), torch.get_num_threads()
    rng = Rng(3, "w", start=2**32 - 20_000)
    eager = editing.edited_tensor(pre, post, edit, "eager", rng=rng)
    monkeypatch.setattr(native, "PIECE", 1000)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = torch.empty_like(post)
            assert editing.edited_tensor(pre, post, edit, "compiled", out, rng=rng) is out
            assert torch.equal(bits(out), bits(eager))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_entries_that_are_no_numbers_make_such_entries(edit) -> None:
    (pre, post), needs = pair(F32), needed(edit)
    pre[5, 5], post[7, 7] = torch.nan, torch.nan
    out = torch.full_like(post, 123.0)
    editing.edited_tensor(pre, post, edit, "compiled", out, **needs)
    eager = editing.edited_tensor(pre, post, edit, "eager", **needs)
    assert torch.equal(out.isnan(), eager.isnan())
    assert torch.equal(out.nan_to_num(), eager.nan_to_num())


def test_a_sweep_compiles_once() -> None:
    pre, post = tensor((64, 64)), tensor((64, 64), seed=1)
    for index, p in enumerate((0.1, 0.25, 0.5, 0.9)):
        edit = Dare(p=p, k=-0.5 + 0.1 * index)
        editing.edited_tensor(pre, post, edit, "compiled", rng=Rng(index, f"w{index}"))
        if index == 0:
            before = native._compiled.cache_info().misses
    assert native._compiled.cache_info().misses == before


def test_views_are_edited_as_they_read() -> None:
    pre, post = tensor((40, 60)).T, tensor((60, 80), seed=1)[:, ::2]
    edit, rng = Dare(p=0.5, k=0.5), Rng(0, "w")
    compiled = editing.edited_tensor(pre, post, edit, "compiled", rng=rng)
    assert torch.equal(compiled, editing.edited_tensor(pre, post, edit, "eager", rng=rng))


def between_files(directory, edit, pre: Tensor, post: Tensor, rng: Rng) -> Tensor | None:
    """Edit by way of files whose tensors begin and end somewhere inside."""
    given = {"pre": (pre, 24), "post": (post, 40), "out": (torch.zeros_like(post), 8)}
    files = []
    for name, (value, begin) in given.items():
        data = b"x" * begin + value.view(torch.uint8).numpy().tobytes() + b"x" * 10
        (directory / name).write_bytes(data)
        files.append((os.open(directory / name, os.O_RDWR), begin))
    try:
        dtypes = (pre.dtype, post.dtype)
        kernel = "compiled"
        needs = {"rng": rng} if "rng" in edit.needs else {}
        done = editing.edited_files(edit, dtypes, tuple(files), post.shape, kernel, **needs)
    finally:
        for file, _ in files:
            os.close(file)
    written = (directory / "out").read_bytes()
    assert (written[:8], written[-10:]) == (b"x" * 8, b"x" * 10), "the rest of the file"
    made = torch.frombuffer(bytearray(written[8:-10]), dtype=post.dtype)
    return made.reshape(post.shape) if done else None


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, BF16), (F16, F64)], ids=str)
@pytest.mark.parametrize("edit", [Dare(p=0.5, k=0.5), *EDITS[-4:]], ids=str)
def test_from_file_to_file(edit, dtypes, tmp_path, monkeypatch) -> None:
    """Also in several pieces, across a page of random indices, with sums over the tensor."""
    pre, post = (tensor((1153, 1001), seed=i).to(dtype) for i, dtype in enumerate(dtypes))
    rng = Rng(3, "w", start=2**32 - 300_000)
    needs = {"rng": rng} if "rng" in edit.needs else {}
    if "grad" in edit.needs:
        assert between_files(tmp_path, edit, pre, post, rng) is None
        return
    expected = editing.edited_tensor(pre, post, edit, "compiled", **needs)
    assert torch.equal(between_files(tmp_path, edit, pre, post, rng), expected)


@pytest.mark.parametrize("shape", [(1153, 1001), (100_000, 3), (3, 100_000), (40, 20, 9, 9)])
@pytest.mark.parametrize("magnitudes", ["mean", "normal"])
def test_rows_in_pieces_and_from_file_to_file(magnitudes, shape, tmp_path, monkeypatch) -> None:
    """A row's scale is its own wherever a tensor is cut, and whichever thread takes it."""
    edit = BitDelta(multiple=1.5, magnitudes=magnitudes, cv=0.4, axis="row")
    pre, post = (tensor(shape, seed=i).to(BF16) for i in range(2))
    rng, threads = Rng(3, "w", start=77), torch.get_num_threads()
    expected = editing._edited(pre, post, edit, {"rng": rng})
    monkeypatch.setattr(native, "PIECE", 5000)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            compiled = editing.edited_tensor(pre, post, edit, "compiled", rng=rng)
            assert torch.equal(bits(compiled), bits(expected))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(between_files(tmp_path, edit, pre, post, rng), expected)
    crossing = Rng(3, "w", start=2**32 - 3000)  # a row cannot be cut where indices begin anew
    assert between_files(tmp_path, edit, pre, post, crossing) is None
    for size in (1, 777, 1 << 15):
        monkeypatch.setitem(editing.SLICE, "cpu", size)
        eager = editing.edited_tensor(pre[:100], post[:100], edit, "eager", rng=rng)
        assert torch.equal(eager, expected[:100])


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_what_is_not_finite_goes_another_way(dtype, tmp_path) -> None:
    edit, rng = Dare(p=0.5, k=4.0), Rng(0, "w")
    pre, post = tensor((100_000,)).to(dtype), tensor((100_000,), seed=1).to(dtype)
    pre[70_000], post[70_000] = 0.0, min(torch.finfo(dtype).max, torch.finfo(F32).max)
    expected = editing.edited_tensor(pre, post, edit, "eager", rng=rng)
    made = between_files(tmp_path, edit, pre, post, rng)
    assert (made is None) == (not expected.isfinite().all())
    assert dtype == F64 or made is None


def test_files_that_end_early_go_another_way(tmp_path) -> None:
    edit, (pre, post) = Expo(alpha=0.5), (tensor((1000,)), tensor((1000,), seed=1))
    assert between_files(tmp_path, edit, pre, post, Rng(0, "w")) is not None
    assert between_files(tmp_path, edit, pre[:900], post, Rng(0, "w")) is None


def by_row(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1, dtype=F64).float().reshape(-1, 1)


OPERATIONS = {
    "arithmetic": lambda a, b: (a + b) * (a - 2.5) / (b * b + 0.75) - (1 - a),
    "integers": lambda a, b: ((a * 1e6).int() * 77777 - (b * 1e6).int() + 5).float(),
    "long": lambda a, b: ((a * 1e6).long() * 777777777777 - 1 - (b * 1e6).long()).float(),
    "shifts": lambda a, b: (((a * 1e6).int() << 9) ^ ((b * 1e6).int() >> 3)).float(),
    "words": lambda a, b: ((a.view(torch.int32) | 5) & b.view(torch.int32)).view(F32),
    "division": lambda a, b: (a * 9).int() / ((b * 9).int() * 2 + 1),
    "compared": lambda a, b: torch.where((a < b) | (a == 0) | (b >= 1), a, -b),
    "not": lambda a, b: torch.where(~(a > b) & (a != b) ^ (b <= 0), a.abs(), 2.0),
    "masks": lambda a, b: (a < b).float() + (b < 0).double().float(),
    "filled": lambda a, b: torch.full_like(a, 3).masked_fill(a < 0, 0.5) + torch.zeros_like(b),
    "narrow": lambda a, b: a.bfloat16().double().half().float() + (a.half() < b.half()).float(),
    "mean": lambda a, b: a - b.abs().mean(dtype=F64).float() * (1 - a.mean(dtype=F64)),
    "sum": lambda a, b: a * (a > b).sum() + (b * (a.sum(dtype=F64) > 0)),
    "twice": lambda a, b: (a - a.mean(dtype=F64).float()).abs().sum(dtype=F64).float() * b,
    "rows": lambda a, b: a - b.abs().mean(1, keepdim=True, dtype=F64).float() * (1 + b),
    "rows, then rows": lambda a, b: (
        (a - by_row(a)).abs() * by_row((a - by_row(a)).abs()) + by_row(b)
    ),
    "rows of masks": lambda a, b: a * (a > b).sum(1, keepdim=True) - (a < 0).sum(-1).reshape(-1, 1),
    "columns": lambda a, b: a - b.abs().mean(0, keepdim=True, dtype=F64).float() * (1 + b),
    "columns of masks": lambda a, b: a * (a > b).sum(-2) + b,
    "whole": lambda a, b: a.int().float() + b.double().long().float(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_that_is_translated(name: str) -> None:
    a, b = 2 * tensor((30, 41)), tensor((30, 41), seed=1)
    a[0], b[0, ::2] = 0.0, -0.0

    def body(pre, post, edit, needs):
        return OPERATIONS[name](pre, post)

    out = torch.empty_like(a)
    made = translation.program(None, (), body, (F32, F32), matrix=True)
    assert made.rows == name.startswith("rows")
    assert made.columns == name.startswith("columns")
    width = 41 if made.rows or made.columns else 0
    native.edit(made, [a.view(-1), b.view(-1)], None, out.view(-1), width)
    assert torch.equal(bits(out), bits(body(a, b, None, {})))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda a, b, *_: torch.sort(a).values, "sort"),
        (lambda a, b, *_: a.add_(1), "add_"),
        (lambda a, b, *_: a if bool(a[0, 0] > 0) else b, "select"),
        (lambda a, b, *_: a.sum(dtype=F64).float() / a.numel() + b, "size of the tensor"),
        (lambda a, b, *_: (a.mean(0, dtype=F64) * a.abs().mean(0, dtype=F64)).float() * b, "sums"),
        (
            lambda a, b, *_: (
                a.mean(0, dtype=F64).float() * a.mean(1, keepdim=True, dtype=F64).float() * b
            ),
            "sums",
        ),
        (lambda a, b, *_: a.mean(1, dtype=F64).float().mean() * b, "mean"),
        (
            lambda a, b, *_: (
                a.mean(dtype=F64).float() * a.mean(1, keepdim=True, dtype=F64).float() * b
            ),
            "sums",
        ),
        (lambda a, b, *_: a.double(), "a result of torch.float64"),
        (lambda a, b, *_: a + torch.ones(3), "ones"),
        (lambda a, b, *_: a.exp(), "exp"),
        (lambda a, b, *_: (a.half() * b.half()).float(), "mul"),
    ],
)
def test_what_has_no_translation_is_refused(body, reason: str) -> None:
    with pytest.raises(translation.Untranslatable, match=reason):
        translation.program(None, (), body, (F32, F32), matrix=True)


class Grown(Edit):
    """D_hat = exp(D) - 1: the exponential of C is another than PyTorch's."""

    unit = "entry"
    version = 1

    def __call__(self, delta: Tensor) -> Tensor:
        return delta.exp() - 1


def test_what_has_no_translation_runs_as_it_is(monkeypatch) -> None:
    edit = Grown()
    (pre, post), needs = pair(F32), needed(edit)
    assert fused._program(edit, (F32, F32), False, editing._edited, {}) is None
    monkeypatch.delattr(torch, "compile")
    compiled = editing.edited_tensor(pre, post, edit, "compiled", **needs)
    assert torch.equal(bits(compiled), bits(editing._edited(pre, post, edit, needs)))


@pytest.mark.parametrize(
    "compiler", ["/no/such/compiler", "false", "sh -c 'echo wrong >&2; exit 1'"]
)
def test_a_program_that_does_not_compile_runs_eagerly_with_one_warning(
    compiler: str, monkeypatch
) -> None:
    """It alone: other edits and other dtypes are compiled as soon as that can be done."""
    own = native.COMPILER
    monkeypatch.setattr(native, "COMPILER", compiler)
    monkeypatch.setattr(fused, "_failed", {})
    native._compiled.cache_clear()
    pre, post = tensor((50, 50)), tensor((50, 50), seed=1)
    reason = "wrong" if "wrong" in compiler else compiler
    text = f"edit Expo .float32, float32. runs uncompiled, because compiling its C failed.*{reason}"
    with pytest.warns(UserWarning, match=text):
        out = editing.edited_tensor(pre, post, Expo(alpha=0.5), "compiled")
    assert torch.equal(out, editing.edited_tensor(pre, post, Expo(alpha=0.5), "eager"))
    monkeypatch.setattr(native, "COMPILER", own)
    ran, original = [], native.edit
    noting = lambda made, *rest: ran.append(made.dtypes) or original(made, *rest)  # noqa: E731
    monkeypatch.setattr(native, "edit", noting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editing.edited_tensor(pre, post, Expo(alpha=0.25), "compiled")
        assert ran == [], "remembered"
        editing.edited_tensor(pre, post, Dare(p=0.5, k=0.5), "compiled", rng=Rng(0, "w"))
        editing.edited_tensor(pre.half(), post.half(), Expo(alpha=0.5), "compiled")
    assert ran == [(F32, F32), (F16, F16)]


def test_what_an_edit_raises_is_raised_and_concerns_it_alone(tmp_path, monkeypatch) -> None:
    class Angry(Edit):
        unit = "entry"

        def __call__(self, delta: Tensor) -> Tensor:
            raise ValueError("edit.c=3: must be below 2")

    monkeypatch.setattr(fused, "_failed", {})
    pre, post = tensor((300, 300)), tensor((300, 300), seed=1)
    ran, original = [], native.edit
    monkeypatch.setattr(native, "edit", lambda *given: ran.append(1) or original(*given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="^edit.c=3: must be below 2$"):
            editing.edited_tensor(pre, post, Angry())
        assert between_files(tmp_path, Angry(), pre, post, Rng(0, "w")) is None
        editing.edited_tensor(pre, post, Expo(alpha=0.5))
    assert ran == [1]
    assert fused._failed == {}


def test_small_tensors_do_not_compile() -> None:
    edit, large = Expo(alpha=0.5), fused.SMALLEST
    assert not fused.wanted(edit, 100, "auto")
    assert fused.wanted(edit, large, "auto")
    assert not fused.wanted(edit, large, "auto", "cuda")
    assert fused.wanted(edit, 100, "compiled")
    assert not fused.wanted(edit, large, "eager")
    assert not fused.wanted(Ties(keep=0.5, scope="tensor"), large, "compiled")
    with pytest.raises(ValueError, match="kernel=fast: must be one of auto, eager, compiled"):
        fused.wanted(edit, 100, "fast")


@pytest.mark.parametrize(
    ("edit", "large", "compiled"),
    [
        (Expo(alpha=0.5), (F32, (256, 256)), {"large", "matrix"}),
        (Expo(alpha=0.5), (F32, (1 << 16,)), {"large", "vector"}),
        (Expo(alpha=0.5), (F16, (256, 256)), {"large"}),
        (Expo(alpha=0.5), (F32, (255, 256)), set()),
        (EDITS[-1], (F32, (256, 256)), {"large", "matrix"}),
        (Twin(rank=1, rate=None), (F32, (256, 256)), {"large", "matrix"}),
        (Ties(keep=0.5, scope="model"), (F32, (256, 256)), {"large"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_small_tensors_are_compiled_with_a_large_one(edit, large, compiled, monkeypatch) -> None:
    """With one of the same program alone: none is compiled for their sake; the bits are the same.

    Of an edit that sees all of a tensor, what is compiled is the adding of its result.
    """
    shapes = {"matrix": (F32, (9, 7)), "vector": (F32, (8,)), "large": large}
    pre, post = (
        {n: tensor(shape, seed=i).to(dtype) for n, (dtype, shape) in shapes.items()}
        for i in range(2)
    )
    ran, original = set(), native.edit

    def seen(program, tensors, *rest):
        ran.add(next(n for n in post if post[n].numel() == tensors[1].numel()))
        return original(program, tensors, *rest)

    monkeypatch.setattr(native, "edit", seen)
    given = Extras(edit.needs, 3, {}, memo=Memo())
    made = dict(editing.edited(pre, post, edit, "all", given))
    assert ran == compiled
    eager = dict(editing.edited(pre, post, edit, "all", given, "eager"))
    assert all(torch.equal(bits(made[n]), bits(eager[n])) for n in post)


def test_all_float16_numbers_and_the_roundings_between_them() -> None:
    """Every pattern read, and every midpoint of two with its neighbours rounded."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(F16)
    numbers = halves[~halves.isnan()].float().sort().values
    middle = (numbers[1:] + numbers[:-1]) / 2
    edges = [middle.nextafter(numbers[1:]), middle, middle.nextafter(numbers[:-1]), numbers]
    given = torch.cat([*edges, torch.tensor([65519.9, 65520.0, 1e38, 1e-38, 1e-45, -1e-45])])
    given = given[~given.isnan()]

    def body(pre, post, edit, needs):
        return pre.half().float() + post.half().float()

    made = translation.program(None, (), body, (F32, F32))
    out, zero = torch.empty_like(given), torch.zeros_like(given)
    native.edit(made, [given, zero], None, out)
    assert torch.equal(out, body(given, zero, None, {}))


def test_many_threads_compile_once() -> None:
    native._compiled.cache_clear()
    (pre, post), edits = pair(F32), [Dare(p=0.1 * n, k=0.5) for n in range(1, 9)]

    def run(edit) -> Tensor:
        return editing.edited_tensor(pre, post, edit, "compiled", rng=Rng(0, "w"))

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(run, edits))
    assert native._compiled.cache_info().misses == 1
    for edit, out in zip(edits, made, strict=True):
        assert torch.equal(out, editing.edited_tensor(pre, post, edit, "eager", rng=Rng(0, "w")))


def test_a_model_wide_threshold_enters_as_a_number(monkeypatch) -> None:
    """Where all of a tensor's equal magnitudes share one fate; the others are ranked eagerly."""
    monkeypatch.setattr(mapping, "PIECE", 1000)
    pre = {name: tensor((90, 71), seed=i) for i, name in enumerate("abc")}
    post = {n: t + tensor((90, 71), seed=9).round(decimals=1) for n, t in pre.items()}
    deltas = {n: post[n] - pre[n] for n in pre}
    edit, limits = Ties(keep=0.31, scope="model"), ModelThreshold().of(0.31, deltas)
    kept = 0
    for name in pre:
        needs = {"quantile": lambda keep, name=name: limits[name]}
        known = fused._known(editing._found(edit, needs))
        program = fused._program(edit, (F32, F32), True, editing._edited, known)
        assert (program is None) == (limits[name].ties > 0)
        compiled = editing.edited_tensor(pre[name], post[name], edit, "compiled", **needs)
        eager = editing.edited_tensor(pre[name], post[name], edit, "eager", **needs)
        assert torch.equal(bits(compiled), bits(eager))
        kept += int((compiled != pre[name]).sum())
    assert kept == kept_count(0.31, 3 * 90 * 71)


@pytest.mark.parametrize("threads", [1, 3])
def test_counting_in_pieces_finds_what_sorting_finds(threads: int, monkeypatch) -> None:
    monkeypatch.setattr(mapping, "PIECE", 777)
    before = torch.get_num_threads()
    deltas = {n: tensor((50, 61), seed=i).round(decimals=2) for i, n in enumerate("ab")}
    ranked = torch.cat([d.abs().flatten() for d in deltas.values()]).sort().values
    try:
        torch.set_num_threads(threads)
        for keep in (0.0, 0.01, 0.2, 0.9, 1.0):
            limits = ModelThreshold().of(keep, deltas)
            masks = [limits[n].survivors(d) for n, d in deltas.items()]
            count = int(sum(m.sum() for m in masks))
            assert count == kept_count(keep, len(ranked))
            if 0 < count < len(ranked):
                least = min(
                    float(d[m].abs().min()) for d, m in zip(deltas.values(), masks, strict=True)
                )
                assert least == ranked[-count]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("place", range(4))
def test_addresses_of_another_device_are_never_read(place: int) -> None:
    """A gradient on a GPU, handed over by its address, ended the process without a word."""
    edit = BiasedProduct(k=0.5, p=0.3)
    given = [tensor((100,), seed=i) for i in range(4)]  # pre, post, grad, out
    made = translation.program(edit, edit.needs, editing._edited, (F32, F32, F32))
    given[place] = given[place].to("meta")
    with pytest.raises(ValueError, match="an edit in C takes tensors on the CPU, not on meta"):
        native.edit(made, given[:3], None, given[3])


@pytest.mark.parametrize("shape", [(1153, 1001), (100_000, 3), (3, 100_000), (40, 20, 9, 9)])
@pytest.mark.parametrize("magnitudes", ["mean", "normal"])
def test_columns_in_pieces(magnitudes, shape, tmp_path, monkeypatch) -> None:
    """A column's scale is the same however many threads add up however large parts of it."""
    edit = BitDelta(multiple=1.5, magnitudes=magnitudes, cv=0.4, axis="column")
    pre, post = (tensor(shape, seed=i).to(BF16) for i in range(2))
    rng, threads = Rng(3, "w", start=77), torch.get_num_threads()
    assert fused._program(edit, (BF16, BF16), True, editing._edited, {}).columns
    expected = editing._edited(pre, post, edit, {"rng": rng})
    try:
        for count in (1, 3):
            for piece in (5000, 1 << 20):
                monkeypatch.setattr(native, "PIECE", piece)
                torch.set_num_threads(count)
                compiled = editing.edited_tensor(pre, post, edit, "compiled", rng=rng)
                assert torch.equal(bits(compiled), bits(expected))
    finally:
        torch.set_num_threads(threads)
    assert between_files(tmp_path, edit, pre, post, rng) is None
    crossing = Rng(3, "w", start=2**32 - 3000)
    compiled = editing.edited_tensor(pre, post, edit, "compiled", rng=crossing)
    assert torch.equal(bits(compiled), bits(editing._edited(pre, post, edit, {"rng": crossing})))
