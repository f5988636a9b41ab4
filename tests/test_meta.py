"""Shapes and dtypes are told without reading; a point reads each tensor a few times."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from deltalab import run
from deltalab.apply import editing
from deltalab.apply.extras import Extras
from deltalab.edits.dare import Dare
from deltalab.keys import Choices
from deltalab.models import zoo
from deltalab.run.building import prepare
from deltalab.settings import conf_dir
from deltalab.store import latest
from deltalab.weights import finite
from deltalab.weights.aligned import Aligned
from deltalab.weights.mapping import Checkpoint, LazyWeights, Meta, cast, delta, meta

KINDS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64),
]

SIDES = ("digits_pre", "digits")


def told_rightly(weights) -> None:
    """Compare what weights tell of each tensor with the tensor."""
    for name in weights:
        told, tensor = meta(weights, name), weights[name]
        assert (told.shape, told.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert told.floating == tensor.is_floating_point()


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_checkpoint_tells_what_it_holds(ending: str, tmp_path: Path) -> None:
    kinds = KINDS if ending == "safetensors" else [*KINDS[:4], torch.int64, torch.bool]
    tensors = {str(kind)[6:]: torch.ones(2, 3).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.ones(0, 3)}
    path = tmp_path / f"model.{ending}"
    save = save_file if ending == "safetensors" else torch.save
    save(tensors, path)
    opened = Checkpoint(path)
    assert set(opened) == set(tensors)
    told_rightly(opened)
    told_rightly(cast(opened, torch.float16))
    with pytest.raises(KeyError):
        opened.meta("other")


def unread(weights) -> LazyWeights:
    """Weights that tell and cannot be read."""

    def fails(name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    return LazyWeights(weights, fails, lambda name: meta(weights, name))


def test_views_tell_without_reading() -> None:
    pre = {"w": torch.ones(3, 4).bfloat16(), "steps": torch.tensor(1)}
    post = {"w": torch.ones(3, 4), "steps": torch.tensor(2)}
    one, other, rng = unread(pre), unread(post), Extras(("rng",))
    assert cast(one, torch.float64).meta("w") == Meta((3, 4), torch.float64)
    assert cast(one, torch.float64).meta("steps").dtype == torch.int64
    assert list(delta(one, other)) == ["w"]
    assert delta(one, other).meta("w") == Meta((3, 4), torch.float32)
    edited = editing.edited(one, other, Dare(p=0.5, k=0.0), "all", rng)
    assert list(edited) == ["w"]
    assert edited.meta("w") == Meta((3, 4), torch.float32)
    tied = Aligned({"w": ("w", "head")}, other.__getitem__, other.meta)
    assert tied.meta("head") == tied.meta("w") == Meta((3, 4), torch.float32)
    for weights in (cast(pre, torch.float64), delta(pre, post)):
        told_rightly(weights)
    told_rightly(editing.edited(pre, post, Dare(p=0.5, k=0.0), "all", rng))
    with pytest.raises(KeyError):
        edited.meta("steps")


def test_weights_with_zeros_for_what_is_no_number_tell_too() -> None:
    pair = zoo.EmbeddedVit("digits", "digits").open()
    name = next(iter(pair.post))
    bad = {n: t.clone() for n, t in pair.pre.items()}
    bad[name].view(-1)[0] = torch.nan
    cleaned = finite.checked(
        type(pair)(bad, pair.post, pair.module, pair.transform), nonfinite="zero"
    )
    told_rightly(cleaned.pre)


@pytest.mark.parametrize(("edit", "rule"), [("dare", "adaptive"), ("bitdelta", "left")])
def test_a_point_reads_each_tensor_a_few_times(edit: str, rule: str, monkeypatch, tmp_path) -> None:
    """With the pair opened for it, in all: the module, both ends measured, the edit, the term."""
    reads: Counter[tuple[str, str]] = Counter()
    load = Checkpoint.__getitem__

    def counted(self: Checkpoint, name: str) -> Tensor:
        reads[self.path.stem, name] += 1
        return load(self, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", counted)
    overrides = ["model=digits_vit", f"edit={edit}", "evaluator=none", f"results={tmp_path}"]
    overrides += ["data.objective.limit=8", f"riemann.rule={rule}", "riemann.points=5"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("config", overrides)
    settings = OmegaConf.to_container(cfg, resolve=True)
    point = prepare(settings, Choices("digits_vit", edit, "classification"))
    latest.forget()
    found, _ = run.evaluate(point)
    most = {side: max(n for (of, _), n in reads.items() if of == side) for side in SIDES}
    assert found["term"]["rule"] == rule
    assert most["digits"] <= 4, "once to fill the module, once to measure it, once for the point"
