"""Quantised weights decoded on request, against a decoding by bits in numpy that shares no code."""

import json
import struct

import numpy as np
import pytest
import texts
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import deltalab.save as save
from deltalab.checkpoints import opened
from deltalab.models.hf_llm import HfPair
from deltalab.weights import shards
from deltalab.weights.mapping import Checkpoint

pytestmark = pytest.mark.meaning("quantised checkpoints")

STEM = "model.layers.0.mlp.up_proj."


def bfloat16(values):
    """Float64 to the nearest bfloat16, ties to even, by way of float32 as decoders go."""
    words = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    words = (words + 0x7FFF + ((words >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return words.astype(np.uint32).view(np.float32)


def float8(byte):
    """The value of a byte as E4M3 without infinities: sign, 4 bits of exponent, 3 of mantissa."""
    sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def packed(codes, bits):
    """Rows of codes in [-2^(bits-1), 2^(bits-1)) as 32-bit words, each row by itself."""
    rows = []
    for row in codes:
        number = sum((int(c) + (1 << (bits - 1))) << (bits * i) for i, c in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([number >> (32 * i) & 0xFFFFFFFF for i in range(count)])
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


def scaled(draw, rows, columns, block, name="weight", suffix="_scale_inv"):
    """8-bit floats with a scale for every block, and what they decode to."""
    codes = draw.integers(0, 127, (rows, columns)).astype(np.uint8)
    codes |= draw.integers(0, 2, codes.shape).astype(np.uint8) << 7
    grid = -(-rows // block[0]), -(-columns // block[1])
    scale = draw.uniform(0.01, 0.1, grid).astype(np.float32)
    values = np.array([[float8(int(b)) for b in row] for row in codes])
    whole = np.array([[values[i, j] * scale[i // block[0], j // block[1]] for j in range(columns)]
                      for i in range(rows)])  # fmt: skip
    held = {
        STEM + name: torch.from_numpy(codes).view(torch.float8_e4m3fn),
        f"{STEM}{name}{suffix}": torch.from_numpy(scale),
    }
    return held, bfloat16(whole)


def integers(draw, rows, columns, group, bits, zeros=None, order=False):
    """Packed integers with a scale for every group of columns, and what they decode to."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes, groups = draw.integers(low, high, (rows, columns)), -(-columns // group)
    scale = bfloat16(draw.uniform(0.01, 0.1, (rows, groups)))
    zero = draw.integers(low, high, (rows, groups)) if zeros else np.zeros((rows, groups), int)
    of = np.arange(columns) // group
    if order:
        draw.shuffle(of)
    whole = [[(codes[i, j] - zero[i, of[j]]) * np.float32(scale[i, of[j]]) for j in range(columns)]
             for i in range(rows)]  # fmt: skip
    held = {
        STEM + "weight_packed": packed(codes, bits),
        STEM + "weight_scale": torch.from_numpy(scale).bfloat16(),
        STEM + "weight_shape": torch.tensor([rows, columns]),
        STEM + "input_scale": torch.ones(1),
    }
    if zeros == "packed":
        held[STEM + "weight_zero_point"] = packed(zero.T, bits).T.contiguous()
    elif zeros == "plain":
        held[STEM + "weight_zero_point"] = torch.from_numpy(zero).to(torch.int8)
    if order:
        held[STEM + "weight_g_idx"] = torch.from_numpy(of).int()
    return held, bfloat16(np.array(whole))


def groups(**weights):
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }


FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4]}
LAYOUTS = {
    "blocks": (lambda d: scaled(d, 12, 8, (4, 4)), FP8),
    "cut blocks": (lambda d: scaled(d, 10, 7, (4, 4)), FP8),
    "blocks that shapes alone would divide evenly": (lambda d: scaled(d, 9, 6, (4, 4)), FP8),
    "equal blocks, not said": (lambda d: scaled(d, 12, 8, (3, 4)), {"quant_method": "fp8"}),
    "one scale": (lambda d: scaled(d, 6, 8, (6, 8), suffix="_scale"), {"quant_method": "fbgemm"}),
    "a scale a row": (lambda d: scaled(d, 6, 8, (1, 8), suffix="_scale"), groups(num_bits=8)),
    "4 bits": (lambda d: integers(d, 6, 16, 4, 4), groups(num_bits=4, group_size=4)),
    "4 bits, cut word and group": (
        lambda d: integers(d, 5, 19, 8, 4), groups(num_bits=4, group_size=8)
    ),
    "4 bits by row": (lambda d: integers(d, 6, 16, 16, 4), groups(num_bits=4)),
    "4 bits, zeros": (lambda d: integers(d, 11, 16, 4, 4, "packed"), groups(num_bits=4)),
    "4 bits, plain zeros": (lambda d: integers(d, 6, 16, 4, 4, "plain"), groups(num_bits=4)),
    "4 bits, columns in another order": (
        lambda d: integers(d, 6, 16, 4, 4, "packed", True), groups(num_bits=4, group_size=4)
    ),
    "8 bits": (lambda d: integers(d, 6, 10, 5, 8), groups(num_bits=8, group_size=5)),
    "one word": (lambda d: integers(d, 6, 3, 3, 8), groups(num_bits=8)),
}  # fmt: skip


def write(place, held, said):
    place.mkdir()
    save_file({**held, "model.norm.weight": torch.ones(3)}, place / "model.safetensors")
    content = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": said}
    (place / "config.json").write_text(json.dumps(content))
    return place


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_decodes_to_the_same_bits(layout, tmp_path):
    make, said = LAYOUTS[layout]
    held, expected = make(np.random.default_rng(0))
    place = write(tmp_path / "a", held, said)
    with pytest.raises(ValueError, match=r"quantised .*; name .*, or decode them with model.deq"):
        opened(place, "model.pre", dequantize=False)
    found = opened(place, "model.pre", dequantize=True)
    assert set(found) == {STEM + "weight", "model.norm.weight"}
    whole = found[STEM + "weight"]
    assert whole.dtype == torch.bfloat16
    assert found.shape(STEM + "weight") == tuple(whole.shape) == expected.shape
    assert found.dtype(STEM + "weight") == "BF16"
    assert np.array_equal(whole.float().numpy(), expected)
    flat, count = whole.reshape(-1), whole.numel()
    for start in range(0, count, 7):
        stop = min(start + 11, count)
        assert torch.equal(found.part(STEM + "weight", start, stop), flat[start:stop])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoded_edited_and_written(layout, tmp_path, monkeypatch):
    """W_pre + 2 (W_post - W_pre) of both decoded, to bfloat16, in pieces; all else as it was."""
    monkeypatch.setattr(shards, "SLICE", 13)
    make, said = LAYOUTS[layout]
    sides = [make(np.random.default_rng(seed)) for seed in (0, 1)]
    if "order" in layout:  # both sides have the same shape of everything
        assert sides[0][0][STEM + "weight_g_idx"].shape == sides[1][0][STEM + "weight_g_idx"].shape
    places = [write(tmp_path / f"{i}", held, said) for i, (held, _) in enumerate(sides)]
    (places[1] / "hf_quant_config.json").write_text(json.dumps({"quant_algo": "FP8"}))
    save.save([
        "model=hf_llm", f"model.pre={places[0]}", f"model.post={places[1]}", "edit=expo",
        "edit.alpha=1", f"out={tmp_path / 'out'}", "model.dequantize=true",
    ])  # fmt: skip
    written = load_file(tmp_path / "out" / "model.safetensors")
    pre, post = (values for _, values in sides)
    assert set(written) == {STEM + "weight", "model.norm.weight"}
    assert written[STEM + "weight"].dtype == torch.bfloat16
    edited = bfloat16(pre + np.float32(2) * (post - pre))
    expected = np.where(post == pre, post, edited)
    assert np.array_equal(written[STEM + "weight"].float().numpy(), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert opened(tmp_path / "out", "model.post")


def quantise(state, blocks):
    """Replace every matrix of the layers by 8-bit floats, and return what they decode to."""
    held, whole = {}, {}
    for name, tensor in state.items():
        if "layers" not in name or tensor.ndim < 2:
            held[name] = whole[name] = tensor.bfloat16()
            continue
        rows, columns = (torch.arange(n) // b for n, b in zip(tensor.shape, blocks, strict=True))
        scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
        for i in range(len(scale)):
            for j in range(len(scale[0])):
                block = tensor[rows == i][:, columns == j]
                scale[i, j] = block.abs().max() / 448
        codes = (tensor / scale[rows][:, columns]).to(torch.float8_e4m3fn)
        held |= {name: codes, f"{name}_scale_inv": scale}
        values = [[float8(b) for b in row] for row in codes.view(torch.uint8).tolist()]
        numbers = np.array(values) * scale[rows][:, columns].double().numpy()
        whole[name] = torch.from_numpy(bfloat16(numbers)).bfloat16()
    return held, whole


def test_a_live_pair_is_that_of_the_decoded_weights(tmp_path):
    """Logits of both ends as transformers has them of the same numbers in a file of bfloat16."""
    size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 300}
    config = LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2, dtype="bfloat16")
    paths, ids, expected = [], torch.arange(3, 20)[None], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        held, whole = quantise(model.state_dict(), (16, 16))
        for kind, tensors in (("fp8", held), ("whole", whole)):
            place = tmp_path / f"{kind}{seed}"
            model.save_pretrained(place)
            texts.tokenizer().save_pretrained(place)
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((tmp_path / f"fp8{seed}" / "config.json").read_text())
        content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (tmp_path / f"fp8{seed}" / "config.json").write_text(json.dumps(content))
        paths.append(tmp_path / f"fp8{seed}")
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / f"whole{seed}", dtype="float32")
        expected.append(reference(ids).logits)
    spec = {"pre": str(paths[0]), "post": str(paths[1]), "dtype": "float32", "device": "cpu"}
    for call in ("open", "skeleton"):
        with pytest.raises(ValueError, match=r"\(fp8\)\), which .* or decode them with model\.deq"):
            getattr(HfPair(**spec), call)()
    pair = HfPair(**spec, dequantize=True).open()
    assert torch.equal(pair.module(ids).logits, expected[1])
    for name, tensor in pair.module.state_dict().items():
        tensor.copy_(pair.pre[name])
    assert torch.equal(pair.module(ids).logits, expected[0])
    assert HfPair(**spec, dequantize=True).skeleton().config.vocab_size == 300


BAD = {
    "another layout": {STEM + "qweight": torch.ones(4, 4).int()},
    "no scale": {STEM + "weight": torch.ones(4, 4).to(torch.float8_e4m3fn)},
    "grid that does not fit": {
        STEM + "weight": torch.ones(5, 4).to(torch.float8_e4m3fn),
        STEM + "weight_scale_inv": torch.ones(2, 1),
    },
    "words that do not fit": {
        STEM + "weight_packed": torch.ones(4, 3).int(), STEM + "weight_scale": torch.ones(4, 1),
        STEM + "weight_shape": torch.tensor([4, 40]),
    },
    "a negative shape": {
        STEM + "weight_packed": torch.ones(4, 3).int(), STEM + "weight_scale": torch.ones(4, 1),
        STEM + "weight_shape": torch.tensor([-4, -24]),
    },
    "no shape": {STEM + "weight_packed": torch.ones(4, 3).int()},
    "a group that is not there": {
        STEM + "weight_packed": torch.ones(4, 1).int(), STEM + "weight_scale": torch.ones(4, 2),
        STEM + "weight_shape": torch.tensor([4, 8]),
        STEM + "weight_g_idx": torch.tensor([0, 1, 2, 0, 0, 0, 0, 0]).int(),
    },
    "zeros that do not fit": {
        STEM + "weight_packed": torch.ones(4, 1).int(), STEM + "weight_scale": torch.ones(4, 2),
        STEM + "weight_shape": torch.tensor([4, 8]),
        STEM + "weight_zero_point": torch.ones(4, 2).int(),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_decoded_is_named(kind, tmp_path):
    place = write(tmp_path / "a", BAD[kind], {"quant_method": "fp8"})
    with pytest.raises(
        ValueError, match=rf"model\.post=.*dequantize=true: tensor '{STEM}"
    ) as caught:
        opened(place, "model.post", dequantize=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="its weights are quantised") as caught:
        opened(place, "model.post", dequantize=False)
    assert "dequantize" not in str(caught.value)


def test_whole_weights_need_no_decoding(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert type(opened(tmp_path, "model.pre", dequantize=True)) is Checkpoint


def test_the_oracle_itself():
    """By the standard: 448 is the largest, 2^-9 the least; numpy's own reading of bfloat16 bits."""
    assert [float8(b) for b in (0x7E, 0x01, 0x08, 0xB8)] == [448.0, 2.0**-9, 2.0**-6, -1.0]
    assert bfloat16([1 + 2**-8, 1 + 3 * 2**-8]).tolist() == [1.0, 1 + 2**-6]
    assert packed([[-8, 7, 0]], 4).tolist() == [[struct.unpack("<i", b"\xf0\x08\0\0")[0]]]
