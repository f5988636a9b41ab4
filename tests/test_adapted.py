"""LoRA adapters as the tuned model: what PEFT merges, live and from disk to disk."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import llama
from test_packs import given, refused

from deltalab import checkpoints, delta, keys, save
from deltalab.models.hf_llm import HfPair
from deltalab.save import save as write
from deltalab.weights import contents

__all__ = ["llama"]
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 3, "model.layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 24},
    },
    "dora": {"use_dora": True},
    "extras": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
}


def adapter(base: Path, place: Path, transformers, dtype=torch.float32, **settings) -> dict:
    """Write an adapter with numbers in all its tensors; return what PEFT merges it to.

    In float64 where the base has float32, whose last unit or two PEFT's own sums lose.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **{**targets, **settings})
    load = transformers.LlamaForCausalLM.from_pretrained
    model = peft.get_peft_model(load(base, dtype=dtype), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                size = 0.5 * weight.abs() if "magnitude" in name else 0.1
                weight += size * torch.randn_like(weight)
    model.save_pretrained(place)
    read = peft.PeftModel.from_pretrained(load(base, dtype=dtype), place)
    found = (read.double() if dtype == torch.float32 else read).merge_and_unload()
    return {name: tensor.detach() for name, tensor in found.state_dict().items()}


def near(one: torch.Tensor, other: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether two merges differ by one unit of storage at most, of the largest number involved."""
    assert one.dtype == before.dtype
    wide = [t.double() for t in (one, other, before, one.double() - before.double())]
    most = torch.stack([t.abs() for t in wide]).amax(0)
    unit = torch.finfo(one.dtype).eps * 2.0 ** most.log2().floor()
    return bool(((wide[0] - wide[1]).abs() <= unit).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_merges(kind: str, dtype, llama, tmp_path: Path) -> None:
    base, _, transformers = llama
    if dtype != torch.float32:
        narrow = {n: t.to(dtype) for n, t in load_file(base / "model.safetensors").items()}
        save_file(narrow, base / "model.safetensors", {"format": "pt"})
    wanted = adapter(base, tmp_path / "lora", transformers, dtype, **KINDS[kind])
    found = checkpoints.opened(tmp_path / "lora", "model.post", onto=base)
    before = load_file(base / "model.safetensors")
    assert found.keys() == before.keys()
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert changed, "the adapter changes something"
    for name in found:
        assert near(found[name], wanted[name], before[name]), name
        assert name in changed or torch.equal(wanted[name].to(dtype), before[name]), name
        count = found[name].numel()
        cut = [found.part(name, a, min(a + 77, count)) for a in range(0, count, 77)]
        assert torch.equal(torch.cat(cut), found[name].reshape(-1)), name


def test_apply_and_pack_take_it_as_a_checkpoint(llama, tmp_path: Path) -> None:
    """Edited, packed and unpacked like the model that it merges to, with the base's files."""
    base, _, transformers = llama
    wanted = adapter(base, tmp_path / "lora", transformers, use_dora=True, modules_to_save=["norm"])
    args = given(base, tmp_path / "lora", "edit=keep")
    write([*args, f"out={tmp_path}/kept"])
    kept, before = (load_file(p / "model.safetensors") for p in (tmp_path / "kept", base))
    for name, tensor in kept.items():
        assert near(tensor, wanted[name], before[name]), name
    files = {file.name for file in (tmp_path / "kept").iterdir()}
    assert {"config.json", "generation_config.json"} <= files
    assert not {file for file in files if file.startswith("adapter_")}
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "kept")
    for edit in (["edit=dare", "edit.p=.5"], ["edit=bitdelta"]):
        args, stem = given(base, tmp_path / "lora", *edit), tmp_path / edit[0][5:]
        write([*args, f"out={stem}.applied"])
        delta.run(["pack", *args, f"out={stem}.safetensors"])
        delta.run(["unpack", f"{stem}.safetensors", f"onto={base}", f"out={stem}.unpacked"])
        one, other = (
            Path(f"{stem}.{way}") / "model.safetensors" for way in ("applied", "unpacked")
        )
        assert one.read_bytes() == other.read_bytes()
        args = given(base, tmp_path / "kept", *edit)
        write([*args, f"out={stem}.merged"])
        again = load_file(Path(f"{stem}.merged") / "model.safetensors")
        assert all(torch.equal(t, again[n]) for n, t in load_file(one).items())


def test_apply_says_that_it_is_one_and_takes_no_mismatch(
    llama, tmp_path, monkeypatch, capsys
) -> None:
    """An adapter has its base's tensors: there is nothing to keep or to cut."""
    base, _, transformers = llama
    adapter(base, tmp_path / "lora", transformers)
    args = ["deltalab-apply", *given(base, tmp_path / "lora", "edit=keep"), f"out={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", [*args, "mismatch=keep_post"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        save.main()
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert f"mismatch=keep_post: model.post={tmp_path}/lora is an adapter" in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", args)
    save.main()
    assert "model.post is an adapter: put onto model.pre" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "deltalab.json").read_text())
    assert manifest["post"]["adapter"] is True


def test_live_it_is_the_merged_model(llama, tmp_path: Path, monkeypatch) -> None:
    """The base's configuration, dtype and tokenizer; the key tells adapters and dtypes apart."""
    base, _, transformers = llama
    wanted = adapter(base, tmp_path / "lora", transformers)
    monkeypatch.setattr("deltalab.models.vocabulary.beyond", lambda *_: None)
    monkeypatch.setattr("deltalab.models.hf_llm.vocabulary.has_tokenizer", lambda *_: False)
    spec = HfPair(str(base), str(tmp_path / "lora"), device="cpu")
    monkeypatch.setattr(
        "deltalab.models.hf_llm._encoder", lambda *_: type("E", (), {"tokenizer": None})()
    )
    pair = spec.open()
    before = load_file(base / "model.safetensors")
    for name, tensor in pair.module.state_dict().items():
        assert near(tensor, wanted[name], before[name]), name
    assert {tensor.device.type for tensor in spec.skeleton().parameters()} == {"meta"}
    node = {
        "_target_": "deltalab.models.hf_llm.HfPair", "pre": str(base),
        "post": str(tmp_path / "lora"), "dtype": "auto",
    }  # fmt: skip
    first = keys.node(node, "model", False)
    assert first["dtype"] == "float32"
    config = json.loads((tmp_path / "lora" / contents.ADAPTER).read_text())
    config["lora_alpha"] = 7
    (tmp_path / "lora" / contents.ADAPTER).write_text(json.dumps(config))
    assert keys.node(node, "model", True)["post"] != first["post"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA', must be LORA"),
        ({"init_lora_weights": "pissa"}, "'pissa' goes with a base of its own"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]] is not known"),
        ({"r": 5}, "are not of rank 5"),
        ({"lora_alpha": "much"}, "lora_alpha='much' of 'model.layers.0.mlp.down_proj'"),
        ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern has '(a+)+b', which is no name"),
        ({"use_dora": True}, "and use_dora do not fit"),
        ({"fan_in_fan_out": True}, "in model.pre 'model.layers.0.mlp.down_proj.weight' has"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_named(changes, says, llama, tmp_path, monkeypatch, capsys) -> None:
    base, _, transformers = llama
    adapter(base, tmp_path / "lora", transformers)
    capsys.readouterr()
    file = tmp_path / "lora" / contents.ADAPTER
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    arguments = given(base, tmp_path / "lora", "edit=keep")
    said = refused(
        ["pack", *arguments, f"out={tmp_path}/x.safetensors"], monkeypatch, capsys, tmp_path
    )
    assert says in said
    assert f"model.post={tmp_path}/lora: an adapter that cannot be read" in said


def test_tensors_of_another_model_are_named(llama, tmp_path, monkeypatch, capsys) -> None:
    base, _, transformers = llama
    adapter(base, tmp_path / "lora", transformers)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    held = load_file(file)
    capsys.readouterr()
    for name, tensor, says in (
        ("base_model.model.other.weight", torch.ones(2), "'other.weight', which model.pre lacks"),
        ("base_model.model.lm_head.weight", torch.ones(51, 16), "is for one of shape (51, 16)"),
        ("model.norm.weight", torch.ones(16), "is none of a LoRA adapter's"),
        ("base_model.model.lm_head.lora_A.weight", torch.ones(4, 16), "has lora_A"),
    ):
        save_file({**held, name: tensor}, file)
        arguments = [*given(base, tmp_path / "lora", "edit=keep"), f"out={tmp_path}/x.safetensors"]
        assert says in refused(["pack", *arguments], monkeypatch, capsys, tmp_path)
