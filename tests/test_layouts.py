"""Files whose tensors are not the module's: names, experts, ties and dtypes, as transformers."""

import re

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import deltalab as dl
from deltalab.apply import stream
from deltalab.apply.editing import chosen
from deltalab.edits.bitdelta import BitDelta
from deltalab.weights import shards
from deltalab.weights.mapping import Checkpoint

IDS = torch.randint(6, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def reference(path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def logits(module):
    return module(IDS, use_cache=False).logits


def edited_alike(paths, out):
    """Edit a pair live and on disk, and return it with the edited tensors; all must be one."""
    edit = BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="tensor")
    found = tiny_lm.opened(paths, context=64)
    live = dl.edited(found, edit)
    stream.stream(*paths, out, edit, select="all", seed=0)
    on_disk = Checkpoint(out)
    assert set(live) <= set(on_disk)
    assert all(torch.equal(live[name], on_disk[name]) for name in live)
    with dl.loaded(found, live) as module:
        torch.testing.assert_close(logits(module), logits(reference(out)))
    assert not torch.equal(logits(found.module), logits(reference(out)))
    return found, live


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["codegen", "gpt_oss", "gptj", "rwkv"])
def test_what_an_architecture_keeps_in_float32_stays_so(kind, dtype, tmp_path):
    """Rotary tables made in float32, and parameters that transformers leaves in float32."""
    paths = tiny_lm.pair(kind, tmp_path)
    name = str(dtype).removeprefix("torch.")
    ours, theirs = tiny_lm.opened(paths, dtype=name).module, reference(paths[1], dtype)
    for mine, other in ((ours.named_parameters, theirs.named_parameters),
                        (ours.named_buffers, theirs.named_buffers)):  # fmt: skip
        wanted, found = dict(other()), dict(mine())
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in wanted.items()}
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "gpt_neo", "gptj"])
def test_buffers_are_no_parameters(kind, tmp_path):
    found = tiny_lm.opened(tiny_lm.pair(kind, tmp_path))
    buffers = {name for name, _ in found.module.named_buffers()}
    assert buffers, "nothing to tell apart"
    assert not buffers & set(chosen(found.post, "all"))
    assert dl.edited(found, dl.edit("discard"))


PREFIXES = {"bloom": "transformer", "gpt2": "transformer", "gpt_neox": "gpt_neox", "opt": "model"}


@pytest.mark.parametrize(("kind", "prefix"), PREFIXES.items())
def test_files_without_the_prefix_of_the_module(kind, prefix, tmp_path):
    """As gpt2, bloom and opt lie on the hub, whose heads are tied or beside."""
    paths = tiny_lm.pair(kind, tmp_path)
    before = [logits(reference(path)) for path in paths]
    for path in paths:
        file = path / "model.safetensors"
        held = {re.sub(rf"^{prefix}\.", "", n): t for n, t in load_file(file).items()}
        save_file(held, file, {"format": "pt"})
    found, live = edited_alike(paths, tmp_path / "out")
    assert set(live) <= set(Checkpoint(paths[1]))
    assert torch.equal(logits(found.module), before[1])
    with dl.loaded(found, found.pre) as module:
        assert torch.equal(logits(module), before[0])


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral", "olmoe", "qwen2_moe"])
def test_experts_are_edited_one_by_one_as_the_file_has_them(kind, tmp_path):
    found, live = edited_alike(tiny_lm.pair(kind, tmp_path), tmp_path / "out")
    experts = [name for name in live if re.search(r"experts\.\d+\.", name)]
    assert len(experts) >= 4 * 3, "each of four experts has three matrices"
    for name in experts:
        delta = (live[name] - found.pre[name]).abs()
        assert delta.max() - delta.min() < 1e-6, "one scale for each matrix of the file"
    assert len({float((live[n] - found.pre[n]).abs().mean()) for n in experts}) == len(experts)
    assert not set(experts) & {name for name, _ in found.module.named_parameters()}


def test_a_fine_tune_untied_from_a_tied_base_is_compared_with_its_embedding(tmp_path):
    base = tiny_lm.model("llama", tie_word_embeddings=True)
    own = tiny_lm.model("llama", seed=3)
    pre, post = tiny_lm.save(base, tmp_path / "pre"), tiny_lm.save(own, tmp_path / "post")
    assert "lm_head.weight" not in Checkpoint(pre)
    found = tiny_lm.opened((pre, post))
    table = base.get_input_embeddings().weight
    assert torch.equal(found.pre["lm_head.weight"], table)
    assert torch.equal(found.pre["model.embed_tokens.weight"], table)
    with dl.loaded(found, found.pre) as module:
        torch.testing.assert_close(logits(module), logits(reference(pre)))
    torch.testing.assert_close(logits(found.module), logits(reference(post)))


def test_a_file_that_becomes_shorter_while_it_is_copied_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    told = pytest.raises(ValueError, match=r"a.safetensors: ends too early, at byte 5 of 9")
    with open(tmp_path / "a.safetensors", "rb") as one, open(tmp_path / "b", "wb") as other, told:
        shards.copy(one, other, 0, 9)
    entry = shards.Entry(tmp_path / "a.safetensors", torch.float32, (4,), 0, 16)
    with pytest.raises(ValueError, match=r"a.safetensors: ends too early"):
        shards.read(entry)
