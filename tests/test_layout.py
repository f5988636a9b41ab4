"""Checkpoints in every layout: read where they lie, written where their index and loaders look."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltalab.save as save
from deltalab.apply import stream
from deltalab.edits.dare import Dare
from deltalab.edits.expo import Expo
from deltalab.edits.ties import Ties
from deltalab.weights import mapping, shards
from deltalab.weights.contents import of_checkpoint
from deltalab.weights.mapping import Checkpoint

pytestmark = pytest.mark.meaning("layouts of checkpoints")

INDEX = "model.safetensors.index.json"


def tensors(seed, dtype=torch.bfloat16):
    """A tied table and head, a matrix, a vector and integers."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(12, 8, generator=draw).to(dtype)
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.layers.0.mlp.up_proj.weight": torch.randn(6, 8, generator=draw).to(dtype),
        "model.norm.weight": torch.randn(8, generator=draw),
        "steps": torch.tensor([seed, 2]),
    }


def stored(place, held, files=("model.safetensors",)):
    """A checkpoint whose tensors lie in these files in turn, with an index if there are several."""
    names = {name: files[i % len(files)] for i, name in enumerate(held)}
    for file in files:
        part = {n: held[n].clone() for n in held if names[n] == file}
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith((".bin", ".pt")):
            torch.save(part, place / file)
        else:
            save_file(part, place / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = INDEX if files[0].endswith("safetensors") else "pytorch_model.bin.index.json"
        (place / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return place


def streamed(pre, post, out, edit=None, **settings):
    stream.stream(
        pre, post, out, edit or Dare(p=0.5, k=0.0), **{"select": "all", "seed": 3} | settings
    )
    return Checkpoint(out)


def same(found, expected):
    return set(found) == set(expected) and all(
        found[n].dtype == expected[n].dtype and torch.equal(found[n], expected[n]) for n in expected
    )


SAFETENSORS = {
    "one file": ("model.safetensors",),
    "sub-directory": ("shards/w0.safetensors", "shards/w1.safetensors"),
    "equal names": ("a/model.safetensors", "b/model.safetensors", "c.safetensors"),
}
PYTORCH = {
    "one file": ("pytorch_model.bin",),
    "shards": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    "another name": ("weights.pt",),
    "sub-directory": ("a/part.bin", "b/part.bin"),
}


@pytest.mark.parametrize("edit", [Dare(p=0.5, k=0.0), Ties(keep=0.3, scope="model")], ids=str)
@pytest.mark.parametrize("files", [*SAFETENSORS.values(), *PYTORCH.values()], ids=str)
def test_every_layout_gives_the_same_tensors(files, edit, tmp_path, monkeypatch):
    """Over pieces of 10 entries; the expected numbers are those of one file of safetensors."""
    monkeypatch.setattr(shards, "SLICE", 10)
    old, new = tensors(0), tensors(1)
    one = [stored(tmp_path / f"one{i}", held) for i, held in enumerate((old, new))]
    expected = streamed(*one, tmp_path / "expected", edit)
    places = [stored(tmp_path / f"side{i}", held, files) for i, held in enumerate((old, new))]
    out = tmp_path / "out"
    assert same(streamed(*places, out, edit), expected)
    assert not torch.equal(expected["model.norm.weight"], new["model.norm.weight"])
    assert same(streamed(places[0], one[1], tmp_path / "mixed", edit), expected)
    written = {str(f.relative_to(out)) for f in out.rglob("*.safetensors")}
    assert len(written) == len(files)
    if files[0].endswith("safetensors"):
        assert written == set(files)
        for file in files:
            assert (out / file).stat().st_size == (places[1] / file).stat().st_size
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.pt"))
    assert {n for f in written for n in load_file(out / f)} == set(new)


def test_pytorch_files_of_parameters_views_and_shared_memory(tmp_path):
    """As trainers save them: parameters, transposed and shared tensors, under `state_dict`."""
    for i in (0, 1):
        held = tensors(i, torch.float32)
        wide = held["model.layers.0.mlp.up_proj.weight"]
        parts = {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in held.items()}
        parts["lm_head.weight"] = parts["model.embed_tokens.weight"]
        parts["model.layers.0.mlp.up_proj.weight"] = wide.T.contiguous().T
        (tmp_path / f"bin{i}").mkdir()
        torch.save({"state_dict": parts}, tmp_path / f"bin{i}" / "pytorch_model.bin")
        stored(tmp_path / f"safe{i}", held)
    sides = [[tmp_path / f"{kind}{i}" for i in (0, 1)] for kind in ("bin", "safe")]
    assert not any(t.requires_grad for t in Checkpoint(sides[0][0]).values())
    found, expected = (streamed(*paths, tmp_path / f"out of {paths[0].name}") for paths in sides)
    assert same(found, expected)
    assert (tmp_path / "out of bin0" / "model.safetensors").is_file()


def test_transformers_opens_what_was_streamed_from_pytorch_files(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2)
    states = []
    for i in (0, 1):
        torch.manual_seed(i)
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / f"side{i}")
        states.append(model.state_dict())
        (tmp_path / f"side{i}" / "model.safetensors").unlink()
        stored(tmp_path / f"side{i}", model.state_dict(), PYTORCH["shards"])
    streamed(tmp_path / "side0", tmp_path / "side1", tmp_path / "out", Expo(alpha=1.0))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in opened.state_dict().items():
        pre, post = (state[name] for state in states)
        assert torch.equal(tensor, pre + 2 * (post - pre)), name


def test_an_index_is_a_checkpoint_too(tmp_path):
    """Named by its index, it is written with its index: else its shards could not be opened."""
    places = [stored(tmp_path / f"{i}", tensors(i), SAFETENSORS["sub-directory"]) for i in (0, 1)]
    whole = streamed(*places, tmp_path / "whole")
    assert same(streamed(*(place / INDEX for place in places), tmp_path / "out"), whole)


def test_a_sub_directory_of_a_hub_snapshot(tmp_path):
    """Its links lead into the blobs of the same repository, and of no other."""
    plain = stored(tmp_path / "plain", tensors(0))
    blobs = tmp_path / "models--a--b" / "blobs"
    inner = tmp_path / "models--a--b" / "snapshots" / "c0ffee" / "checkpoints" / "checkpoint-500"
    for place in (blobs, inner):
        place.mkdir(parents=True)
    shutil.copy(plain / "model.safetensors", blobs / "0")
    link = inner / "model.safetensors"
    link.symlink_to("../../../../blobs/0")
    assert same(Checkpoint(inner), Checkpoint(plain))
    assert of_checkpoint(inner) == of_checkpoint(plain)
    for elsewhere in (tmp_path / "blobs" / "0", plain / "model.safetensors"):
        elsewhere.parent.mkdir(exist_ok=True)
        shutil.copy(blobs / "0", elsewhere) if not elsewhere.exists() else None
        link.unlink()
        link.symlink_to(elsewhere)
        with pytest.raises(ValueError, match="a link out of its directory"):
            Checkpoint(inner)


def test_further_chat_templates_are_copied(tmp_path):
    places = [stored(tmp_path / f"{i}", tensors(i)) for i in (0, 1)]
    (places[1] / "additional_chat_templates").mkdir()
    (places[1] / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (places[1] / "chat_template.jinja").write_text("{{ messages }}")
    streamed(*places, tmp_path / "out")
    for name, text in (
        ("additional_chat_templates/tool_use", "tools"),
        ("chat_template", "messages"),
    ):
        assert (tmp_path / "out" / f"{name}.jinja").read_text() == f"{{{{ {text} }}}}"


EDITS = [Dare(p=0.5, k=0.0), Ties(keep=0.5, scope="model"), Ties(keep=0.5, scope="tensor")]


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_are_none_are_told_as_such(side, bad, edit, kernel, tmp_path):
    """An edit that drops a NaN of the post-trained model would leave the base's entry, unseen."""
    for seed in range(4):
        held = [tensors(0), tensors(1)]
        broken = held[side]["model.layers.0.mlp.up_proj.weight"]
        broken.view(-1)[torch.randperm(48)[:2]] = bad
        places = [stored(tmp_path / f"{i}", h) for i, h in enumerate(held)]
        name = ("pre", "post")[side]
        with pytest.raises(
            ValueError,
            match=rf"up_proj\.weight': NaN or infinite entries, 2 in the {name}-trained model$",
        ):
            streamed(*places, tmp_path / "out", edit, seed=seed, kernel=kernel)
    assert not (tmp_path / "out").exists()


def test_zeros_in_their_place_are_not_promised(tmp_path):
    places = [stored(tmp_path / f"{i}", tensors(i)) for i in (0, 1)]
    sides = [f"model.{name}={place}" for name, place in zip(("pre", "post"), places, strict=True)]
    with pytest.raises(ValueError, match="nonfinite=zero: deltalab-apply writes no numbers"):
        save.save(["model=hf_llm", *sides, f"out={tmp_path / 'out'}", "nonfinite=zero"])


def test_running_statistics_stay_those_of_the_post_trained_model(tmp_path):
    """Extrapolated by alpha = 1, a variance of 0.1 from 1 would be -0.8."""
    for i, value in enumerate((1.0, 0.1)):
        held = {"bn.weight": torch.full((3,), value), "bn.running_var": torch.full((3,), value)}
        stored(tmp_path / f"{i}", held)
    found = streamed(tmp_path / "0", tmp_path / "1", tmp_path / "out", Expo(alpha=1.0))
    assert found["bn.weight"].tolist() == pytest.approx([-0.8] * 3)
    assert found["bn.running_var"].tolist() == pytest.approx([0.1] * 3)


def test_what_is_open_stays_a_mapping_of_tensors(tmp_path):
    held = tensors(0)
    opened = Checkpoint(stored(tmp_path, held, PYTORCH["sub-directory"]))
    assert {n: mapping.meta(opened, n).shape for n in opened} == {
        n: tuple(t.shape) for n, t in held.items()
    }
