import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deltalab.linear.delta import difference
from deltalab.run import point
from deltalab.weights import shards
from deltalab.weights.contents import of_checkpoint
from deltalab.weights.mapping import (
    Checkpoint,
    LazyWeights,
    Meta,
    ModelPair,
    delta,
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

    lazy = LazyWeights(["a", "b"], load, lambda name: Meta((1,), torch.float32))
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
    many = tmp_path / "shards"
    many.mkdir()
    sharded(many, tensors)
    (many / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-2.safetensors"):
        Checkpoint(many)
    save_file({"other": torch.ones(1)}, many / "model-2.safetensors")
    with pytest.raises(ValueError, match="layer2.weight"):
        Checkpoint(many)


def header(entries, data=0, length=None):
    """Return a file of a made-up header and so many bytes of data."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(begin=0, end=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (bytes(64), "no header in its 64 bytes"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"GGUF" + bytes(40), "a GGUF file; convert it"),
        (b"PK\x03\x04" + bytes(40), "a PyTorch archive"),
        (header({"a": entry()}, 4, length=1 << 40), "header claims 1099511627776 bytes"),
        (header({"a": entry()}, 3), "3 bytes of data where the header says 4; an incomplete"),
        (header({"a": entry()}, 6), "6 bytes of data where the header says 4; the rest"),
        (header({"a": entry(), "b": entry(2, 6)}, 6), "tensor 'b' overlaps the one before it"),
        (header({"a": entry(), "b": entry(8, 12)}, 12), "tensor 'b' leaves a gap before it"),
        (header({"a": entry(dtype="F31")}, 4), "tensor 'a' has dtype 'F31', must be one of F64"),
        (header({"a": entry(shape=(3,))}, 4), "'a' of dtype F32 and shape .3. has 4 bytes, must"),
        (header({"a": entry(shape=(-1,))}, 4), "tensor 'a' has shape .-1., must be"),
        (header({"a": entry(shape=(True,))}, 4), "tensor 'a' has shape .True., must be"),
        (header({"a": entry(0, 0, shape=(0, 1 << 62, 4))}), "fewer than 2.60 entries"),
        (header({"a": entry(4, 0)}, 4), "tensor 'a' has data_offsets .4, 0., must be"),
        (header({"a": {"dtype": "F32"}}, 4), "tensor 'a' lacks its dtype, shape or"),
        (header({"__metadata__": {"x": 1}, "a": entry()}, 4), "__metadata__ must map"),
        (header(b'{"a":{},"a":{}}'), "'a' stands in it twice"),
        (header(b'{"a":'), "its header is damaged"),
        (header(b'{"a":' * 50_000), "nested too deeply"),
        (header(b'{"\xff":{}}'), "its header is damaged"),
    ],
)
def test_every_claim_of_a_header_is_checked(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (Checkpoint, shards.entries):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a valid index"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "tensor 'a' lies in 3, must be a file name"),
        ('{"weight_map": {"a": "../out.safetensors"}}', "'../out.safetensors', which leads out"),
        ('{"weight_map": {"a": "x/../../out.safetensors"}}', "leads out of the directory"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "'/etc/passwd', which leads out"),
        ('{"weight_map": {"a": "link.safetensors"}}', "a link out of its directory"),
        ('{"weight_map": {"a": "a\\u0000b"}}', "leads out of the directory"),
        (f'{{"weight_map": {{"a": "{ONE}"}}}}', f"names no tensor of {TWO}, 1 shards of 2 only"),
        (f'{{"weight_map": {{"a": "{ONE}", "b": "{TWO}"}}}}', "'c' is in this shard; .* no shard"),
        (f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', "'a' stands in it twice"),
        (f'{{"weight_map": {{"a": "{TWO}", "b": "{ONE}"}}}}', "'a' is in .* not in this shard"),
    ],
)
def test_an_index_names_all_of_its_directory_and_nothing_else(tmp_path, index, message):
    home = tmp_path / "home"
    home.mkdir()
    one = {"a": torch.ones(1)}
    save_file(one, tmp_path / "out.safetensors")
    (home / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    save_file(one, home / ONE)
    save_file({"b": torch.ones(1), "c": torch.ones(1)}, home / TWO)
    (home / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(home)
    assert str(home) in str(caught.value)


def test_a_directory_means_one_checkpoint(tmp_path, tensors):
    sharded(tmp_path, tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="several checkpoints .* name one file"):
        Checkpoint(tmp_path)
    assert set(Checkpoint(tmp_path / "model.safetensors")) == set(tensors)
    other = tmp_path / "gguf"
    other.mkdir()
    (other / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="GGUF file cannot be read; convert it"):
        Checkpoint(other)
    with pytest.raises(FileNotFoundError, match="not a regular file"):
        Checkpoint("/dev/zero")


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path, tensors):
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots"
    blobs.mkdir(parents=True)
    (snapshot / "rev").mkdir(parents=True)
    save_file(tensors, blobs / "abc")
    (snapshot / "rev" / "model.safetensors").symlink_to("../../blobs/abc")
    assert set(Checkpoint(snapshot / "rev")) == set(tensors)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(blobs / "abc")
    with pytest.raises(ValueError, match="a link out of its directory"):
        Checkpoint(linked)
    assert set(Checkpoint(linked / "model.safetensors")) == set(tensors)  # named, so meant


@pytest.mark.parametrize("wrap", [dict, lambda t: {"state_dict": t, "epoch": 1}])
def test_pytorch_files_give_the_same_tensors(tmp_path, tensors, wrap):
    torch.save(wrap(tensors), tmp_path / "pytorch_model.bin")
    opened = Checkpoint(tmp_path)
    assert opened.dtype("layer0.weight") == "F32"
    for name, tensor in tensors.items():
        assert torch.equal(opened[name], tensor)
        assert opened.shape(name) == tuple(tensor.shape)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "'epoch' is of type int, no tensor"),
        ([1], "a list instead of tensors by name"),
        ({"w": torch.zeros(1).expand(10**9)}, "'w' of shape .* exceeds it"),
        ({"w": torch.ones(2).to_sparse()}, "it would call torch._utils._rebuild_sparse_tensor"),
        (nn.Linear(1, 1), "it would call torch.nn.modules.linear.Linear"),
    ],
)
def test_pytorch_files_hold_tensors_and_nothing_else(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / "a.pt")


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


def test_the_digest_is_of_the_content(tmp_path, tensors):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, a)
    save_file(tensors, b)
    assert of_checkpoint(a) == of_checkpoint(b)
    changed = {n: t.clone() for n, t in tensors.items()}
    changed["layer3.weight"][2, 3] += 1
    save_file(changed, b)
    assert of_checkpoint(a) != of_checkpoint(b)


def test_the_delta_is_one_thing_everywhere():
    """Equal infinities have none; what float32 alone makes equal has one that is no number."""
    mask = {"mask": torch.tensor([0.0, -torch.inf, torch.inf, 1.0])}
    moved = {"mask": torch.tensor([0.5, -torch.inf, torch.inf, 1.0])}
    assert delta(mask, moved)["mask"].tolist() == [0.5, 0.0, 0.0, 0.0]
    assert point.shift_from(mask, moved)["mask"].tolist() == [0.5, 0.0, 0.0, 0.0]
    beyond = torch.tensor([1e300], dtype=torch.float64)
    assert difference(beyond, beyond).tolist() == [0.0]
    assert difference(beyond, 2 * beyond).isnan().all()
