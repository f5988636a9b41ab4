"""Wrong inputs and hostile surroundings: what is refused, in which words, and what is warned of."""

import contextlib
import json
import logging
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deltalab import allowed, cli, settings
from deltalab.run import building, opening
from deltalab.store import latest, records
from deltalab.terminal import console
from deltalab.terminal.mistakes import mistakes
from deltalab.weights import finite
from deltalab.weights.mapping import Checkpoint, ModelPair, check_same_layout, mixed_dtypes

NAN, INF = float("nan"), float("inf")


def pair(pre, post, buffer=False):
    """A pair of one linear map without a bias, or of a module whose one tensor is a buffer."""
    module = nn.Module()
    tensor = torch.tensor(post)
    if buffer:
        module.register_buffer("weight", tensor)
    else:
        module.weight = nn.Parameter(tensor)
    return ModelPair({"weight": torch.tensor(pre)}, {"weight": tensor.clone()}, module)


@pytest.mark.parametrize(
    ("pre", "post", "parts"),
    [
        ([NAN, 1.0], [1.0, 1.0], ["1 in the pre-trained"]),
        ([1.0, 1.0], [NAN, INF], ["2 in the post-trained"]),
        ([INF, 1.0], [INF, 1.0], ["1 in the pre-trained", "1 in the post-trained"]),
        ([3e38, 1.0], [-3e38, 1.0], ["1 in the delta"]),
    ],
)
def test_numbers_that_are_none_are_refused_or_set_to_zero(pre, post, parts, caplog):
    with pytest.raises(ValueError, match="'weight'.*nonfinite=zero") as caught:
        finite.checked(pair(pre, post))
    for part in parts:
        assert part in str(caught.value)
    cleaned = finite.checked(pair(pre, post), "zero")
    for weights in (cleaned.pre, cleaned.post, cleaned.module.state_dict()):
        assert torch.isfinite(weights["weight"]).all()
    kept = torch.isfinite(torch.tensor(post) - torch.tensor(pre))
    assert torch.equal(cleaned.post["weight"][kept], torch.tensor(post)[kept])
    assert not cleaned.post["weight"][~kept].any()
    assert torch.equal(cleaned.pre["weight"][~kept], cleaned.post["weight"][~kept])
    assert "weight" in caplog.text


def test_devices_that_are_not_there():
    from deltalab.models.live import device_of

    assert device_of("cpu") == "cpu"
    with pytest.raises(ValueError, match="model.device=gpu: must be auto, cpu, cuda"):
        device_of("gpu")
    with pytest.raises(ValueError, match=r"model.device=cuda:99: \d+ GPUs are here"):
        device_of("cuda:99")


def test_masks_of_infinities_in_buffers_are_left_alone():
    shared = pair([-INF, 1.0], [-INF, 2.0], buffer=True)
    assert finite.checked(shared) is shared
    with pytest.raises(ValueError, match="1 in the post-trained"):
        finite.checked(pair([0.0, 1.0], [-INF, 2.0], buffer=True))


def test_scalars_and_empty_tensors_are_fine(tmp_path):
    tensors = {"scalar": torch.tensor(2.0), "empty": torch.ones(0, 3), "n": torch.tensor(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    opened = Checkpoint(tmp_path)
    assert opened.shape("scalar") == ()
    assert opened.shape("empty") == (0, 3)
    check_same_layout(opened, tensors)
    for value in ([], 1.0):
        assert finite.checked(pair(value, value)) is not None


def test_identical_models_are_warned_of(caplog):
    finite.checked(pair([1.0], [1.0]))
    assert "identical: every delta is zero" in caplog.text
    caplog.clear()
    finite.checked(pair([1.0], [1.5]))
    assert not caplog.text


def test_an_edit_that_overflows_its_dtype_is_counted():
    edited = {"a": torch.ones(3).half(), "b": (torch.tensor([6e4, 6e4, 1.0]) * 2).half()}
    with pytest.raises(ValueError, match=r"'b': the edit exceeds float16 in 2 of 3 .*65504"):
        finite.check_edited(edited)
    largest = torch.finfo(torch.bfloat16).max
    finite.check_edited({"a": torch.tensor([largest, -largest], dtype=torch.bfloat16)})


def test_models_that_seem_swapped_are_warned_of(caplog):
    spec = building.build({"_target_": "deltalab.models.zoo.EmbeddedVit", "post": "mnist", "task": "mnist"}, "model")  # fmt: skip  # noqa: E501
    data = {"_target_": "deltalab.data.images.Packaged", "task": "mnist", "split": "objective", "limit": 64}  # fmt: skip  # noqa: E501
    objective = building.build({"_target_": "deltalab.loss.objectives.Classification", "data": data}, "objective")  # fmt: skip  # noqa: E501
    others = (objective, None, "error", None, None, {})
    opening.opened(spec, *others)
    assert "swapped" not in caplog.text

    class Swapped:
        def open(self):
            from deltalab.models.live import live_pair

            known = spec.open()
            return live_pair(
                known.module, dict(known.post), dict(known.pre), "cpu", "float32", known.transform
            )

    try:
        opening.opened(Swapped(), *others)
    finally:
        latest.forget()
    assert "are model.pre and model.post swapped?" in caplog.text


def test_unlike_kinds_and_precisions(tmp_path):
    one = {"w": torch.ones(2), "v": torch.ones(2)}
    with pytest.raises(ValueError, match="'w': floating-point in the pre-trained model, not"):
        check_same_layout(one, {**one, "w": torch.ones(2).int()})
    save_file(one, tmp_path / "a.safetensors")
    save_file({**one, "v": torch.ones(2).bfloat16()}, tmp_path / "b.safetensors")
    a, b = Checkpoint(tmp_path / "a.safetensors"), Checkpoint(tmp_path / "b.safetensors")
    assert mixed_dtypes(a, a) is None
    assert "'v' is F32 in the pre-trained model and BF16" in mixed_dtypes(a, b)
    assert "1 of 2 tensors" in mixed_dtypes(a, b)


# Settings


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.run", "builtins.eval", "deltalab.run.subprocess.run",
     "deltalab.cli.os.system", "deltalab.run.building.build",
     "deltalab.weights.mapping.torch.hub.load",
     "deltalab.edits.within", "deltalab.edits", "deltalab", ".os.system", "deltalab..os.system"],
)  # fmt: skip
def test_only_dataclasses_of_this_package_are_built(target, tmp_path):
    canary = tmp_path / "canary"
    command = f"touch {canary}"
    evil = {"_target_": target, "_args_": [command], "command": command}
    keep = "deltalab.edits.keep.Keep"
    for node in (evil, {"_target_": keep, "x": evil}, {"_target_": keep, "x": [{"y": evil}]}):
        with pytest.raises(ValueError, match="only targets of deltalab|no such setting"):
            building.build(node, "edit")
    chain = "deltalab.edits.chain.Chain"
    with pytest.raises(ValueError, match="only targets of deltalab"):
        building.build({"_target_": chain, "steps": ["dare", evil]}, "edit")
    assert not canary.exists()


