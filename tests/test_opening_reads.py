"""Opening a pair reads every tensor of either checkpoint once, whatever its layout."""

import collections

import pytest
import tiny_lm

from deltalab.store import latest
from deltalab.weights import finite
from deltalab.weights.mapping import Checkpoint

KINDS = {
    "llama": {},
    "tied": {"kind": "llama", "tie_word_embeddings": True},
    "gpt2": {},  # matrices stored (in, out)
    "mixtral": {},  # experts in tensors of their own
    "gpt_neox": {},
    "sharded": {"kind": "qwen2"},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_is_read_once_while_a_pair_opens(name, dtype, tmp_path, monkeypatch):
    settings = {"kind": name, **KINDS[name]}
    paths = tiny_lm.pair(settings.pop("kind"), tmp_path, **settings)
    if name == "sharded":
        for path in paths:
            shard(path)
    reads = collections.Counter()
    once = Checkpoint.__getitem__

    def counted(self, key):
        reads[self.path, key] += 1
        return once(self, key)

    monkeypatch.setattr(Checkpoint, "__getitem__", counted)
    latest.forget()
    finite.checked(tiny_lm.opened(paths, dtype=dtype))
    for path in paths:
        names = set(Checkpoint(path))
        found = {key: reads[path, key] for key in names if reads[path, key] != 1}
        assert not found, f"{path.name}: not once but {found}"
    assert sum(reads.values()) == sum(len(Checkpoint(path)) for path in paths)


def shard(path):
    """Write a checkpoint again, in several files."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    module.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
