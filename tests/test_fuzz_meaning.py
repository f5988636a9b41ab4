"""Well-formed inputs that differ: whatever the spelling, the meaning is computed another way.

Damage is tried by the other property tests. Here every input is valid, and the right value of each
is known without the code that is tried: by hand, in float64, one sequence at a time.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from fuzzing import times
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from deltalab.apply import stream
from deltalab.data.images import Folder
from deltalab.data.tokens import Coded, padded
from deltalab.edits.expo import Expo
from deltalab.loss.answers import AnswerLoss
from deltalab.loss.objectives import measure
from deltalab.loss.passes import gradient
from deltalab.weights import configs
from deltalab.weights.mapping import Checkpoint

pytestmark = pytest.mark.meaning("whole inputs that differ, by property")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KEPT = [torch.int64, torch.int32, torch.uint8, torch.bool]

# Families of dtypes, and files.


@st.composite
def pairs(draw):
    """Two checkpoints of the same names and shapes in any dtypes, and in which file each is."""
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sides, files = ({}, {}), ({}, {})
    for i in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
        kept = draw(st.sampled_from([None, None, None, *KEPT]))
        names = ["steps", "mask"] if kept else ["weight", "bias", "A.weight"]
        name = f"layers.{i}.{draw(st.sampled_from(names))}"
        for side, place in zip(sides, files, strict=True):
            values = torch.randn(shape, generator=made, dtype=torch.float64)
            side[name] = values.to(kept or draw(st.sampled_from(FLOATS)))
            place[name] = draw(st.sampled_from(["a.safetensors", "b/a.safetensors"]))
    return sides, files


def write(place, tensors, files):
    """Write a checkpoint in the files that are named, with an index where they are several."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    chosen = sorted(set(files.values()))
    if len(chosen) == 1:
        save_file(tensors, place / "model.safetensors")
        return place
    for file in chosen:
        (place / file).parent.mkdir(exist_ok=True)
        save_file({n: t for n, t in tensors.items() if files[n] == file}, place / file)
    index = {"metadata": {}, "weight_map": files}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


@times(2)
@given(pairs(), st.sampled_from([-1.5, -0.25, 0.5, 1.0]), st.sampled_from(["eager", "compiled"]))
def test_any_dtypes_in_any_files_are_extrapolated_as_in_float64(tmp_path, pair, alpha, kernel):
    """ExPO is W_post + alpha (W_post - W_pre): the float64 value within what storing costs."""
    (pre, post), places = pair
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    sides = zip("xy", (pre, post), places, strict=True)
    paths = [write(tmp_path / name, *side) for name, *side in sides]
    stream.stream(*paths, tmp_path / "out", Expo(alpha=alpha), select="all", seed=0, kernel=kernel)
    found = Checkpoint(tmp_path / "out")
    assert set(found) == set(post)
    for name, new in post.items():
        assert found[name].dtype == new.dtype
        if new.dtype not in FLOATS:
            assert torch.equal(found[name], new)
            continue
        old, new = pre[name].double(), new.double()
        exact = new + alpha * (new - old)
        size = old.abs() + new.abs() * (1 + abs(alpha)) + exact.abs()
        unit = max(torch.finfo(post[name].dtype).eps, torch.finfo(torch.float32).eps)
        assert ((found[name].double() - exact).abs() <= 2 * unit * size).all()


# Configurations.

