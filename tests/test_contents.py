"""Digests of what a key names: every byte counts, and a remembered digest never lies."""

import json
import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deltalab import keys
from deltalab.store import digests, latest
from deltalab.weights import contents

pytestmark = pytest.mark.meaning("contents edited in place")


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digests._tables.clear()
    yield
    digests._tables.clear()


def settled(path):
    """Make a file look as if it had been written a minute ago."""
    past = time.time_ns() - 60 * 10**9
    os.utime(path, ns=(past, past))
    return path


def test_one_bit_of_any_tensor_counts(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(64, 64) for i in range(200)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    marks = {contents.of_checkpoint(file)}
    size = file.stat().st_size
    for place in np.linspace(30_000, size - 1, 40).astype(int):
        raw = bytearray(file.read_bytes())
        raw[place] ^= 1
        file.write_bytes(raw)
        marks.add(contents.of_checkpoint(file))
        raw[place] ^= 1
        file.write_bytes(raw)
    assert len(marks) == 41


def test_shards_and_order_do_not_count_but_names_dtypes_and_shapes_do(tmp_path):
    a, b = torch.arange(6.0), torch.arange(4.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    save_file({"a": a, "b": b}, whole / "model.safetensors")
    save_file({"b": b}, parts / "model-00001-of-00002.safetensors")
    save_file({"a": a}, parts / "model-00002-of-00002.safetensors")
    places = {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    mark = contents.of_checkpoint(whole)
    assert contents.of_checkpoint(parts) == mark
    others = [{"a": a, "c": b}, {"a": a.reshape(2, 3), "b": b}, {"a": a.view(torch.int32), "b": b}]
    for number, other in enumerate(others):
        save_file(other, tmp_path / f"{number}.safetensors")
        assert contents.of_checkpoint(tmp_path / f"{number}.safetensors") != mark


def test_a_digest_is_remembered_and_a_changed_file_is_read_again(tmp_path, monkeypatch):
    file = tmp_path / "data"
    file.write_text("one")
    settled(file)
    reads = []
    original = digests._hashed
    monkeypatch.setattr(digests, "_hashed", lambda p: reads.append(p) or original(p))
    first = digests.of_file(file)
    assert digests.of_file(file) == first
    assert len(reads) == 1
    digests._tables.clear()  # another process
    assert digests.of_file(file) == first
    assert len(reads) == 1
    assert digests.of_file(file, full=True) == first
    assert len(reads) == 2
    file.write_text("two")
    settled(file)
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 5))
    assert digests.of_file(file) != first


def test_a_young_file_is_never_trusted(tmp_path):
    file = tmp_path / "data"
    file.write_text("one")
    stamp = file.stat()
    first = digests.of_file(file)
    file.write_text("two")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # a clock that is too coarse
    assert digests.of_file(file) != first


def test_an_unwritable_memory_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file stands there")
    file = tmp_path / "data"
    file.write_text("one")
    settled(file)
    assert digests.of_file(file) == digests.of_file(file)


def test_a_directory_is_known_by_all_its_files(tmp_path):
    root = tmp_path / "images"
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", ".git/config"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "train" / "up").symlink_to(root)  # a circle
    node = {"_target_": "deltalab.data.images.Folder", "dir": str(root), "split": "val"}
    node["class_map"] = str(root / "map.json")
    marks = []
    for change in (
        lambda: None,
        lambda: (root / "val/cat/1.png").write_text("repainted"),
        lambda: (root / "val/cat/2.png").write_text("more"),
        lambda: (root / "train/eel").mkdir(),  # numbers the classes otherwise
        lambda: (root / "map.json").write_text('{"cat": 1}'),
        lambda: (root / "map.json").write_text('{"cat": 2}'),
    ):
        change()
        marks.append(json.dumps(keys.node(node, "data", False)))
    assert len(set(marks)) == len(marks)
    (root / ".git/config").write_text("other")
    assert json.dumps(keys.node(node, "data", False)) == marks[-1]


@pytest.mark.parametrize("source", ["Problems", "Chats", "Plain", "Preferences"])
def test_a_data_file_edited_in_place_is_another_content(tmp_path, source):
    file = tmp_path / "a.jsonl"
    node = {"_target_": f"deltalab.data.text.{source}", "path": str(file)}
    marks = []
    for text in ("one", "two", "one"):
        file.write_text(text)
        marks.append(keys.node(node, "data", False))
    assert marks[0] == marks[2] != marks[1]
    assert keys.node({**node, "path": "org/name"}, "data", False)["path"] == "org/name"


def test_tasks_and_their_data_count(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "tasks").mkdir()
    node = {"_target_": "deltalab.evaluators.lm_eval.LmEval", "tasks": ["mine"]}
    node |= {"include": [str(tmp_path / "tasks")], "data_dir": str(tmp_path / "data")}
    marks = [keys.node(node, "evaluator", False)]
    for file in ("data/test.jsonl", "tasks/mine.yaml"):
        (tmp_path / file).write_text("x")
        marks.append(keys.node(node, "evaluator", False))
    assert len({json.dumps(mark) for mark in marks}) == 3


def test_what_is_open_is_opened_anew_when_its_content_changes():
    made = []

    @latest.latest("test pair")
    def pair(name):
        made.append(name)
        return object()

    @latest.latest("test reference", "test pair")
    def reference(name):
        return pair(name)

    latest.stamp(**{"test pair": "content one"})
    first = reference("a")
    assert reference("a") is first
    latest.stamp(**{"test pair": "content two"})
    second = reference("a")
    assert second is not first
    pair("b")  # lets go of what held the pair before
    assert "test reference" not in latest._held
    assert made == ["a", "a", "b"]


def test_the_old_is_let_go_before_the_new_is_made():
    class Model:
        alive = 0

        def __init__(self):
            Model.alive += 1
            assert Model.alive == 1, "two models at once"

        def __del__(self):
            Model.alive -= 1

    @latest.latest("test model")
    def opened(name):
        return Model()

    for name in "aba":
        opened(name)
    latest.forget("test model")
    assert Model.alive == 0
