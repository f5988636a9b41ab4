"""Every edit on every kind of tensor: any shape, strides, dtype, and numbers at the edge."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from fuzzing import times
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from deltalab.apply import editing
from deltalab.linear.delta import difference as subtracted
from deltalab.linear.factor import svd
from deltalab.rng import Rng
from deltalab.testing import gram
from deltalab.weights import finite
from deltalab.weights.threshold import ModelThreshold

CONF = Path(__file__).parents[1] / "conf" / "edit"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
LARGEST = torch.finfo(torch.float32).max
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-38, 1e30, -1e30, 0.1]),
    st.floats(-(2.0**100), 2.0**100, width=32),
)
EXTREME = st.one_of(VALUES, st.sampled_from([LARGEST, -LARGEST]), st.floats(-LARGEST, LARGEST, width=32))  # fmt: skip  # noqa: E501
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (0, 3), (3, 0), (1, 1), (2, 0, 2), (2, 3, 1, 2), (1, 7)]),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
)


@st.composite
def tensors(draw, values=VALUES):
    """A float32 tensor, contiguous, transposed, expanded, or every other entry of a larger one."""
    shape = draw(SHAPES)
    count = 1
    for size in shape:
        count *= size
    numbers = draw(st.lists(values, min_size=count, max_size=count))
    tensor = torch.tensor(numbers, dtype=torch.float32).reshape(shape)
    match draw(st.sampled_from(["plain", "transposed", "strided", "expanded"])):
        case "transposed" if tensor.ndim > 1:
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        case "strided" if tensor.ndim:
            wide = torch.full((*shape[:-1], 2 * shape[-1]), 7.0)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        case "expanded" if tensor.ndim and shape[0]:
            return tensor[:1].expand(shape)
    return tensor


def built(name):
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del settings["select"]
    return instantiate(settings, _convert_="all")


def needs(edit, delta, seed=0):
    wide = delta.ndim > 1 and delta.numel()
    given_ = {
        "rng": Rng(seed, "w"),
        "grad": torch.ones(delta.shape).cumsum(0).sub(1.5) if delta.ndim else torch.ones(()),
        "fisher": torch.ones(delta.shape),
        "peers": lambda peer: torch.ones(delta.shape),
        "gram": gram(delta) if wide else None,
        "acts": torch.ones(delta[0].numel()) if wide else None,
        "svd": lambda: svd(delta.flatten(1)),
        "quantile": lambda keep: ModelThreshold().of(keep, {"w": delta})["w"],
        "scale": lambda steps, lr: delta.contiguous().abs().mean() if delta.numel() else None,
    }
    return {need: given_[need] for need in edit.needs}


@times(8)
@given(name=st.sampled_from(NAMES), delta=tensors(), seed=st.integers(0, 1 << 40))
def test_the_contract_on_any_tensor(name, delta, seed):
    edit, before = built(name), delta.clone()
    hat = edit(delta, **needs(edit, delta, seed))
    assert hat.shape == delta.shape
    assert hat.dtype == torch.float32
    assert torch.equal(delta, before), "the input was changed"
    assert hat.isfinite().all(), "not finite although the delta is far from the largest number"
    again = edit(delta.contiguous().clone(), **needs(edit, delta.contiguous().clone(), seed))
    assert torch.equal(hat, again), "strides or repetition change the bits"
    zero = torch.zeros_like(delta)
    assert not edit(zero, **needs(edit, zero, seed)).any(), "zero must stay zero"


@times(8)
@given(name=st.sampled_from(NAMES), delta=tensors(EXTREME))
def test_overflow_is_found_and_counted(name, delta):
    edit = built(name)
    hat = edit(delta, **needs(edit, delta))
    bad = int((~hat.isfinite()).sum())
    refused = pytest.raises(ValueError, match=f"exceeds float32 in {bad} of {hat.numel()} entries")
    with refused if bad else nullcontext():
        finite.check_edited({"w": hat})


@times(8)
@given(
    name=st.sampled_from(NAMES),
    delta=tensors(st.floats(-10, 10, width=16)),
    old=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    new=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_edited_tensors_of_any_dtype(name, delta, old, new):
    edit = built(name)
    pre = torch.full(delta.shape, 0.25, dtype=old)
    post = (pre.float() + delta).to(new)
    held = post.clone()
    given_ = needs(edit, subtracted(pre, post))
    out = editing.edited_tensor(pre, post, edit, "eager", **given_)
    assert out.dtype == new
    assert out.shape == post.shape
    assert torch.equal(post, held)
    assert torch.equal(pre, torch.full(delta.shape, 0.25, dtype=old))
    difference = subtracted(pre, post)
    hat = edit(difference, **given_)
    same, gone = hat == difference, hat == 0
    assert torch.equal(out[same], post[same]), "entries that the edit kept must keep their bits"
    assert torch.equal(out[gone & ~same], pre.to(new)[gone & ~same])
