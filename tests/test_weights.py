import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deltalab.weights import (
    Checkpoint,
    LazyWeights,
    ModelPair,
    delta,
    fingerprint,
    loaded,
    part_of,
)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"layer{i}.weight": torch.randn(3, 4, generator=generator) for i in range(4)}


def sharded(directory, tensors):
    """Write two shards and their index, as Hugging Face does."""
    names = list(tensors)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, directory / file)
    weight_map = {n: file for file, part in shards.items() for n in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_lazy_weights_load_on_access_only():
    asked = []

    def load(name):
        asked.append(name)
        return torch.ones(1)

    lazy = LazyWeights(["a", "b"], load)
    assert list(lazy) == ["a", "b"]
    assert len(lazy) == 2
    assert "b" in lazy
    assert asked == []
    _ = lazy["b"]
    assert asked == ["b"]
    with pytest.raises(KeyError):
        lazy["c"]


def test_checkpoint_reads_file_directory_and_shards_alike(tmp_path, tensors):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    save_file(tensors, one / "model.safetensors")
    sharded(many, tensors)
    for path in (one, one / "model.safetensors", many, many / "model.safetensors.index.json"):
        opened = Checkpoint(path)
        assert set(opened) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(opened[name], tensor)
            assert opened.shape(name) == (3, 4)


def test_checkpoint_mistakes_name_the_file(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        Checkpoint(tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match="bad.safetensors: not a valid safetensors file"):
        Checkpoint(bad)
    shards = tmp_path / "shards"
    shards.mkdir()
    sharded(shards, tensors)
    (shards / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-2.safetensors"):
        Checkpoint(shards)
    save_file({"other": torch.ones(1)}, shards / "model-2.safetensors")
    with pytest.raises(ValueError, match="layer2.weight"):
        Checkpoint(shards)


def test_pair_names_the_first_tensor_that_differs():
    module = nn.Linear(2, 3)
    post = dict(module.state_dict())
    with pytest.raises(ValueError, match=r"'weight'.*\(4, 2\).*\(3, 2\)"):
        ModelPair({**post, "weight": torch.ones(4, 2)}, post, module)
    with pytest.raises(ValueError, match="'bias' is in the post-trained model only"):
        ModelPair({"weight": post["weight"]}, post, module)
    with pytest.raises(ValueError, match="'extra' is in the pre-trained model only"):
        ModelPair({**post, "extra": torch.ones(1)}, post, module)


def test_delta_is_float32_and_skips_integers():
    pre = {"w": torch.tensor([1.0], dtype=torch.bfloat16), "n": torch.tensor([1])}
    post = {"w": torch.tensor([1.5], dtype=torch.bfloat16), "n": torch.tensor([2])}
    d = delta(pre, post)
    assert list(d) == ["w"]
    assert d["w"].dtype == torch.float32
    assert d["w"].item() == 0.5


def test_loaded_restores_bitwise_also_after_an_exception():
    module = nn.Linear(3, 3)
    post = {n: t.clone() for n, t in module.state_dict().items()}
    edited = {"weight": torch.full((3, 3), 0.1)}
    with loaded(module, edited, restore=post):
        assert torch.equal(module.weight, edited["weight"])
        assert torch.equal(module.bias, post["bias"])
    assert torch.equal(module.weight, post["weight"])
    with pytest.raises(RuntimeError, match="boom"), loaded(module, edited, restore=post):
        raise RuntimeError("boom")
    assert torch.equal(module.weight, post["weight"])


def test_loaded_writes_tied_tensors_once():
    module = nn.Module()
    module.a, module.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    module.b.weight = module.a.weight
    post = {n: t.clone() for n, t in module.state_dict().items()}
    first, second = torch.zeros(2, 2), torch.ones(2, 2)
    with loaded(module, {"a.weight": first, "b.weight": second}, restore=post):
        assert torch.equal(module.a.weight, first)
    assert torch.equal(module.a.weight, post["a.weight"])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blocks.0.attn.qkv.weight", "attention"),
        ("blocks.0.mlp.fc1.bias", "mlp"),
        ("blocks.0.norm2.weight", "norm"),
        ("blocks.3.ls1.gamma", "norm"),
        ("fc_norm.weight", "norm"),
        ("cls_token", "embedding"),
        ("pos_embed", "embedding"),
        ("patch_embed.proj.weight", "embedding"),
        ("head.weight", "head"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"),
        ("model.layers.0.mlp.down_proj.weight", "mlp"),
        ("model.norm.weight", "norm"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.wte.weight", "embedding"),
        ("vision_model.encoder.layers.0.layer_norm1.weight", "norm"),
        ("vision_model.embeddings.patch_embedding.weight", "embedding"),
        ("something.else", "other"),
    ],
)
def test_part_of(name, part):
    assert part_of(name) == part


def test_fingerprint_is_of_the_content(tmp_path, tensors):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, a)
    save_file(tensors, b)
    assert fingerprint(a) == fingerprint(b)
    changed = {n: t.clone() for n, t in tensors.items()}
    changed["layer3.weight"][2, 3] += 1
    save_file(changed, b)
    assert fingerprint(a) != fingerprint(b)
