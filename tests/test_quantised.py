"""Weights that are codes: every path refuses them before anything is edited or written."""

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import save_file

import deltalab.save as save
from deltalab import checkpoints, cli
from deltalab.checkpoints import quantised
from deltalab.weights.mapping import Checkpoint

pytestmark = pytest.mark.meaning("quantised checkpoints")

STEM = "model.layers.0.mlp.up_proj."
U8, I8, I32 = torch.uint8, torch.int8, torch.int32
F8 = torch.float8_e4m3fn


def whole(dtype, *shape):
    return torch.ones(shape).to(dtype)


KINDS = {
    "gptq": {
        "qweight": whole(I32, 4, 16), "qzeros": whole(I32, 1, 2), "g_idx": whole(I32, 32),
        "scales": torch.ones(1, 16).half(),
    },
    "awq": {
        "qweight": whole(I32, 32, 2), "qzeros": whole(I32, 1, 2),
        "scales": torch.ones(1, 16).half(),
    },
    "fp8": {"weight": whole(F8, 16, 16), "weight_scale_inv": torch.ones(1, 1)},
    "compressed-tensors": {
        "weight_packed": whole(I32, 16, 4), "weight_scale": torch.ones(16, 1).bfloat16(),
        "weight_shape": torch.tensor([16, 32]),
    },
    "int8": {"weight": whole(I8, 16, 32), "weight_scale": torch.ones(16, 1)},
    "bitsandbytes": {
        "weight": whole(U8, 256, 1), "weight.absmax": torch.ones(8),
        "weight.quant_map": torch.ones(16),
        "weight.quant_state.bitsandbytes__nf4": whole(U8, 30),
    },
    "llm.int8": {"weight": whole(I8, 16, 32), "SCB": torch.ones(16)},
    "nvfp4": {
        "weight": whole(U8, 16, 16), "weight_scale": whole(F8, 16, 2),
        "weight_scale_2": torch.tensor(1.0), "input_scale": torch.tensor(1.0),
    },
    "nvfp4-packed": {
        "weight_packed": whole(U8, 16, 16), "weight_scale": whole(F8, 16, 2),
        "weight_global_scale": torch.ones(1),
    },
    "mxfp4": {
        "experts.up_proj_blocks": whole(U8, 2, 8, 1, 16),
        "experts.up_proj_scales": whole(U8, 2, 8, 1),
    },
    "hqq": {"W_q": whole(U8, 8, 32), "scale": torch.ones(16, 1), "zero": torch.ones(16, 1)},
    "quanto": {"weight._data": whole(I8, 16, 32), "weight._scale": torch.ones(16, 1)},
    "aqlm": {"codes": whole(torch.int16, 4, 4, 1), "codebooks": torch.ones(1, 8, 1, 8)},
    "cast": {"weight": whole(F8, 16, 16)},
}  # fmt: skip
"""What each method stores in place of one matrix."""