BASE = {"hidden_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
MEANT = {
    "hidden_size": 128, "num_hidden_layers": 3, "rms_norm_eps": 1e-5, "hidden_act": "gelu",
    "rope_theta": 500000.0,
}  # fmt: skip


@st.composite
def spelt(draw, theta=10000.0):
    """One configuration in one of its spellings: versions of transformers, order, irrelevances."""
    content = dict(BASE)
    match draw(st.sampled_from(["field", "scaling", "parameters", "both"])):
        case "field":
            content["rope_theta"] = draw(st.sampled_from([theta, int(theta)]))
        case "scaling":
            content |= {"rope_theta": theta, "rope_scaling": draw(st.sampled_from([None, {}]))}
        case "parameters":
            kind = draw(st.sampled_from(["rope_type", "type"]))
            content["rope_parameters"] = {"rope_theta": theta, kind: "default"}
        case "both":
            content |= {
                "rope_theta": theta,
                "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            }
    idle = {
        "torch_dtype": "float16", "dtype": "bfloat16", "use_cache": False, "vocab_size": 9,
        "transformers_version": "4.1", "architectures": ["A"], "_name_or_path": "x/y",
        "sliding_window": None, "eos_token_id": [1, 2], "bos_token_id": None,
    }  # fmt: skip
    for name in draw(st.lists(st.sampled_from(sorted(idle)), unique=True)):
        content[name] = idle[name]
    return {name: content[name] for name in draw(st.permutations(sorted(content)))}


@times(8)
@given(spelt(), spelt())
def test_one_configuration_in_any_two_spellings_differs_in_nothing(one, other):
    assert configs.differences(one, other) is None


@times(8)
@given(spelt(), st.data(), st.sampled_from(sorted(MEANT)))
def test_one_changed_value_is_named_in_any_two_spellings(one, data, name):
    theta = MEANT[name] if name == "rope_theta" else 10000.0
    other = data.draw(spelt(theta)) | ({name: MEANT[name]} if name in BASE else {})
    told = configs.differences(one, other)
    assert told is not None
    assert f"differ in {name}:" in told


# Classes of images.

CLASSES = ["1", "10", "2", "Cat", "cat", "dog", "été", "x y"]
IDLE = [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"]


@times(2)
@given(
    st.lists(st.sets(st.sampled_from(CLASSES), min_size=1), min_size=1, max_size=3),
    st.sets(st.sampled_from(IDLE)),
)
def test_a_class_has_one_number_in_every_split(tmp_path, splits, idle):
    """The number is the class' place among those of all splits that are connected by a class."""
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    for split, classes in enumerate(splits):
        for name in [*classes, *idle]:
            place = tmp_path / "d" / str(split) / name
            place.mkdir(parents=True)
            Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(place / "0.png")
    for split, classes in enumerate(splits):
        joined, before = set(classes), set()
        while joined != before:
            before = set(joined)
            joined |= {c for other in splits if other & joined for c in other}
        labels = [y for _, y in Folder(str(tmp_path / "d"), str(split)).open(None, 8)]
        right = sorted(sorted(joined).index(name) for name in classes)
        assert sorted(torch.cat(labels).tolist()) == right


# Padding.


class Bigrams(torch.nn.Module):
    """The smallest causal language model: the logits of the next token by the last one."""

    def __init__(self, pad):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        table = torch.randn(12, 12, generator=draw, dtype=torch.float64)
        self.table = torch.nn.Parameter(table)
        self.config = type("Config", (), {"pad_token_id": pad})()

    def forward(self, input_ids, attention_mask=None, **others):
        return type("Output", (), {"logits": self.table[input_ids]})()


@times(2)
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=2, max_size=7), min_size=1, max_size=5),
    st.integers(0, 11),
    st.integers(1, 5),
)
def test_any_token_may_pad_and_stand_in_the_text(rows, pad, size):
    """Loss and gradient of the mean over sequences, each alone and without padding."""
    coded = [Coded(ids, [-100, *ids[1:]], "") for ids in rows]
    batches = [padded(coded[i : i + size], pad) for i in range(0, len(coded), size)]
    module = Bigrams(pad)
    loss = AnswerLoss(tuple(batches))
    table = module.table.detach().clone().requires_grad_()
    alone = [
        torch.nn.functional.cross_entropy(table[ids[:-1]], torch.tensor(ids[1:]), reduction="sum")
        for ids in rows
    ]
    tokens = sum(len(ids) - 1 for ids in rows)
    exact = sum(alone) / tokens
    exact.backward()
    assert measure(module, loss).mean == pytest.approx(exact.item(), rel=1e-6)
    found = gradient(module, loss)["table"]
    torch.testing.assert_close(found.double(), table.grad, rtol=1e-5, atol=1e-7)
