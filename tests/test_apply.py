"""Edits of whole models: in memory and streamed to disk, eager and compiled, one and the same."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltalab.apply import editing, stream
from deltalab.apply.extras import Extras, Memo
from deltalab.edits.biased_product import BiasedProduct
from deltalab.edits.biased_sign import BiasedSign
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.breadcrumbs import Breadcrumbs
from deltalab.edits.chain import Chain
from deltalab.edits.dare import Dare
from deltalab.edits.della import Della
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.expo import Expo
from deltalab.edits.multibit import Multibit
from deltalab.edits.noise import Noise
from deltalab.edits.sign_flip import SignFlip
from deltalab.edits.ties import Ties
from deltalab.edits.twin import Twin
from deltalab.rng import Rng
from deltalab.weights import shards
from deltalab.weights.mapping import ModelPair

ONE_BIT = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
FUSED = [
    Dare(p=0.3, k=0.0),
    Dare(p=0.9, k=-1),
    DropOnly(p=0.5),
    Expo(alpha=0.3),
    Noise(sigma=0.5),
    SignFlip(fraction=0.2, balanced=True),
    BiasedSign(k=0.5, p=None),
    BiasedProduct(k=0.5, p=None),
    ONE_BIT,
    BitDelta(multiple=1.5, magnitudes="uniform", cv=0.4, axis="tensor"),
    BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="row"),
    BitDelta(multiple=1.5, magnitudes="normal", cv=0.4, axis="row"),
    Chain(steps=[{"dare": {"p": 0.9}}, {"noise": {"sigma": 0.5}}, "expo"]),
]
STREAMED = [
    Dare(p=0.3, k=0.0),
    Expo(alpha=0.3),
    Della(p=0.5, window=0.4),
    Breadcrumbs(beta=0.3, gamma=0.1),
    ONE_BIT,
    BitDelta(multiple=1.5, magnitudes="uniform", cv=0.4, axis="row"),
    Multibit(bits=2, blocks="equal_count"),
    Ties(keep=0.2, scope="model"),
    Ties(keep=0.2, scope="tensor"),
    Twin(rank=2, rate=None),
    Chain(steps=[{"dare": {"p": 0.9}}, "bitdelta"]),
]


def tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("edit", FUSED, ids=str)
def test_compiled_and_eager_give_the_same_bits(edit, dtype: torch.dtype, monkeypatch) -> None:
    """Over several slices, with a ragged tail, denormal and equal entries."""
    monkeypatch.setitem(editing.SLICE, "cpu", 10_000)
    pre = (0.02 * tensor((241, 173))).to(dtype)
    post = (pre.float() + 1e-3 * tensor((241, 173), seed=1)).to(dtype)
    post[0, :50] = pre[0, :50]
    pre[1, :50], post[1, :50] = 1e-40, 3e-40
    needs = {"rng": Rng(3, "w"), "grad": tensor((241, 173), seed=2)}
    needs = {k: v for k, v in needs.items() if k in edit.needs}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        compiled = editing.edited_tensor(pre, post, edit, "compiled", **needs)
    eager = editing.edited_tensor(pre, post, edit, "eager", **needs)
    assert torch.equal(bits(compiled), bits(eager))
    whole = editing._edited(pre, post, edit, needs)
    assert torch.equal(bits(whole), bits(eager)), "slices change the result"


@pytest.mark.parametrize("edit", [*FUSED, *STREAMED], ids=str)
def test_the_order_of_tensors_does_not_matter(edit) -> None:
    pre = {n: tensor((12, 16), seed=i) for i, n in enumerate("abc")}
    post = {n: t + 0.1 * tensor((12, 16), seed=9) for n, t in pre.items()}
    post["b"][:] = pre["b"] + 0.1  # magnitudes tied within and across tensors
    post["c"][:] = pre["c"] - 0.1
    gradient = {n: tensor((12, 16), seed=5) for n in pre}

    def run(names: str) -> dict[str, Tensor]:
        extras = Extras(edit.needs, 7, {"grad": lambda name, _: gradient[name]}, memo=Memo())
        given = ({n: w[n] for n in names} for w in (pre, post))
        return dict(editing.edited(*given, edit, "all", extras))

    forward, backward = run("abc"), run("cba")
    for name in "abc":
        assert torch.equal(forward[name], backward[name])


def test_only_selected_floating_tensors_are_edited() -> None:
    pre = {
        "blocks.0.mlp.fc1.weight": tensor((4, 4)),
        "head.weight": tensor((3, 4)),
        "steps": torch.tensor([1]),
    }
    post = {n: t + 1 for n, t in pre.items()}
    edited = editing.edited(pre, post, Expo(alpha=1.0), "proj", Extras())
    assert list(edited) == ["blocks.0.mlp.fc1.weight"]
    assert "steps" not in editing.edited(pre, post, Expo(alpha=1.0), "all", Extras())


def test_a_missing_need_is_said_before_anything_is_computed() -> None:
    pair = ModelPair({}, {}, torch.nn.Identity())
    with pytest.raises(ValueError, match="needs 'grad'"):
        Extras.of(BiasedProduct(k=0.5, p=None), pair, seed=0)


def test_factorisations_are_shared_over_a_sweep(monkeypatch) -> None:
    from deltalab.apply import extras as module

    calls = []
    original = module.svd
    monkeypatch.setattr(module, "svd", lambda m: calls.append(1) or original(m))
    pair = ModelPair({"w": tensor((9, 9))}, {"w": tensor((9, 9), seed=1)}, torch.nn.Identity())
    for rank in (1, 2, 3):
        edit = Twin(rank=rank, rate=None)
        given = Extras.of(edit, pair, seed=0)
        editing.edited(pair.pre, pair.post, edit, "all", given)["w"]
    assert len(calls) == 1


# --- streamed -------------------------------------------------------------------------------


NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.mlp.up_proj.weight",
]


def write(directory: Path, shift: float, dtype=torch.bfloat16, vocabulary: int = 40) -> None:
    """A checkpoint of two shards with an index and the files that go with it."""
    directory.mkdir()
    shapes = [(vocabulary, 16), (48, 16), (16,), (48, 16)]
    weights = {
        n: (tensor(s, seed=i) + shift * tensor(s, seed=i + 50)).to(dtype)
        for i, (n, s) in enumerate(zip(NAMES, shapes, strict=True))
    }
    weights["steps"] = torch.tensor([int(shift * 100)])
    place = {n: f"model-0000{1 + (i > 1)}-of-00002.safetensors" for i, n in enumerate(weights)}
    for file in sorted(set(place.values())):
        shard = {n: weights[n] for n in weights if place[n] == file}
        save_file(shard, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", "generation_config.json", "tokenizer.model"):
        (directory / name).write_text(name)
    (directory / "pytorch_model.bin").write_text("old weights")


def loaded(directory: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    write(tmp_path / "pre", 0.0)
    write(tmp_path / "post", 0.1)
    return tmp_path / "pre", tmp_path / "post"


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("slice_size", [100, 1 << 22])
@pytest.mark.parametrize("edit", STREAMED, ids=str)
def test_streaming_equals_editing_in_memory(
    edit, slice_size, kernel, pair, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(shards, "SLICE", slice_size)
    stream.stream(*pair, tmp_path / "out", edit, select="matrices", seed=3, kernel=kernel)
    pre, post, out = loaded(pair[0]), loaded(pair[1]), loaded(tmp_path / "out")
    edited = editing.edited(pre, post, edit, "matrices", Extras(edit.needs, 3), "eager")
    assert set(edited) == {n for n in post if post[n].ndim > 1}
    for name, tensor_ in post.items():
        expected = edited.get(name, tensor_)
        assert torch.equal(out[name], expected), name
    assert not torch.equal(out[NAMES[1]], post[NAMES[1]])


def test_the_layout_is_that_of_post(pair, tmp_path) -> None:
    out = tmp_path / "deep" / "out"
    manifest = stream.stream(
        *pair,
        out,
        Dare(p=0.5, k=0.0),
        select="all",
        seed=0,
        describe={"name": "dare", "p": 0.5, "k": 0.0},
    )
    for file in pair[1].glob("*.safetensors"):
        with safe_open(file, "pt") as a, safe_open(out / file.name, "pt") as b:
            assert a.metadata() == b.metadata()
            assert list(a.keys()) == list(b.keys())
            for name in a.keys():  # noqa: SIM118
                assert a.get_slice(name).get_dtype() == b.get_slice(name).get_dtype()
                assert a.get_slice(name).get_shape() == b.get_slice(name).get_shape()
    copied = {"config.json", "tokenizer.json", "generation_config.json", "tokenizer.model"}
    index = "model.safetensors.index.json"
    shards = {f.name for f in pair[1].glob("*.safetensors")}
    assert {f.name for f in out.iterdir()} == copied | shards | {index, "deltalab.json"}
    assert (out / index).read_bytes() == (pair[1] / index).read_bytes()
    assert json.loads((out / "deltalab.json").read_text()) == manifest
    assert manifest["edited"] == {"tensors": 4, "parameters": 40 * 16 + 2 * 48 * 16 + 16}
    assert list(manifest["kept"]) == ["steps"]
    assert manifest["pre"]["digest"] != manifest["post"]["digest"]
    assert [p.name for p in out.parent.iterdir()] == ["out"], "leftovers"


def test_it_refuses_to_overwrite(pair, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"out=.*exists already"):
        stream.stream(*pair, tmp_path / "out", Expo(alpha=0.1), select="all", seed=0)


def test_a_different_vocabulary_is_an_error_unless_told(tmp_path) -> None:
    write(tmp_path / "pre", 0.0, vocabulary=40)
    write(tmp_path / "post", 0.1, vocabulary=44)
    run = lambda out, how: stream.stream(  # noqa: E731
        tmp_path / "pre",
        tmp_path / "post",
        tmp_path / out,
        Expo(alpha=-1.0),
        select="all",
        seed=0,
        mismatch=how,
    )
    message = (
        "tensor 'model.embed_tokens.weight': shape (40, 16) in the pre-trained model, (44, 16)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run("a", "error")
    with pytest.raises(ValueError, match="mismatch=skip: must be one of error, truncate, keep"):
        run("a", "skip")
    assert not (tmp_path / "a").exists()
    run("b", "truncate")
    run("c", "keep_post")
    pre, post = loaded(tmp_path / "pre"), loaded(tmp_path / "post")
    b, c = loaded(tmp_path / "b"), loaded(tmp_path / "c")
    assert torch.equal(b[NAMES[0]][:40], pre[NAMES[0]])
    assert torch.equal(b[NAMES[0]][40:], post[NAMES[0]][40:])
    assert torch.equal(c[NAMES[0]], post[NAMES[0]])
    assert torch.equal(c[NAMES[1]], pre[NAMES[1]])


@pytest.mark.parametrize("side", ["pre", "post"])
def test_a_tensor_on_one_side_is_an_error_unless_told(side: str, tmp_path) -> None:
    for where, shift in (("pre", 0.0), ("post", 0.1)):
        weights = {"a.weight": tensor((4, 4)) + shift}
        if where == side:
            weights["b.weight"] = tensor((4, 4))
        save_file(weights, tmp_path / f"{where}.safetensors")
    files = tmp_path / "pre.safetensors", tmp_path / "post.safetensors"
    with pytest.raises(ValueError, match=f"'b.weight' is in the {side}-trained model only"):
        stream.stream(*files, tmp_path / "x", Expo(alpha=-1.0), select="all", seed=0)
    stream.stream(
        *files, tmp_path / "out", Expo(alpha=-1.0), select="all", seed=0, mismatch="keep_post"
    )
    out = loaded(tmp_path / "out")
    assert set(out) == set(load_file(files[1]))
    assert torch.equal(out["a.weight"], tensor((4, 4)))


@pytest.mark.parametrize("select", ["all", "linear", "matrices"])
@pytest.mark.parametrize("in_pre", [True, False])
def test_tied_weights_stay_tied(select: str, in_pre: bool, tmp_path) -> None:
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    old, new = tensor((30, 8)), tensor((30, 8)) + 0.1 * tensor((30, 8), seed=1)
    save_file({table: old, **({head: old.clone()} if in_pre else {})}, tmp_path / "pre.safetensors")
    save_file({table: new, head: new.clone()}, tmp_path / "post.safetensors")
    stream.stream(
        tmp_path / "pre.safetensors",
        tmp_path / "post.safetensors",
        tmp_path / "out",
        Dare(p=0.5, k=0.0),
        select=select,
        seed=0,
    )
    out = load_file(tmp_path / "out" / "post.safetensors")
    assert torch.equal(out[table], out[head])
    name = head if select == "linear" else table
    expected = editing.edited_tensor(old, new, Dare(p=0.5, k=0.0), rng=Rng(0, name))
    assert torch.equal(out[head], expected)


def test_an_error_on_the_way_leaves_nothing(pair, tmp_path, monkeypatch) -> None:
    def fails(*arguments, **needs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(editing, "edited_tensor", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        stream.stream(*pair, tmp_path / "out", Expo(alpha=0.1), select="all", seed=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["post", "pre"]


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
def test_an_overflow_is_named_and_leaves_nothing(kernel, tmp_path) -> None:
    for directory, value in (("pre", 0.0), ("post", 1.6e4)):
        write(tmp_path / directory, value, dtype=torch.float16)
    places = [tmp_path / name for name in ("pre", "post", "out")]
    with pytest.raises(ValueError, match=r"the edit exceeds float16 in \d+ of"):
        stream.stream(*places, Expo(1.0), select="all", seed=0, kernel=kernel)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_named(pair, tmp_path) -> None:
    file = pair[1] / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        stream.stream(*pair, tmp_path / "out", Expo(alpha=0.1), select="all", seed=0)


KILLED = """
import sys, time
from pathlib import Path
from deltalab.apply import editing as apply, stream
from deltalab.weights import shards
from deltalab.edits.expo import Expo
original = apply.edited_tensor
def slow(*a, **k):
    print("working", flush=True)
    time.sleep(0.5)
    return original(*a, **k)
