import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from deltalab.loss.artifacts import Store
from deltalab.store import eviction, locks


def tensors():
    torch.manual_seed(0)
    shared = torch.randn(3, 4)
    return {"b": shared, "a": torch.randn(5).double(), "tied": shared, "half": torch.ones(2).half()}


class Counted:
    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def only(root):
    (path,) = root.rglob("data.safetensors")
    return path


def test_computed_once_and_read_back_bitwise_in_order_with_its_ties(tmp_path):
    compute = Counted(tensors())
    first = Store(tmp_path, {"pair": "x"}).tensors("gradient", compute)
    again = Store(str(tmp_path), {"pair": "x"}).tensors("gradient", compute)
    assert compute.calls == 1
    assert list(first) == list(again) == ["b", "a", "tied", "half"]
    for name, value in tensors().items():
        assert again[name].dtype == value.dtype
        assert torch.equal(again[name], value)
    assert again["tied"] is again["b"]
    assert not list(tmp_path.rglob(".*"))


def test_other_determinants_or_kinds_are_other_artefacts(tmp_path):
    compute = Counted(tensors())
    for determinants, kind in [({"pair": "x"}, "gradient"), ({"pair": "y"}, "gradient")]:
        Store(tmp_path, determinants).tensors(kind, compute)
    Store(tmp_path, {"pair": "x"}).tensors("reference", compute)
    assert compute.calls == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "no data", "no manifest", "bad manifest"])
def test_a_damaged_artefact_is_computed_again(tmp_path, damage):
    compute, store = Counted(tensors()), Store(tmp_path, {})
    store.tensors("gradient", compute)
    data = only(tmp_path)
    manifest = data.parent / "manifest.json"
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
    elif damage == "truncate":
        data.write_bytes(data.read_bytes()[:-4])
    elif damage == "bad manifest":
        manifest.write_text("{")
    else:
        (data if damage == "no data" else manifest).unlink()
    assert torch.equal(store.tensors("gradient", compute)["a"], tensors()["a"])
    assert compute.calls == 2
    store.tensors("gradient", compute)
    assert compute.calls == 2


def test_a_failing_computation_leaves_nothing(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(RuntimeError, match="half way"):
        store.tensors("gradient", lambda: (_ for _ in ()).throw(RuntimeError("half way")))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_numbers_keep_every_bit_and_the_last_one_wins(tmp_path):
    store, extra = Store(tmp_path, {"pair": "x"}), {"line": "expo"}
    assert store.numbers("line", extra) is None
    value = {"slopes": {repr(0.1 + 0.2): {"w": 1 / 3}}}
    store.keep_numbers("line", extra, {})
    store.keep_numbers("line", extra, value)
    assert Store(tmp_path, {"pair": "x"}).numbers("line", extra) == value
    assert store.numbers("line", {"line": "dare"}) is None
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text().replace("0.333", "0.334"))
    assert store.numbers("line", extra) is None


def test_without_a_root_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compute, store = Counted(tensors()), Store(None, {})
    store.tensors("gradient", compute)
    store.tensors("gradient", compute)
    store.keep_numbers("line", {}, {"a": 1})
    assert (compute.calls, store.numbers("line", {}), list(tmp_path.iterdir())) == (2, None, [])


def write_many(root, mark):
    store = Store(root, {})
    for _ in range(30):
        store.keep_numbers("line", {}, {"mark": mark, "fill": [mark] * 200})
        value = store.numbers("line", {})
        assert value is None or value["fill"] == [value["mark"]] * 200


def test_two_processes_never_leave_a_mixture(tmp_path):
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=write_many, args=(tmp_path, mark)) for mark in (1, 2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0, 0]
    assert Store(tmp_path, {}).numbers("line", {})["mark"] in (1, 2)


SLOW = """
import sys, time, torch
from deltalab.loss.artifacts import Store

def compute():
    with open(sys.argv[2], "a") as file:
        file.write("computed\\n")
    time.sleep(1.5)
    return {"a": torch.arange(3.0)}

print(Store(sys.argv[1], {}).tensors("gradient", compute)["a"].tolist())
"""


