"""The series of deltas: their recipe, and what is told of them."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from deltalab.models import embedded
from deltalab.models.zoo import EmbeddedVit
from deltalab.models.zoo_llm import EmbeddedLlm
from experiments.regime import runs, study
from experiments.zoo.train import Phase


def test_every_pair_of_the_recipe_is_told_with_its_size():
    told = json.loads(study.SIZES.read_text())
    assert [(row["run"], row["step"]) for row in told["pairs"]] == [*runs.names()]
    assert len(study.sizes()) == 36
    assert min(study.sizes().values()) < 0.005
    assert max(study.sizes().values()) > 0.8
    assert told["phases"].keys() == {**runs.IMAGES, **runs.TEXT}.keys()
    assert all(len(row["sha256"]) == 64 for row in told["pairs"])


@pytest.mark.parametrize("run", ["images_0.001", "text_0.001"])
def test_a_run_makes_pairs_that_open_and_is_not_made_twice(run, tmp_path, monkeypatch):
    kind = run.partition("_")[0]
    phase = replace({**runs.IMAGES, **runs.TEXT}[run], steps=2, batch=4)
    assert isinstance(phase, Phase) == (kind == "images")
    monkeypatch.setattr(runs, "IMAGES", {run: phase} if kind == "images" else {})
    monkeypatch.setattr(runs, "TEXT", {run: phase} if kind == "text" else {})
    monkeypatch.setitem(runs.KEPT, kind, (1, 2))
    monkeypatch.setattr(runs, "PROBLEMS", 4)
    rows = runs.make(tmp_path, say=lambda line: None)
    assert [row["step"] for row in rows] == [1, 2]
    files = [runs.place(tmp_path, run, step) for step in (1, 2)]
    assert [hashlib.sha256(f.read_bytes()).hexdigest() for f in files] == [
        row["sha256"] for row in rows
    ]
    before = [f.stat().st_mtime_ns for f in files]
    assert runs.make(tmp_path, say=lambda line: None) == rows
    assert [f.stat().st_mtime_ns for f in files] == before
    spec = EmbeddedVit("digits", "digits") if kind == "images" else EmbeddedLlm("sft")
    pair = replace(spec, weights=str(files[1])).open()
    pre = {n: t.double() for n, t in pair.pre.items()}
    off = sum(float((pair.post[n].double() - t).square().sum()) for n, t in pre.items())
    whole = sum(float(t.square().sum()) for t in pre.values())
    assert rows[1]["size"] == pytest.approx((off / whole) ** 0.5, rel=1e-6)
    base = load_file(
        embedded.ZOO / ("digits_pre.safetensors" if kind == "images" else "llm/base.safetensors")
    )
    assert all(torch.equal(t.float(), pair.pre[n]) for n, t in base.items())
