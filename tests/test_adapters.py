"""What leaves in other programs' layouts: read back by them, or by a reader written here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_packs import contents_of, given, pair, refused

from deltalab import delta
from deltalab.save import save as write


def patched(patch: Path, base: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Overwrite a base's words with a patch, by NumPy alone."""
    with safe_open(patch, "np") as opened:
        blobs = {n: opened.get_tensor(n).tobytes() for n in ("__positions__", "__values__")}
        manifest = json.loads(opened.metadata()["manifest"])
    found = {}
    for each in manifest:
        width = {"BF16": 2, "F16": 2, "F32": 4}[each["dtype"]]
        words = base[each["name"]].reshape(-1).view({2: torch.int16, 4: torch.int32}[width])
        out = words.numpy().copy()
        places = blobs["__positions__"][slice(*each["positions"])]
        values = blobs["__values__"][slice(*each["values"])]
        if each["encoding"] == "int32":
            at = np.frombuffer(places, "<i4")
        else:
            stream, at, last = iter(np.frombuffer(places, "<u2").tolist()), [], -1
            for gap in stream:
                if gap == 65535:
                    gap = next(stream) | next(stream) << 16
                last += gap + 1
                at.append(last)
        assert len(at) == each["count"]
        out[np.asarray(at, dtype=int)] = np.frombuffer(values, f"<i{width}")
        found[each["name"]] = out
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "edit",
    [["edit=ties", "edit.keep=.02"], ["edit=dare", "edit.p=.5"], ["edit=keep"]],
    ids=" ".join,
)
def test_a_patch_is_lossless_to_a_reader_of_its_own(edit, dtype, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, dtype)
    weights = load_file(tuned / "model.safetensors")
    weights["rope.mask"] = torch.ones(3, dtype=torch.uint8)  # what is no weight must not change
    sparse = torch.zeros(1 << 17).to(dtype)
    sparse[[3, 100_000]] = 1.0  # gaps that need an escape
    more = {"far.weight": sparse.reshape(1 << 9, -1)}
    save_file({**weights, **more}, tuned / "model.safetensors", {"format": "pt"})
    old = load_file(base / "model.safetensors")
    old["far.weight"] = torch.zeros_like(more["far.weight"])
    save_file(old, base / "model.safetensors", {"format": "pt"})
    args = [*given(base, tuned, *edit), "select={preset: all, exclude: [far]}"]
    delta.run(["patch", *args, f"out={tmp_path}/patch.safetensors"])
    write([*args, f"out={tmp_path}/applied"])
    found = patched(tmp_path / "patch.safetensors", old)
    for name, tensor in load_file(tmp_path / "applied" / "model.safetensors").items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        words = tensor.reshape(-1).view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        before = old[name].reshape(-1).view(words.dtype).numpy()
        assert np.array_equal(found.get(name, before), words.numpy()), name
        if name in found:
            changed = int((found[name] != before).sum())
            assert changed, "a tensor that does not change is not held"
    assert "far.weight" in found


def test_a_patch_of_what_it_cannot_hold(tmp_path, monkeypatch, capsys) -> None:
    base, tuned = pair(tmp_path)
    arguments = ["patch", *given(base, tuned, "edit=ties"), f"out={tmp_path}/p.safetensors"]
    said = refused(arguments, monkeypatch, capsys, tmp_path)
    assert "'rope." in said
    assert "no patch holds its dtype" in said


@pytest.fixture
def llama(tmp_path: Path):
    """A small llama and a fine-tune of it, on disk, with a norm that moved too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned", transformers


@pytest.mark.parametrize("extras", ["keep", "drop"])
def test_peft_loads_what_is_of_low_rank(extras: str, llama, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned, transformers = llama
    args = given(base, tuned, "edit=twin", "edit.rate=.7")
    if extras == "drop":
        args.append("select=linear")
    file = tmp_path / "low.safetensors"
    delta.run(["pack", *args, f"out={file}"])
    (line,) = delta.run(
        ["lora", str(file), f"onto={base}", f"out={tmp_path}/lora", f"extras={extras}"]
    )
    write([*args, f"out={tmp_path}/applied"])
    load = transformers.LlamaForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(base), tmp_path / "lora")
    merged = adapted.merge_and_unload().state_dict()
    wanted, before = load(tmp_path / "applied").state_dict(), load(base).state_dict()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"], "matrices of several shapes have several ranks"
    for name, tensor in wanted.items():
        if extras == "drop" and ("norm" in name or "embed" in name):
            assert torch.equal(merged[name], before[name])
        else:
            assert torch.allclose(merged[name], tensor, rtol=0, atol=2e-7), name
    lost = [((wanted[n] - before[n]).double() ** 2).sum() for n in wanted]
    share = sum(lost[i] for i, n in enumerate(wanted) if "norm" in n or "embed" in n) / sum(lost)
    assert (f"{100 * share:.2g} % of the delta's energy" in line) == (extras == "drop")


def test_what_is_no_adapter(llama, tmp_path, monkeypatch, capsys) -> None:
    base, tuned, _ = llama
    for edit in ("twin", "dare"):
        delta.run(
            ["pack", *given(base, tuned, f"edit={edit}"), f"out={tmp_path}/{edit}.safetensors"]
        )
    for file, more, reason in (
        ("dare", [], "no tensor of low rank"),
        ("twin", ["extras=some"], "extras=some: must be one of keep, drop"),
        ("twin", [f"out={base}"], "exists already"),
    ):
        out = [f"onto={base}", f"out={tmp_path}/lora", *more]
        said = refused(
            ["lora", f"{tmp_path}/{file}.safetensors", *out], monkeypatch, capsys, tmp_path
        )
        assert reason in said
    assert contents_of(base)
