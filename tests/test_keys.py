"""Keys: what changes them, what must not, and that nobody's finished points are lost."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from deltalab import keys, options, rekey, settings
from deltalab.classes import described
from deltalab.keys import Choices, canonical, determinants, node
from deltalab.report.comparison import compare
from deltalab.settings import conf_dir
from deltalab.store.digests import key_of

CHOICES = Choices("mnist_vit", "dare", "classification")


@pytest.fixture(scope="module")
def composed():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", ["edit=dare"]), resolve=True)


def key(values, choices=CHOICES, **top):
    return key_of(determinants({**values, **top}, choices))


def changed(values, **more):
    """Return settings with one group's settings changed."""
    return {**values, **{group: {**values[group], **new} for group, new in more.items()}}


def targets(found):
    """Yield every class that a composed config or a YAML file names."""
    if isinstance(found, dict):
        if "_target_" in found:
            yield found["_target_"]
        for value in found.values():
            yield from targets(value)
    elif isinstance(found, list):
        for value in found:
            yield from targets(value)


def named():
    found = set()
    for file in conf_dir().rglob("*.yaml"):
        if "hydra" not in file.relative_to(conf_dir()).parts:
            found |= set(targets(yaml.safe_load(file.read_text())))
    return sorted(found)


@pytest.mark.parametrize("target", named())
def test_what_is_read_from_the_source_is_what_the_class_says(target):
    module, _, name = target.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    found = described(target)
    assert found.name == kind.__name__
    for constant in ("version", "reads", "beside", "contents", "options"):
        assert found.get(constant, None) == getattr(kind, constant, None), constant
    plain = {f.name: f.default for f in fields(kind) if f.init and f.default is not MISSING}
    assert {n: v for n, v in found.defaults.items() if n in plain} == plain
    assert set(found.get("contents", {})) <= {f.name for f in fields(kind)}
    assert set(found.get("contents", {}).values()) <= set(keys.KINDS)
    assert set(found.get("reads", ())) <= set(keys.READERS)


def test_a_new_place_or_a_group_that_is_new_changes_no_key(composed, monkeypatch):
    monkeypatch.setitem(keys.NEUTRAL, "merge", None)
    monkeypatch.setitem(keys.NEUTRAL, "edit.sharpness", 0.0)
    before = key(composed)
    assert key(composed, merge=None) == before
    assert key(composed, merge={"_target_": "deltalab.edits.ties.Ties"}) != before
    assert key(changed(composed, edit={"sharpness": 0})) == before
    assert key(changed(composed, edit={"sharpness": 1})) != before


