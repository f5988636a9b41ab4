"""Selections on the names of timm's vision transformers and of Hugging Face's models."""

import re

import pytest
import torch

from deltalab.weights.select import PRESETS, Selection, check, selected

# name, shape, the presets beside `all` that select it
CASES = [
    ("blocks.0.attn.qkv.weight", (36, 12), "matrices linear proj no_embed"),
    ("blocks.0.attn.qkv.bias", (36,), "no_embed"),
    ("blocks.0.attn.proj.weight", (12, 12), "matrices linear proj no_embed"),
    ("blocks.0.mlp.fc1.weight", (48, 12), "matrices linear proj no_embed"),
    ("blocks.0.norm1.weight", (12,), "no_embed"),
    ("blocks.0.attn.q_norm.weight", (12,), "no_embed"),
    ("patch_embed.proj.weight", (12, 3, 4, 4), "matrices linear"),
    ("pos_embed", (1, 17, 12), "matrices"),
    ("cls_token", (1, 1, 12), "matrices"),
    ("head.weight", (10, 12), "matrices linear"),
    ("head.bias", (10,), ""),
    ("model.embed_tokens.weight", (100, 12), "matrices"),
    ("lm_head.weight", (100, 12), "matrices linear"),
    ("model.layers.3.self_attn.q_proj.weight", (12, 12), "matrices linear proj no_embed"),
    ("model.layers.3.mlp.down_proj.weight", (12, 48), "matrices linear proj no_embed"),
    ("model.layers.3.mlp.experts.gate_up_proj", (4, 96, 12), "matrices linear proj no_embed"),
    ("model.layers.3.input_layernorm.weight", (12,), "no_embed"),
    ("transformer.wte.weight", (100, 12), "matrices"),
    ("transformer.h.0.attn.c_attn.weight", (12, 36), "matrices linear proj no_embed"),
    ("vision_model.embeddings.patch_embedding.weight", (12, 3, 4, 4), "matrices linear"),
    ("vision_model.embeddings.position_embedding.weight", (50, 12), "matrices"),
    (
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        (36, 12),
        "matrices linear proj no_embed",
    ),
    ("stages.0.blocks.0.conv_dw.weight", (12, 1, 7, 7), "matrices linear no_embed"),
]


@pytest.mark.parametrize(("name", "shape", "presets"), CASES, ids=lambda v: str(v)[:50])
def test_presets(name: str, shape: tuple[int, ...], presets: str) -> None:
    chosen = {preset for preset in PRESETS if selected(preset, name, shape)}
    assert chosen == {"all", *presets.split()}


def test_patterns_narrow_a_preset() -> None:
    choice = Selection("linear", include=("attn", "mlp"), exclude=("fc2",))
    assert selected(choice, "blocks.0.attn.qkv.weight", (4, 4))
    assert not selected(choice, "blocks.0.mlp.fc2.weight", (4, 4))
    assert not selected(choice, "head.weight", (4, 4))
    assert not selected(choice, "blocks.0.attn.qkv.bias", (4,))
    as_setting = {"preset": "linear", "include": ["attn", "mlp"], "exclude": "fc2"}
    assert check(as_setting) == choice


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("convs", "select=convs: must be one of all, matrices, linear, proj, no_embed"),
        ({"preset": "all", "only": "x"}, "select.only: must be one of preset, include, exclude"),
        ({"exclude": ["("]}, "select.exclude=(:"),
        (None, "select=None: must be one of"),
    ],
)
def test_mistakes(setting, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(setting)


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_tiny_patch16_224", "swinv2_tiny_window8_256", "volo_d1_224"]
)
def test_statistics_and_tables_are_never_selected(name):
    """A module knows which of its tensors are parameters; so must the names of a file."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        module = timm.create_model(name)
    parameters = {n for n, _ in module.named_parameters()}
    floating = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    assert {n for n, t in floating.items() if selected("all", n, tuple(t.shape))} == parameters
    for buffer in ("model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.bias"):
        assert not any(selected(preset, buffer, (1, 1, 8, 8)) for preset in PRESETS)
