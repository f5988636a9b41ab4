"""The digest that a stream takes as it reads is that of the files, by hashing each byte once."""

import os
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_apply import tensor, write

from deltalab.apply import stream
from deltalab.checkpoints import hashing as module
from deltalab.checkpoints.hashing import Hashing
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.expo import Expo
from deltalab.edits.multibit import Multibit
from deltalab.edits.ties import Ties
from deltalab.store import digests
from deltalab.weights import contents, shards

EDITS = [
    Dare(p=0.5, k=0.0),
    BitDelta(multiple=1.0, magnitudes="mean", cv=0.0, axis="row"),
    Multibit(bits=2, blocks="equal_count"),
    Ties(keep=0.2, scope="model"),
]


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digests._tables.clear()
    yield
    digests._tables.clear()


@pytest.fixture
def pair(tmp_path):
    """Two shards a side, written a minute ago; post has more rows, both have empty tensors."""
    for name, shift, rows in (("pre", 0.0, 40), ("post", 0.1, 44)):
        write(tmp_path / name, shift, vocabulary=rows)
        more = {"empty": torch.zeros(0, 4), "one": torch.tensor(1.0)}
        (file,) = (tmp_path / name).glob("*-00002-of*")
        save_file(load_file(file) | more, file)
        index = tmp_path / name / "model.safetensors.index.json"
        known = {n: f.name for f in sorted(index.parent.glob("*.safetensors")) for n in names(f)}
        index.write_text(f'{{"weight_map": {known}}}'.replace("'", '"'))
        settled(tmp_path / name)
    return tmp_path / "pre", tmp_path / "post"


def names(file):
    return shards.entries(file)


def settled(directory):
    past = time.time_ns() - 60 * 10**9
    for file in directory.iterdir():
        os.utime(file, ns=(past, past))


@pytest.fixture
def hashed(monkeypatch):
    """Count the bytes that are hashed of every file in the pass; none may be hashed apart."""
    seen: Counter[str] = Counter()
    feed = module._Tensor._feed

    def counted(self, stop, hashing):
        before = self.at
        feed(self, stop, hashing)
        seen[self._file.parent.name] += self.at - before

    def apart(file):
        raise AssertionError(f"{file} was read once more")

    monkeypatch.setattr(module._Tensor, "_feed", counted)
    monkeypatch.setattr(contents, "_tensors", apart)
    return seen


def made(pair, out, edit, **more):
    given = {"select": "matrices", "seed": 0, "mismatch": "truncate", **more}
    return stream.stream(*pair, out, edit, **given)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slice_size", [100, 1 << 22])
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_every_byte_is_hashed_once_in_the_pass(
    edit, slice_size, threads, pair, hashed, tmp_path, monkeypatch
):
    sizes = {
        path.name: sum(e.size for f in path.glob("*.safetensors") for e in names(f).values())
        for path in pair
    }
    before = torch.get_num_threads()
    monkeypatch.setattr(shards, "SLICE", slice_size)
    torch.set_num_threads(threads)
    try:
        manifest = made(pair, tmp_path / "out", edit)
    finally:
        torch.set_num_threads(before)
    assert dict(hashed) == sizes
    again = made(pair, tmp_path / "again", edit)
    assert dict(hashed) == sizes, "remembered by the first"
    assert again["post"] == manifest["post"]
    remembered = [contents.of_checkpoint(path) for path in pair]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    digests._tables.clear()
    expected = [contents.of_checkpoint(path, full=True) for path in pair]
    assert [manifest["pre"]["digest"], manifest["post"]["digest"]] == expected == remembered


def test_young_files_are_hashed_in_the_pass_and_not_remembered(pair, hashed, tmp_path, monkeypatch):
    for path in pair:
        for file in path.iterdir():
            os.utime(file)
    first = made(pair, tmp_path / "out", EDITS[0])
    once = dict(hashed)
    assert made(pair, tmp_path / "again", EDITS[0])["pre"] == first["pre"]
    assert dict(hashed) == {name: 2 * count for name, count in once.items()}


def test_a_side_that_is_remembered_is_not_hashed(pair, request, tmp_path):
    digest = contents.of_checkpoint(pair[0])
    hashed = request.getfixturevalue("hashed")
    assert made(pair, tmp_path / "out", EDITS[0])["pre"]["digest"] == digest
    assert list(hashed) == ["post"]


def test_an_edit_that_fails_leaves_nothing_remembered(pair, tmp_path, monkeypatch):
    class Angry(Expo):
        def __call__(self, delta):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        made(pair, tmp_path / "out", Angry(alpha=0.5), kernel="eager")
    files = [file for path in pair for file in contents.files_of(path)]
    assert [digests.recalled(file, contents.TENSORS) for file in files] == [None] * 4


def test_pieces_in_any_order_and_twice(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": tensor((500, 11)), "v": tensor((77,))}, file)
    found = names(file)
    entry, size = found["w"], found["w"].size
    cuts = [*range(0, size, 1000), size]
    pieces = list(pairwise(cuts))
    for order in (pieces[::-1], pieces[1::2] + pieces[::2] * 2, pieces[3:9], []):
        taking = Hashing([tmp_path])
        for piece in order:
            taking.read(entry, *piece)
        assert taking.finish() == {file: contents._tensors(file)}


def test_pieces_that_are_at_hand_are_not_read_again(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_file({"w": tensor((500, 11))}, file)
    entry = names(file)["w"]
    octets = memoryview(file.read_bytes())[entry.begin :]
    pieces = list(pairwise([*range(0, entry.size, 1000), entry.size]))
    feed, fed = module._Tensor._feed, []

    def counted(self, stop, hashing):
        fed.append(stop - self.at)
        feed(self, stop, hashing)

    monkeypatch.setattr(module._Tensor, "_feed", counted)
    late = [*pieces[:5], pieces[6], pieces[5], *pieces[7:], *pieces]
    for order, again in ((pieces, 0), (late, 1000), (pieces[3:], entry.size)):
        taking = Hashing([tmp_path])
        fed.clear()
        for start, stop in order:
            taking.read(entry, start, stop, octets[start:stop])
        assert taking.finish() == {file: contents._tensors(file)}
        assert sum(fed) == again


def test_what_changes_meanwhile_is_read_again(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": tensor((50, 11))}, file)
    settled(tmp_path)
    taking = Hashing([file])
    save_file({"w": tensor((50, 11), seed=1)}, file)
    settled(tmp_path)
    os.utime(file, ns=(1, 10**9))
    taking.finish()
    assert digests.recalled(file, contents.TENSORS) is None


def test_stopped_it_comes_to_an_end(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_file({"w": tensor((50, 11))}, file)
    taking = Hashing([file])
    taking.stop()
    taking.read(names(file)["w"], 0, 50 * 44)
    assert taking._tensors[file]["w"].at == 0