apply.edited_tensor = slow
pre, post, out = map(Path, sys.argv[1:])
stream.stream(pre, post, out, Expo(alpha=0.5), select="all", seed=0)
"""


def test_killed_at_work_out_is_absent(pair, tmp_path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, (*pair, out))], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    stream.stream(*pair, out, Expo(alpha=0.5), select="all", seed=0)
    assert (out / "deltalab.json").exists()


SLOW = """
import sys, time
import deltalab.save as save
from deltalab.apply import stream
verify = stream._verify
def slow(*arguments):
    print("written", flush=True)
    time.sleep(60)
stream._verify = slow
save.main()
"""


def begun(pair, out: Path) -> subprocess.Popen[str]:
    """Start `deltalab-apply`, and wait until it has written all tensors and not yet renamed."""
    model = ("model=timm_vit", "model.name=any", f"model.pre={pair[0]}", f"model.post={pair[1]}")
    code = [sys.executable, "-c", SLOW, *model, "edit=expo", "select=all", f"out={out}"]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(number: int, pair, tmp_path) -> None:
    out = tmp_path / "new" / "out"
    process = begun(pair, out)
    assert len(list(out.parent.iterdir())) == 2  # the directory, and the lock
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == {signal.SIGINT: 130}.get(number, 143)
    assert err.strip().endswith("; nothing was written")
    assert err.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_what_a_killed_run_leaves_is_named_by_the_next(pair, tmp_path) -> None:
    out = tmp_path / "new" / "out"
    process = begun(pair, out)
    model = ("model=timm_vit", "model.name=any", f"model.pre={pair[0]}", f"model.post={pair[1]}")
    busy = command(*model, "edit=expo", "select=all", f"out={out}")
    assert (busy.returncode, busy.stderr.count("\n")) == (2, 1)
    assert f"{out}: process {process.pid} on " in busy.stderr
    (left,) = (path for path in out.parent.iterdir() if path.is_dir())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (out.parent / ".out.notes").mkdir()  # a person's
    done = command(*model, "edit=expo", "select=all", f"out={out}")
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in left.iterdir())
    told = f"deltalab: {left}: left by a run that was killed, {size / 1e9:.3g} GB; remove it\n"
    assert done.stderr == told
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([left.name, ".out.notes", "out"])


def test_all_is_on_the_disk_before_it_has_its_name(pair, tmp_path, monkeypatch) -> None:
    done, sync, rename = [], os.fsync, os.rename

    def fsync(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def renamed(old, new):
        done.append((str(old), str(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    out = tmp_path / "out"
    stream.stream(*pair, out, Expo(alpha=0.5), select="all", seed=0)
    ((made, new),) = (pair for pair in done if isinstance(pair, tuple))
    before, after = done[: done.index((made, new))], done[done.index((made, new)) + 1 :]
    assert new == str(out)
    assert {made, *(f"{made}/{file.name}" for file in out.iterdir())} <= set(before)
    assert before[-1] == made
    assert str(tmp_path) in after


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deltalab.save", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_manifest_does_not_say_whose_home_it_was_made_in(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = ("model=timm_vit", "model.name=any", "model.pre=~/pre", f"model.post={pair[1]}")
    done = command(*model, "edit=dare", "edit.p=0.5", "out=~/out")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "deltalab.json").read_text())
    assert [manifest[side]["path"] for side in ("pre", "post")] == ["~/pre", "~/post"]


def test_the_command(pair, tmp_path) -> None:
    model = ("model=timm_vit", "model.name=any", f"model.pre={pair[0]}", f"model.post={pair[1]}")
    done = command(*model, "edit=dare", "edit.p=0.9", f"out={tmp_path / 'out'}", "seed=4")
    assert done.returncode == 0, done.stderr
    stream.stream(*pair, tmp_path / "api", Dare(p=0.9, k=0), select="all", seed=4)
    for file in sorted(pair[1].glob("*.safetensors")):
        ours = (tmp_path / "out" / file.name).read_bytes()
        assert ours == (tmp_path / "api" / file.name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "deltalab.json").read_text())
    assert manifest["edit"] == {"name": "dare", "p": 0.9, "k": 0}
    bad = command(*model, "edit=dare", "edit.p=1.9", f"out={tmp_path / 'bad'}")
    assert bad.returncode == 2
    assert "edit.p=1.9: must be in [0, 1)" in bad.stderr
    assert len(bad.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("model", ["mnist_vit", "tiny_llm_small"])
def test_embedded_pairs_are_written_and_packed_alike(model, tmp_path):
    from importlib import import_module

    settings = [f"model={model}", "edit=bitdelta", "values=float16"]
    import_module("deltalab.save").save([*settings, f"out={tmp_path / 'applied'}"])
    import_module("deltalab.delta").run(
        ["pack", *settings, f"out={tmp_path / 'small.safetensors'}"]
    )
    post = next((tmp_path / "applied").glob("*.safetensors"))
    base = zoo_base(model)
    out = tmp_path / "unpacked"
    packed = str(tmp_path / "small.safetensors")
    import_module("deltalab.delta").run(["unpack", packed, f"onto={base}", f"out={out}"])
    assert (tmp_path / "unpacked" / post.name).read_bytes() == post.read_bytes()


def zoo_base(model):
    from deltalab.models.zoo import EmbeddedVit
    from deltalab.models.zoo_llm import EmbeddedLlm

    spec = EmbeddedVit("mnist", "mnist") if model == "mnist_vit" else EmbeddedLlm("small_sft")
    return spec.checkpoints[0]