def test_what_the_configs_of_this_package_use_is_allowed():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        cfg = compose("config", return_hydra_config=True)
    allowed.check_hydra(cfg.hydra, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeed": 1}, "seeed=1: no such setting; did you mean seed?"),
        ({"seed": True}, "seed=True: must be a whole number"),
        ({"seed": 1.0}, "seed=1.0: must be a whole number"),
        ({"force": "maybe"}, "force=maybe: must be true or false"),
        ({"results": ["a"]}, "results=['a']: must be a text"),
        ({"results": ""}, "results=: name a directory"),
    ],
)
def test_settings_at_the_top(values, message):
    with pytest.raises(ValueError, match=".") as caught:
        settings.check_top(values, ["seed", "force", "results", *values] if "seeed" not in values else ["seed"])  # fmt: skip  # noqa: E501
    assert str(caught.value).startswith((message, "seed: missing", "force: missing"))


@pytest.mark.parametrize(
    "args",
    [{"act_layer": "torch.hub.load"}, {"norm_layer": "os.system"}, {"img_size": "a"},
     {"patch_size": 0}, {"num_heads": 7}, {"nothing": 1}, {"weight_init": "x/y"},
     {"img_size": [1, 2, 3]}, {"embed_dim": -1}],
    ids=str,
)  # fmt: skip
def test_what_an_architecture_makes_of_wrong_arguments_is_one_line(args):
    """On the code before, some of these ended in the traceback of a KeyError."""
    from deltalab.models.timm_vit import created

    with pytest.raises(ValueError, match="model.args=.*refuses them") as caught:
        created("vit_tiny_patch16_224", args)
    line = console.one_line(caught.value)
    assert not line.endswith("()")


def test_an_architecture_is_suggested_by_its_whole_name():
    from deltalab.models.timm_vit import created

    with pytest.raises(ValueError, match=r"did you mean vit_base_patch\d+_224"):
        created("vit_bas_patch16_224", {})


# Output