def test_of_two_processes_one_computes_and_the_other_waits_and_reads(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", SLOW, str(tmp_path / "store"), str(log)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate()[0] for one in both] == ["[0.0, 1.0, 2.0]\n"] * 2
    assert log.read_text() == "computed\n"
    assert not list((tmp_path / "store" / "locks").iterdir())


def filled(root, count=4):
    """A store of artefacts of about 4 kB, the first of them used the longest time ago."""
    for number in range(count):
        store = Store(root, {"number": number})
        store.tensors("gradient", lambda: {"a": torch.zeros(1000)})
        age(root, number, 3600 * (count - number))
    for data in list(eviction._pins):
        os.close(eviction._pins.pop(data))


def path_of(root, number):
    return Store(root, {"number": number})._path("gradient", {})


def age(root, number, seconds):
    then = time.time() - seconds
    os.utime(path_of(root, number) / "manifest.json", (then, then))


def kept(root, count=4):
    return [number for number in range(count) if path_of(root, number).exists()]


def test_the_least_recently_used_go_first(tmp_path):
    filled(tmp_path)
    Store(tmp_path, {"number": 0}).tensors("gradient", lambda: pytest.fail("it is there"))
    size = max(entry.size for entry in eviction.entries(tmp_path))
    assert len(eviction.evict(tmp_path, 2.5 * size)) == 2
    assert kept(tmp_path) == [0, 3]


def test_a_new_artefact_makes_room_for_itself(tmp_path):
    filled(tmp_path)
    size = max(entry.size for entry in eviction.entries(tmp_path))
    store = Store(tmp_path, {"number": 4}, most_bytes=3 * size)
    store.tensors("gradient", lambda: {"a": torch.zeros(1000)})
    assert kept(tmp_path, 5) == [2, 3, 4]


@pytest.mark.parametrize(("setting", "kinds"), [("0", set()), ("null", {"gradient"})])
def test_a_point_bounds_the_store_by_its_setting(tmp_path, monkeypatch, setting, kinds):
    from deltalab import cli

    fast = ["data.test.limit=8", "data.objective.limit=8", "riemann=off", "evaluator=none"]
    arguments = ["prediction=on", *fast, f"artifacts_gb={setting}", f"results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["deltalab", "edit=expo", *arguments])
    cli.main()
    found = {entry.kind for entry in eviction.entries(tmp_path / "artifacts")}
    assert found & {"gradient"} == kinds
    assert len(list((tmp_path / "records").glob("*.json"))) == 1


def test_what_is_read_or_made_is_not_evicted(tmp_path):
    filled(tmp_path)
    Store(tmp_path, {"number": 1}).tensors("gradient", lambda: pytest.fail("it is there"))
    age(tmp_path, 1, 1e6)
    with locks.held(eviction.lock_of(tmp_path, "gradient", path_of(tmp_path, 2).name)):
        assert len(eviction.evict(tmp_path, 0)) == 2
    assert kept(tmp_path) == [1, 2]


def test_what_a_dead_writer_left_goes_after_a_day(tmp_path):
    filled(tmp_path, 1)
    old, new = tmp_path / "gradient" / ".old.x", tmp_path / "gradient" / ".new.x"
    for path in (old, new):
        path.mkdir()
        (path / "data.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    eviction.evict(tmp_path, 1e9)
    assert not old.exists()
    assert new.exists()


def test_a_store_that_cannot_be_written_costs_time_and_no_point(tmp_path, caplog):
    root = tmp_path / "file"
    root.write_text("not a directory")
    compute, store = Counted(tensors()), Store(root, {})
    assert torch.equal(store.tensors("gradient", compute)["a"], tensors()["a"])
    store.keep_numbers("line", {}, {"a": 1})
    assert store.numbers("line", {}) is None
    assert "could not be kept" in caplog.text