def test_the_module_of_a_class_is_not_part_of_a_key(composed, tmp_path, monkeypatch):
    source = Path(importlib.import_module("deltalab.edits.dare").__file__).read_text()
    (tmp_path / "elsewhere.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    moved = changed(composed, edit={"_target_": "elsewhere.Dare"})
    assert key(moved) == key(composed)


def test_a_default_counts_as_if_it_were_written_out(tmp_path, monkeypatch):
    body = "class Own:\n    p: float\n    q: float = {}\n"
    (tmp_path / "own_one.py").write_text(body.format(0.5))
    (tmp_path / "own_two.py").write_text(body.format(0.25))
    monkeypatch.syspath_prepend(str(tmp_path))
    one, other = ({"_target_": f"own_{n}.Own", "p": 1} for n in ("one", "two"))
    assert node(one, "edit", False) == node({**one, "q": 0.5}, "edit", False)
    assert node(one, "edit", False) != node(other, "edit", False)


def test_a_version_makes_only_its_own_records_stale(composed, monkeypatch):
    mended = described("deltalab.edits.dare.Dare")
    other = key(
        composed, CHOICES, edit={**composed["edit"], "_target_": "deltalab.edits.ties.Ties"}
    )
    before = key(composed)
    monkeypatch.setitem(mended.constants, "version", 2)
    assert key(composed) != before
    unlike = {**composed["edit"], "_target_": "deltalab.edits.ties.Ties"}
    assert key(composed, CHOICES, edit=unlike) == other


@pytest.mark.parametrize("reader", sorted(keys.READERS))
def test_a_mended_reader_makes_those_records_stale_that_used_it(composed, monkeypatch, reader):
    before = key(composed)
    monkeypatch.setitem(keys.READERS, reader, keys.READERS[reader] + 1)
    used = {"apply", "passes", "rng", "images", "checkpoint"}
    assert (key(composed) != before) == (reader in used)


def test_numbers_are_written_one_way(composed):
    assert canonical(0.1 + 0.2) == 0.3
    assert key(changed(composed, edit={"p": 0.1 + 0.2})) == key(changed(composed, edit={"p": 0.3}))
    assert key(changed(composed, edit={"k": 0.0})) == key(changed(composed, edit={"k": 0}))
    assert key(changed(composed, edit={"k": 1e-9})) != key(changed(composed, edit={"k": 0}))
    assert key(composed, seed=True) != key(composed, seed=1) or canonical(True) is True
    assert settings.tidy(list(map(float, [0.1 + 0.2]))) == [0.3]


def test_what_decides_nothing_is_no_part_of_a_key(composed):
    before = key(composed)
    for name in keys.BESIDE:
        if name != "draws":
            assert key(composed, **{name: "other"}) == before, name
    for name, value in {"seed": 1, "nonfinite": "zero", "select": "proj"}.items():
        assert key(composed, **{name: value}) != before, name


def test_pairs_draw_alike_unless_asked_otherwise(composed):
    assert key(composed, draws="paired") == key(composed)
    own = key(composed, draws="independent")
    assert own != key(composed)
    assert key(composed, draws="independent", label="other") != own
    with pytest.raises(ValueError, match="draws=some: must be one of paired, independent"):
        key(composed, draws="some")


def test_the_steps_of_a_chain_count_with_their_defaults():
    def steps(*given):
        return node({"_target_": "deltalab.edits.chain.Chain", "steps": list(given)}, "edit", False)

    assert steps("dare", "ties") == steps({"dare": {"p": 0.5}}, "ties")
    assert steps("dare", "ties") != steps({"dare": {"p": 0.4}}, "ties")
    assert steps("dare", "ties") != steps("ties", "dare")


def judged(path, **judge):
    return {
        "_target_": "deltalab.judging.alpaca_eval.AlpacaEval",
        "reference": str(path),
        "cache_dir": "anywhere",
        "judge": {
            "_target_": "deltalab.judging.judges.Endpoint",
            "model": "m",
            "retries": 3,
            **judge,
        },
    }


def test_a_cache_and_a_services_patience_decide_nothing(tmp_path):
    file = tmp_path / "reference.json"
    file.write_text("[]")
    one = node(judged(file), "evaluator", False)
    assert one == node({**judged(file, retries=9), "cache_dir": "else"}, "evaluator", False)
    assert one != node(judged(file, order="both"), "evaluator", False)


def test_an_option_from_elsewhere_has_a_longer_name_and_hides_none(tmp_path):
    class Source:
        schema, path, provider = "file", str(tmp_path), "mypackage"

    (tmp_path / "edit").mkdir()
    (tmp_path / "edit" / "mine.yaml").touch()
    assert settings.option("edit", "mine", [Source]) == "mypackage:mine"
    assert settings.option("edit", "dare", [Source]) == "dare"
    (tmp_path / "edit" / "dare.yaml").touch()
    with pytest.raises(ValueError, match="edit=dare: .* has an option of this name"):
        settings.option("edit", "dare", [Source])


def test_a_key_needs_no_torch():
    program = """
import sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from deltalab import keys, settings
with initialize_config_dir(str(settings.conf_dir()), version_base="1.3"):
    found = compose("config", sys.argv[1:])
values = OmegaConf.to_container(found, resolve=True)
keys.determinants(values, keys.Choices("m", "e", "o"))
assert not {"torch", "timm", "transformers", "numpy"} & set(sys.modules)
"""
    for chosen in (["edit=dare"], ["model=tiny_llm", "edit=ties"]):
        subprocess.run([sys.executable, "-c", program, *chosen], check=True)


def test_documents_without_a_score_are_left_out_of_comparisons():
    found = compare({"m": [1.0, math.nan, 0.0]}, {"m": [0.0, 1.0, math.nan]})[0]
    assert (found.documents, found.first, found.second) == (1, 1.0, 0.0)


def test_records_of_version_1_are_found_again(tmp_path):
    """Three points as the code before these keys wrote them: none is run again."""
    (tmp_path / "records").mkdir()
    for file in (Path(__file__).parent / "version_1").glob("*.json"):
        shutil.copy(file, tmp_path / "records")
    changed = json.loads(next((tmp_path / "records").glob("*.json")).read_text())
    changed["config"]["seed"] = 5  # its key does not come out of this
    (tmp_path / "records" / "0123456789abcdef.json").write_text(json.dumps(changed))
    assert rekey.rekey(tmp_path) == (3, 1)
    assert len(list((tmp_path / "records" / "version-1").iterdir())) == 3
    arguments = ["riemann=both", "grid=none", f"results={tmp_path}"]
    points = [
        ["edit=dare"],
        ["edit=twin", "edit.rank=8", "edit.rate=null"],
        ["edit=expo", "edit.alpha=0.3", "model=mnist_vit_early"],
    ]
    for point in points:
        command = [sys.executable, "-m", "deltalab", *point, *arguments]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "done before" in shown.stdout
    assert rekey.rekey(tmp_path) == (0, 1)


GOLDEN = {
    "edit=dare": "e213620a64319fd7",
    "edit=dare edit.p=0.9 edit.k=-1 seed=3 select=proj": "a11a393201f67ed3",
    "edit=twin riemann=both prediction=on": "f259a26d18eaa869",
    "edit=chain model=fashion_vit evaluator=none": "6ae7ae0b36f7b525",
    "edit=ties model=tiny_llm": "9e1dbfe8d0c9790b",
    "edit=bitdelta_distilled model=tiny_llm_far evaluator/tasks=tiny": "4b8d8c6fa321c737",
    "edit=expo model=tiny_llm_dpo objective=dpo riemann=paper": "1e7f84df01c427cc",
    "edit=dare model=hf_llm model.dtype=bfloat16 model.pre=DIR/pre model.post=DIR/post"
    " data.path=DIR/rows.jsonl": "951dcd481427e526",
    "edit=dare model=timm_vit model.name=vit model.pre=DIR/pre model.post=DIR/post"
    " data.dir=DIR/images": "86fc67fcbc9d6c89",
    "edit=dare model=tiny_llm evaluator=alpaca_eval"
    " evaluator.reference=DIR/rows.jsonl": "e9d0b32993544c0d",
    "experiment=merging model=subset_family edit=keep merge=sum"
    " merge.weight=0.2": "28b17426a79e73de",
    "experiment=merging model=vit_family edit=keep merge=channel merge.groups=null"
    " merge.budget=0.75": "feb0e443006347c0",
    "experiment=sotu model=subset_family edit=keep merge=sum merge.weight=1"
    " evaluator=continual": "c3a7137e1404f616",
}
"""What no change of code may change: `keys.NEUTRAL` is for what is new, `version` for mended.

Those of families are of points that are committed.
"""


@pytest.mark.parametrize("overrides", GOLDEN)
def test_no_key_is_changed_by_accident(tmp_path, overrides):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for name in ("pre", "post"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        content = len(header).to_bytes(8, "little") + header + name.encode()[:4].ljust(4)
        (tmp_path / name / "model.safetensors").write_bytes(content)
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        (tmp_path / "images" / split / "cat" / "1.png").write_text(split)
    given = overrides.replace("DIR", str(tmp_path)).split()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", given, return_hydra_config=True)
        plain = compose("config", given)
    chosen = cfg.hydra.runtime.choices
    values = settings.tidy(options.plain(plain))
    choices = Choices(chosen["model"], chosen["edit"], chosen["objective"])
    assert key_of(determinants(values, choices)) == GOLDEN[overrides]


@pytest.mark.parametrize(
    "made",
    [
        {"_target_": "deltalab.data.images.Folder", "dir": "PLACE/images", "split": "val"},
        {
            "_target_": "deltalab.data.images.HubImages",
            "path": "imagefolder",
            "dir": "PLACE/images",
        },
        {"_target_": "deltalab.data.text.Plain", "path": "PLACE/a.jsonl"},
        {
            "_target_": "deltalab.models.timm_vit.TimmPair",
            "pre": "PLACE/m",
            "post": "PLACE/m/x.bin",
        },
        {"_target_": "deltalab.judging.alpaca_eval.AlpacaEval", "cache_dir": "PLACE/c"},
    ],
    ids=lambda made: made["_target_"].rpartition(".")[2],
)
def test_a_home_directory_may_be_written_either_way(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("images/val/cat/1.png", "a.jsonl", "m/x.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    both = [
        node({k: v.replace("PLACE", place) for k, v in made.items()}, "x", False)
        for place in ("~", str(tmp_path))
    ]
    assert both[0] == both[1]
    assert "PLACE" not in str(both)
    assert str(tmp_path) not in str(both)


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_what_the_reader_of_images_skips_is_in_no_key(name, tmp_path):
    """On the code before, a hidden directory among the classes changed the key."""
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_text(split)
    source = {"_target_": "deltalab.data.images.Folder", "dir": str(tmp_path)}
    for split in ("val", None):
        before = node({**source, "split": split}, "data", False)
        for place in (tmp_path / name, tmp_path / "val" / name, tmp_path / "val" / "cat" / name):
            place.mkdir(exist_ok=True)
            (place / "2.png").write_text("copy")
        assert node({**source, "split": split}, "data", False) == before
        shutil.rmtree(tmp_path / name)
        (tmp_path / "train" / "dog").mkdir(exist_ok=True)
    assert node({**source, "split": "val"}, "data", False) != before