def test_a_file_in_place_of_the_results_directory(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(ValueError, match=r"results=.*results: no record can be written there"):
        records.check_writable(tmp_path / "results")
    for below in ("results", "results/a/b"):
        with pytest.raises(ValueError, match="results is a file, name a directory"):
            settings.check_results(str(tmp_path / below))
    settings.check_results(str(tmp_path / "new" / "one"))
    with pytest.raises(OSError, match=r"k\.json") as caught:
        records.write(tmp_path / "results", {"key": "k"})
    assert console.one_line(caught.value).startswith(str(tmp_path / "results" / "records"))


@contextlib.contextmanager
def full_disk(limit):
    """Let no file grow beyond so many bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_record_and_no_rest(tmp_path):
    record = {"schema": records.SCHEMA, "key": "k", "status": "ok", "x": 1}
    record |= {"model": "m", "edit": {"name": "dare"}, "loss": {"pre": 1}, "seconds": {"total": 1}}
    path = records.write(tmp_path, record)
    with full_disk(64), pytest.raises(OSError, match=r"records/k\.json"):
        records.write(tmp_path, {**record, "x": "long" * 100})
    assert records.read(tmp_path, "k") == record
    assert [p.name for p in path.parent.iterdir()] == ["k.json"]


def test_a_record_of_an_older_version_is_told_and_run_again(tmp_path, caplog):
    records.write(tmp_path, {"schema": 0, "key": "k", "status": "ok"})
    assert records.read(tmp_path, "k") is None
    assert f"has schema 0, this version of deltalab writes {records.SCHEMA}" in caplog.text


def test_no_secret_of_the_environment_is_in_a_record(tmp_path, monkeypatch):
    secrets = {
        "WANDB_API_KEY": "w" * 40,
        "HF_TOKEN": "hf_" + "t" * 30,
        "OPENAI_API_KEY": "sk-" + "o" * 40,
        "AWS_SECRET_ACCESS_KEY": "s" * 20,
        "MY_PASSWORD": "correct horse",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    leaks = {f"a{i}": f"before {value} after" for i, value in enumerate(secrets.values())}
    record = {"key": "k", "config": {"nested": [leaks]}, "error": {"message": str(leaks)}}
    text = records.write(tmp_path, record).read_text()
    for value in secrets.values():
        assert value not in text
    assert "before *** after" in text
    assert records.redacted({"p": 0.5, "n": None}) == {"p": 0.5, "n": None}


def test_no_secret_reaches_record_log_or_tracker(tmp_path, monkeypatch, capfd):
    import sys

    secret = "sk-" + "abc123" * 8
    for name in ("OPENAI_API_KEY", "DELTALAB_JUDGE_MODEL"):  # a config may read the latter
        monkeypatch.setenv(name, secret)
    seen = []
    from deltalab.tracking.trackers import NoTracker

    monkeypatch.setattr(NoTracker, "log", lambda self, record, group: seen.append(record))
    arguments = ["edit=expo", "data.test.limit=16", "data.objective.limit=16", "riemann=off",
                 "data.name=${oc.env:DELTALAB_JUDGE_MODEL}", "prediction=off", f"results={tmp_path}"]  # fmt: skip  # noqa: E501
    if not (cli.conf_dir() / "prediction").is_dir():
        arguments.remove("prediction=off")
    monkeypatch.setattr(sys, "argv", ["deltalab", *arguments])
    cli.main()
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.parent.name == "records" for p in written)
    for path in written:
        assert secret not in path.read_text(errors="replace"), path
    assert seen
    assert secret not in json.dumps(seen[0], default=str)
    assert secret not in "".join(capfd.readouterr())


def test_a_mistake_of_the_system_is_one_line():
    error = OSError(28, "No space left on device", "/x/records/k.json")
    assert console.one_line(error) == "/x/records/k.json: no space left on device"
    assert console.one_line(OSError(28, "No space left on device")) == "no space left on device"
    assert "\x1b" not in console.one_line(ValueError("a\x1b[2Jb"))
    assert isinstance(error, mistakes())


# Numbers under stress


def test_sums_in_float64_where_float32_would_lose_them():
    """A large and many small numbers: float32 in turn would keep the large one alone."""
    from deltalab.apply import audit
    from deltalab.loss.objectives import Measured, change

    values = torch.full((100_001,), 1.0)
    values[0] = 2.0**26
    assert audit.summed([values]) == [2.0**52 + 100_000]
    one = torch.ones(100_001, dtype=torch.float64)
    post, edited = Measured(values.double(), one), Measured(values.double() + 1e-9, one)
    assert change(post, edited)[0] == pytest.approx(1e-9, rel=0.1)
    assert post.mean == pytest.approx((2.0**26 + 100_000) / 100_001, rel=1e-15)


def test_means_of_magnitudes_against_float64():
    from deltalab.edits.bitdelta import mean_magnitude

    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(256, 128, generator=generator) * 10.0 ** torch.linspace(-20, 10, 128)
    exact = delta.double().abs()
    assert mean_magnitude(delta, "tensor").item() == pytest.approx(exact.mean().item(), rel=1e-6)
    for axis, dim in (("row", 1), ("column", 0)):
        error = (mean_magnitude(delta, axis).double() / exact.mean(dim, keepdim=True) - 1).abs()
        assert error.max() < 1e-6


def test_logging_is_not_silenced_by_these_checks(caplog):
    with caplog.at_level(logging.WARNING):
        finite.checked(replace(pair([1.0], [1.0])))
    assert caplog.records[0].levelname == "WARNING"


def test_the_table_of_kinds_counts_what_is_tried(request):
    """Cases by kind, in results/robustness.md; counted where the whole suite was collected."""
    root = Path(__file__).parent
    items = request.session.items
    elsewhere = {root / "test_ray.py", root / "test_slurm.py"}
    if set(root.glob("test_*.py")) - elsewhere - {Path(item.path) for item in items}:
        pytest.skip("only a part of the tests was collected")
    kinds = [mark.args[0] for item in items for mark in item.iter_markers("meaning")]
    text = (root.parent / "results" / "robustness.md").read_text()
    section = text.split("## Whole, and meaning something else")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+?) \|[^|]*\| (\d+) \|$", section, re.M))
    assert {kind: str(kinds.count(kind)) for kind in set(kinds)} == rows
