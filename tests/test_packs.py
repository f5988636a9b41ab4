"""Packed deltas: what unpacks is what `deltalab-apply` writes, and what is damaged is refused."""

import errno
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltalab import delta
from deltalab.packing import files, packs
from deltalab.save import save as write

SHAPES = {
    "model.embed_tokens.weight": (60, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.mlp.conv.weight": (4, 3, 2, 2),
    "model.norm.weight": (16,),
    "lm_head.weight": (60, 16),
    "model.empty": (0, 4),
}
EDITS = [
    ["edit=dare", "edit.p=.9"],
    ["edit=dare", "select=matrices", "values=float16"],
    ["edit=drop_only"],
    ["edit=bitdelta", "select=all"],
    ["edit=bitdelta", "edit.axis=row", "select=all"],
    ["edit=bitdelta", "edit.axis=column"],
    ["edit=ties", "select=all"],
    ["edit=twin", "edit.rate=null", "edit.rank=2"],
    ["edit=multibit"],
    ["edit=della"],
    ["edit=breadcrumbs"],
    ["edit=keep"],
    ["edit=discard", "select=all"],
    ["edit=chain", "edit.steps=[bitdelta,{dare: {p: .9}}]"],
]


def put(place: Path, weights, companions, parts: int) -> Path:
    place.mkdir()
    names = list(weights)
    if parts == 1:
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    else:
        where = {
            n: f"model-{1 + i % parts:05d}-of-{parts:05d}.safetensors" for i, n in enumerate(names)
        }
        for file in sorted(set(where.values())):
            save_file({n: weights[n] for n in names if where[n] == file}, place / file)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for name, text in companions.items():
        (place / name).write_text(text)
    return place


def pair(root: Path, dtype=torch.bfloat16, parts=1, rows=60, seed=0) -> tuple[Path, Path]:
    """Two checkpoints on disk: of the second some tensors are as in the first, and some new."""
    generator = torch.Generator().manual_seed(seed)
    pre = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    post = {
        n: (t.float() + 0.02 * torch.randn(t.shape, generator=generator)).to(dtype)
        for n, t in pre.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        post[name] = post[name].repeat(2, 1)[:rows].clone()
    pre["rope.steps"], post["rope.steps"] = torch.arange(7), torch.arange(7)
    pre["rope.mask"], post["rope.mask"] = (
        torch.ones(3, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
    )
    post["model.norm.weight"] = pre["model.norm.weight"].clone()
    said = {"config.json": '{"model_type": "llama"}', "vocab.json": '{"a": 1}'}
    one = put(root / "base", pre, said, 1)
    return one, put(
        root / "tuned", post, {**said, "vocab.json": '{"b": 1}', "new.txt": "x" * 99}, parts
    )


def given(base: Path, tuned: Path, *edit: str) -> list[str]:
    return ["model=hf_llm", f"model.pre={base}", f"model.post={tuned}", *edit]


CARDS = ("README.md", "SHA256SUMS")
"""What deltalab-apply writes beside a checkpoint, and a file of codes does not give."""


def contents_of(place: Path) -> dict[str, bytes]:
    return {
        f.relative_to(place).as_posix(): f.read_bytes()
        for f in place.rglob("*")
        if f.is_file() and f.name not in CARDS and f.name != "deltalab.json"
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("packed")
    base, tuned = pair(root)
    delta.run(["pack", *given(base, tuned, "edit=dare"), f"out={root}/delta.safetensors"])
    return base, tuned, root / "delta.safetensors"


@pytest.mark.parametrize("edit", EDITS, ids=" ".join)
def test_what_unpacks_is_what_apply_writes(edit: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packs, "_PART", 100)  # parts, also of small tensors
    base, tuned = pair(tmp_path, parts=2)
    file = tmp_path / "delta.safetensors"
    (line,) = delta.run(["pack", *given(base, tuned, *edit), f"out={file}"])
    assert f"{file.stat().st_size:,} bytes" in line
    delta.run(["unpack", str(file), f"onto={base}", f"out={tmp_path}/out"])
    write([*given(base, tuned, *edit), f"out={tmp_path}/applied"])
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "applied")
    assert delta.run(["verify", str(file), f"onto={base}"])
    told = files.Packed(file).about
    assert told["edit"]["name"] == edit[0].removeprefix("edit=")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_types_and_larger_vocabularies(dtype, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, dtype, rows=70)
    file, edit = tmp_path / "delta.safetensors", ["edit=bitdelta", "select=all"]
    with pytest.raises(ValueError, match="see mismatch=truncate"):
        delta.run(["pack", *given(base, tuned, *edit), f"out={file}"])
    for mismatch in ("truncate", "keep_post"):
        more = [*given(base, tuned, *edit), f"mismatch={mismatch}"]
        delta.run(["pack", *more, f"out={file}"])
        delta.run(["unpack", str(file), f"onto={base}", f"out={tmp_path}/{mismatch}"])
        write([*more, f"out={tmp_path}/applied {mismatch}"])
        assert contents_of(tmp_path / mismatch) == contents_of(tmp_path / f"applied {mismatch}")
        file.unlink()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_several_deltas_share_a_base_that_lies_beside_them(packed, tmp_path: Path) -> None:
    base, tuned, _ = packed
    (tmp_path / "base").symlink_to(base)
    for edit in ("dare", "bitdelta"):
        delta.run(
            ["pack", *given(base, tuned, f"edit={edit}"), f"out={tmp_path}/{edit}.safetensors"]
        )
    lines = delta.run(["inspect", str(tmp_path)])
    assert [line.split(":")[0] for line in lines] == ["bitdelta.safetensors", "dare.safetensors"]
    assert len({line.rpartition(" ")[2] for line in lines}) == 1
    for edit in ("dare", "bitdelta"):
        delta.run(["unpack", f"{tmp_path}/{edit}.safetensors", f"out={tmp_path}/{edit}"])
    assert contents_of(tmp_path / "dare") != contents_of(tmp_path / "bitdelta")
    (tmp_path / "base").unlink()
    with pytest.raises(ValueError, match="onto=: no checkpoint beside"):
        delta.run(["unpack", f"{tmp_path}/dare.safetensors", f"out={tmp_path}/again"])


def test_the_file_is_plain_and_as_large_as_it_says(packed) -> None:
    file = packed[2]
    told, arrays = files.Packed(file).about, load_file(file)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["about"])["base"] == told["base"]
    bits = told["bits"]["payload"] + told["bits"]["metadata"]
    beside = sum(a.numel() for name, a in arrays.items() if name.startswith("/"))
    assert abs(file.stat().st_size - beside - bits / 8) <= 0.05 * bits / 8 + 4096
    assert "dare p=0.5 k=0" in delta.run(["inspect", str(file)])[0]
    assert told["seed"] == 0


def test_threads_do_not_matter(packed, tmp_path: Path) -> None:
    base, tuned, file = packed
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        delta.run(["pack", *given(base, tuned, "edit=dare"), f"out={tmp_path}/again.safetensors"])
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def refused(arguments: list[str], monkeypatch, capsys, root: Path) -> str:
    """Run the command; nothing new may lie in the directory, and one line says why."""
    before = sorted(root.iterdir())
    monkeypatch.setattr(sys, "argv", ["deltalab-delta", *arguments])
    with pytest.raises(SystemExit) as error:
        delta.main()
    assert error.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith("deltalab: ")
    assert sorted(root.iterdir()) == before
    return said


def test_every_flipped_bit_is_found(packed, tmp_path: Path) -> None:
    """In arrays, names, offsets, digests and what is said of the whole, at 150 places."""
    file = packed[2]
    data, rng = file.read_bytes(), random.Random(0)
    bad = tmp_path / "bad.safetensors"
    for place in [*range(0, 40), *rng.sample(range(len(data)), 110)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        if bytes(flipped).replace(b"\t", b" ") == data:
            continue
        bad.write_bytes(flipped)
        with pytest.raises((ValueError, FileNotFoundError)):
            packs.verify(bad)


def test_a_cut_file_is_refused_and_nothing_is_left(packed, tmp_path, monkeypatch, capsys) -> None:
    base, _, file = packed
    data, bad = file.read_bytes(), tmp_path / "bad.safetensors"
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        for command in (["verify"], ["unpack", f"onto={base}", f"out={tmp_path}/out"]):
            said = refused([command[0], str(bad), *command[1:]], monkeypatch, capsys, tmp_path)
            assert "bad.safetensors" in said


def test_another_base_is_refused(packed, tmp_path, monkeypatch, capsys) -> None:
    """One of equal shapes, one that lacks a tensor, one whose tokenizer was changed."""
    base, _, file = packed
    other, _ = pair(tmp_path, seed=1)
    for path, reason in ((other, "another base: its digest is"), (file, "another base: tensor")):
        arguments = ["unpack", str(file), f"onto={path}", f"out={tmp_path}/out"]
        assert reason in refused(arguments, monkeypatch, capsys, tmp_path)
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((base / name).read_bytes() + b" " * (name == "config.json"))
    arguments = ["unpack", str(file), f"onto={other}", f"out={tmp_path}/out"]
    assert "its 'config.json' is not" in refused(arguments, monkeypatch, capsys, tmp_path)
    assert "another base" in refused(
        ["verify", str(file), f"onto={tmp_path}/tuned"], monkeypatch, capsys, tmp_path
    )


@pytest.mark.parametrize("where", ["sendfile", "truncate"])
def test_a_full_disk_leaves_nothing(where: str, packed, tmp_path, monkeypatch, capsys) -> None:
    base, tuned, file = packed

    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    arguments = ["unpack", str(file), f"onto={base}", f"out={tmp_path}/out"]
    if where == "sendfile":
        arguments = ["pack", *given(base, tuned, "edit=dare"), f"out={tmp_path}/full.safetensors"]
    assert "no space left on device" in refused(arguments, monkeypatch, capsys, tmp_path)


def test_mistakes_are_one_line(packed, tmp_path, monkeypatch, capsys) -> None:
    base, tuned, file = packed
    pack = ["pack", *given(base, tuned)]
    for arguments, reason in (
        (["unzip"], "unzip: must be one of pack, unpack, inspect, verify"),
        (["verify"], "no file: must be one file, as FILE onto="),
        (["verify", f"{tmp_path}/none.safetensors"], "no such file"),
        (["verify", f"{tuned}/model.safetensors"], "holds no codes"),
        ([*pack, "edit=dare"], "out=: name a path"),
        ([*pack, "edit=dare", f"out={tmp_path}/x.bin"], "must end in .safetensors"),
        ([*pack, "edit=dare", f"out={file}"], "exists already"),
        (
            [*pack, "edit=expo", f"out={tmp_path}/x.safetensors"],
            "edit Expo with these settings has",
        ),
        (
            [*pack, "edit=dare", "edit.k=-1", f"out={tmp_path}/x.safetensors"],
            "edit Dare with these",
        ),
        (["unpack", str(file), f"onto={base}"], "out=: name a path"),
        (["unpack", str(file), f"onto={base}", f"out={tmp_path}"], "exists already"),
    ):
        assert reason in refused(arguments, monkeypatch, capsys, tmp_path)


def test_what_a_record_measured_stands_in_the_file(packed, tmp_path: Path) -> None:
    base, tuned, _ = packed
    record = {
        "schema": 1, "status": "ok", "key": "0a", "model": "m", "seed": 0, "seconds": {"total": 1},
        "edit": {"name": "dare", "p": 0.5, "k": 0}, "loss": {"change": 0.25, "error": 0.1},
        "pair": {"objective": "plain"},
    }  # fmt: skip
    held, pack = (
        tmp_path / "r.json",
        ["pack", *given(base, tuned, "edit=dare"), f"record={tmp_path}/r.json"],
    )
    held.write_text(json.dumps(record))
    delta.run([*pack, f"out={tmp_path}/one.safetensors"])
    assert "measured change +0.25 on plain" in delta.run(["inspect", f"{tmp_path}/one.safetensors"])
    for change in (
        {"seed": 1},
        {"edit": {"name": "dare", "p": 0.9, "k": 0}},
        {"edit": {"name": "ties"}},
    ):
        held.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=f"record={re.escape(str(held))}: of"):
            delta.run([*pack, f"out={tmp_path}/two.safetensors"])


def rewritten(file: Path, out: Path, change) -> Path:
    """The same file with other texts, whose digest is right again."""
    packed = files.Packed(file)
    about, codes = dict(packed.about), json.loads(json.dumps(packed.codes))
    for part in (part for said in codes.values() for part in said["parts"]):
        part["digest"] = "any"
    change(about, codes)
    with files.Writer(out) as writer:
        writer._codes = codes
        for name in packed.entries:
            writer.array(name, packed.array(name))
        version = about.pop("version"), about.pop("format")
        files.VERSION, before = version[0], files.VERSION
        try:
            writer.finish(about)
        finally:
            files.VERSION = before
    return out


def test_a_file_made_to_do_harm_does_none(packed, tmp_path, monkeypatch, capsys) -> None:
    """Digests that are right say nothing of who wrote it."""
    base, _, file = packed
    name = "model.layers.0.self_attn.q_proj.weight"

    def at(change):
        out = tmp_path / "bad.safetensors"
        out.unlink(missing_ok=True)
        rewritten(file, out, change)
        return refused(
            ["unpack", str(out), f"onto={base}", f"out={tmp_path}/out"],
            monkeypatch,
            capsys,
            tmp_path,
        )

    monkeypatch.setattr(files, "digest_of", lambda described, arrays: "any")
    for path in ("../out.safetensors", "/tmp/x.safetensors", "a/../../b", ".git/config"):
        assert "leads out" in at(lambda about, codes, p=path: about["files"][0].update(name=p))
        assert "leads out" in at(lambda about, codes, p=path: about["beside"][-1].update(name=p))
    assert "has no place" in at(
        lambda about, codes: about["beside"][-1].update(name="modeling.py", at=0)
    )
    assert "of version 2, this deltalab reads 1" in at(lambda about, codes: about.update(version=2))

    def parts(change):
        return at(lambda about, codes: change(codes[name]["parts"][0]))

    assert "damaged: parts of" in parts(lambda part: part.update(start=2))
    assert "damaged: parts of" in parts(lambda part: part["code"].update(shape=[1 << 40]))
    assert "must be one of raw" in parts(lambda part: part["code"].update(kind="os"))
    assert "setting p" in parts(lambda part: part["code"].update(p="x"))
