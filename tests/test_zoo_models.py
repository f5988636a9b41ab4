"""The embedded pairs opened with other weights than those that ship."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltalab
from deltalab.models.zoo import EmbeddedVit
from deltalab.models.zoo_llm import EmbeddedLlm


@pytest.mark.parametrize(
    ("spec", "file"), [(EmbeddedVit("digits", "digits"), "zoo"), (EmbeddedLlm("sft"), "zoo/llm")]
)
def test_another_training_takes_the_place_of_the_packaged_weights(spec, file, tmp_path):
    name = spec.post
    there = Path(deltalab.__file__).parent / file / f"{name}.safetensors"
    weights = {n: 2 * t for n, t in load_file(there).items()}
    save_file(weights, tmp_path / "again.safetensors")
    again = replace(spec, weights=str(tmp_path / "again.safetensors"))
    assert spec.checkpoints[1] == there
    pair = again.open()
    assert all(torch.equal(pair.post[n], t.float()) for n, t in weights.items())
    assert all(torch.equal(pair.pre[n], t) for n, t in spec.open().pre.items())
    save_file({n: t for n, t in weights.items() if "norm" not in n}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="norm"):
        replace(spec, weights=str(tmp_path / "less.safetensors")).open()