def write(place, kind, config=False):
    """A checkpoint of one quantised matrix and one norm; with or without its configuration."""
    place.mkdir()
    tensors = {STEM + name: tensor for name, tensor in KINDS[kind].items()}
    save_file({**tensors, "model.norm.weight": torch.rand(8)}, place / "model.safetensors")
    content = {"model_type": "llama"}
    if config:
        content["quantization_config"] = {"quant_method": kind}
    (place / "config.json").write_text(json.dumps(content))
    return place


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs a command in this process and returns exit code and message."""

    def call(program, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["deltalab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            program.main()
        return end.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [True, False], ids=["config", "tensors"])
def test_no_scales_are_edited(kind, config, run, tmp_path):
    pre, post = (write(tmp_path / side, kind, config) for side in ("pre", "post"))
    sides = "model=hf_llm", f"model.pre={pre}", f"model.post={post}"
    for program, more in ((save, [f"out={tmp_path / 'out'}"]), (cli, ["plan=true", "data.path=x"])):
        code, said = run(program, *sides, "edit=expo", *more)
        named = f"quantization_config in config.json ({kind})" if config else f"tensor '{STEM}"
        assert code == 2
        assert f"model.pre={pre}: its weights are quantised" in said
        assert named in said
        assert len(said.splitlines()) == 1
    assert sorted(f.name for f in tmp_path.iterdir() if f.name != "results") == ["post", "pre"]


@pytest.mark.parametrize("side", ["pre", "post"])
def test_either_side_is_looked_at(side, run, tmp_path):
    paths = {side: write(tmp_path / side, "gptq")}
    other = paths["post" if side == "pre" else "pre"] = tmp_path / "whole"
    other.mkdir()
    save_file({"model.norm.weight": torch.ones(8)}, other / "model.safetensors")
    arguments = [f"model.{name}={path}" for name, path in paths.items()]
    code, said = run(save, "model=hf_llm", *arguments, "edit=expo", "out=x", "mismatch=keep_post")
    assert code == 2
    assert f"model.{side}={paths[side]}: its weights are quantised" in said


def test_image_models_too(run, tmp_path):
    import timm

    state = timm.create_model("resnet10t", num_classes=2).state_dict()
    state["fc.weight"] = state["fc.weight"].to(F8)
    save_file(state, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    arguments = "model=timm_vit", "model.name=resnet10t", f"model.pre={path}", f"model.post={path}"
    for more in ([], ["plan=true"]):
        code, said = run(cli, *arguments, f"data.dir={tmp_path}", "edit=expo", *more)
        assert code == 2
        assert "its weights are quantised (tensor 'fc.weight' of dtype F8_E4M3)" in said


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "awq"}}}),
        ("config.json", {"compression_config": {"format": "pack-quantized"}}),
        ("quantize_config.json", {"bits": 4}),
        ("quant_config.json", {"w_bit": 4}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}),
    ],
)
def test_wherever_it_is_declared(file, content, tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert quantised.sign(Checkpoint(path)) is None
    (tmp_path / file).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=rf"model\.pre=.*quantised \(.*{file}"):
            checkpoints.opened(path, "model.pre")


def test_integers_that_are_no_codes_pass(tmp_path):
    import timm

    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=2)
    tables = {
        "h.0.attn.bias": whole(U8, 1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4),
        "position_ids": whole(I32, 1, 8), "bn.num_batches_tracked": torch.tensor(3),
        "mask": whole(torch.bool, 4, 4), "logit_scale": torch.tensor(4.6), "empty": whole(F8),
        "layer_scale.weight": torch.ones(4), "ids.weight": torch.ones(2, 2).long(),
    }  # fmt: skip
    for state in (swin.state_dict(), tables):
        save_file(state, tmp_path / "model.safetensors")
        checkpoints.opened(tmp_path, "model.pre")


def test_adapters_are_called_that(run, tmp_path, caplog):
    stem = "base_model.model.model.layers.0.self_attn.q_proj."
    held = {stem + "lora_A.weight": torch.ones(2, 8), stem + "lora_B.weight": torch.ones(8, 2)}
    adapter, pre = tmp_path / "adapter", tmp_path / "pre"
    for place in (adapter, pre):
        place.mkdir()
    save_file({"model.norm.weight": torch.ones(8)}, pre / "model.safetensors")
    save_file(held, adapter / "adapter_model.safetensors")
    for config in (False, True):
        if config:
            (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        for post in (adapter, adapter / "adapter_model.safetensors"):
            for more in ([], ["mismatch=keep_post"]):
                code, said = run(
                    save, "model=hf_llm", f"model.pre={pre}", f"model.post={post}", "out=x", *more
                )
                assert code == 2
                read = post.is_dir() and config  # that it is one of LoRA is all that it says
                why = (
                    ": an adapter that cannot be read: r=None" if read else ": an adapter; merge it"
                )
                why = " is an adapter, which is put onto model.pre" if read and more else why
                assert f"model.post={post}{why}" in said
                assert len(said.splitlines()) == 1
    with caplog.at_level(logging.WARNING):
        (pre / "adapter_config.json").write_text("{}")
        checkpoints.opened(pre, "model.pre")
    assert "there is an adapter beside the model, which is not applied" in caplog.text
