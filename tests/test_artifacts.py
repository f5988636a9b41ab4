import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from deltalab.artifacts import Store
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
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [eviction.MARKER]


def test_numbers_keep_every_bit_and_the_last_one_wins(tmp_path):
    store, extra = Store(tmp_path, {"pair": "x"}), {"line": "expo"}
    assert store.numbers("line", extra) is None
    value = {"slopes": {repr(0.1 + 0.2): {"w": 1 / 3}}}
    store.keep_numbers("line", extra, {})
    store.keep_numbers("line", extra, value)
    assert Store(tmp_path, {"pair": "x"}).numbers("line", extra) == value
    assert store.numbers("line", {"line": "dare"}) is None
    (file,) = tmp_path.glob("line/*.json")
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
from deltalab.artifacts import Store

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


def test_what_is_made_is_not_evicted(tmp_path):
    filled(tmp_path)
    with locks.held(eviction.lock_of(tmp_path, "gradient", path_of(tmp_path, 2).name)):
        assert len(eviction.evict(tmp_path, 0)) == 3
    assert kept(tmp_path) == [2]


SHRUNK = """
import sys, torch
from deltalab.artifacts import Store

store = Store(sys.argv[1], {})
store.tensors("gradient", lambda: {"a": torch.ones(1 << 20)})
found = store.tensors("gradient", lambda: sys.exit("not kept"))
with open(next(store._path("gradient", {}).glob("data.*")), "r+b") as file:
    file.truncate(0)  # as a network file system takes from a reader what another node removes
print(found["a"].sum().item())
"""


def test_what_was_read_does_not_end_with_its_file(tmp_path):
    run = subprocess.run([sys.executable, "-c", SHRUNK, str(tmp_path)], capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"1048576.0\n")  # mapped: SIGBUS, which is -7


def test_what_a_dead_writer_left_goes_after_a_day(tmp_path):
    filled(tmp_path, 1)
    name = path_of(tmp_path, 0).name
    old, new, other = (tmp_path / "gradient" / f".{n}.x" for n in (name, name[::-1], "thesis"))
    for path in (old, new, other):
        path.mkdir()
        (path / "data.safetensors").write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    eviction.evict(tmp_path, 1e9)
    assert not old.exists()
    assert new.exists()
    assert other.exists()  # no name of ours


def foreign(root):
    """Put a person's things into every place of a store; return all that must stay."""
    things = ["project/.git/HEAD", ".env", "gradient/thesis.tex", "gradient/.env", "line/x.json"]
    things += ["gradient/.cache/weights.bin", f"gradient/{'0' * 16}/notes.txt", "records/0.json"]
    things += [f"records/{'1' * 16}.json", f"gradient/.{'2' * 16}.mine/deep/notes.txt"]
    files = [root / thing for thing in things]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    (root / "gradient" / ("0" * 16) / "data.safetensors").write_text("mine")
    (root / "gradient" / ("0" * 16) / "manifest.json").write_text("mine")
    for path in [*root.rglob("*"), root]:
        os.utime(path, (0, 0), follow_symlinks=False)
    return files


def test_a_store_removes_nothing_but_its_own_names(tmp_path):
    filled(tmp_path)
    files = foreign(tmp_path)
    assert len(eviction.evict(tmp_path, 0)) == 4
    assert kept(tmp_path) == []
    assert all(file.read_text() == "mine" for file in files)
    assert len(list((tmp_path / "gradient" / ("0" * 16)).iterdir())) == 3


@pytest.mark.parametrize("link", ["gradient", "artefact", "file", "data", "temporary", "locks"])
def test_a_store_follows_no_link(tmp_path, link):
    root, home = tmp_path / "store", tmp_path / "home"
    filled(root, 1)
    key = path_of(root, 0).name
    target = home / key if link in ("gradient", "artefact", "temporary") else home
    target.mkdir(parents=True)
    for name in ("data.safetensors", "manifest.json", "thesis.tex", f"{key}.json"):
        for place in {home, target}:
            (place / name).write_text("mine")
    place, leads = {
        "gradient": (root / "gradient", home),
        "artefact": (root / "gradient" / ("0" * 16), target),
        "file": (root / "line" / f"{key}.json", home / f"{key}.json"),
        "data": (root / "gradient" / key / "data.safetensors", home / "data.safetensors"),
        "temporary": (root / "gradient" / f".{key}.left", target),
        "locks": (root / "locks", home),
    }[link]
    if place.exists():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(leads)
    before = {path: path.lstat() for path in (home, *home.rglob("*"))}
    os.utime(place, (0, 0), follow_symlinks=False)
    eviction.evict(root, 0)
    store = Store(root, {"number": 0})
    store.tensors("gradient", Counted(tensors()))
    store.keep_numbers("line", {}, {"a": 1})
    eviction.evict(root, 0)
    assert {path: path.lstat() for path in (home, *home.rglob("*"))} == before


@pytest.mark.parametrize("thing", [".git", "notes.txt", "records", "gradient/thesis.tex", "l"])
def test_a_directory_with_other_things_is_refused_before_anything_is_written(tmp_path, thing):
    if thing == "l":
        (tmp_path / "gradient").symlink_to(tmp_path)
    else:
        (tmp_path / thing).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    compute = Counted(tensors())
    with pytest.raises(ValueError, match=r"artifacts=.*: holds '.*', which is none of deltalab's"):
        Store(tmp_path, {}).tensors("gradient", compute)
    with pytest.raises(ValueError, match="which is none of deltalab's"):
        eviction.evict(tmp_path, 0)
    assert (compute.calls, sorted(tmp_path.rglob("*"))) == (0, before)


def test_a_store_from_before_there_were_markers_is_taken_over(tmp_path):
    filled(tmp_path)
    Store(tmp_path, {}).keep_numbers("line", {}, {"a": 1})
    (tmp_path / "line" / ".abcd_efg.tmp").write_text("{")
    (tmp_path / eviction.MARKER).unlink()
    assert eviction.evict(tmp_path, 0) == []
    assert Store(tmp_path, {}).numbers("line", {}) == {"a": 1}
    eviction.claim(tmp_path)
    assert len(eviction.evict(tmp_path, 0)) == 5


@pytest.mark.parametrize(
    ("marker", "message"), [('{"format": 2}', "a store of format 2"), ("[]", "is damaged")]
)
def test_a_store_of_another_version_is_left_alone(tmp_path, marker, message):
    filled(tmp_path, 1)
    (tmp_path / eviction.MARKER).write_text(marker)
    for work in (eviction.claim, lambda root: eviction.evict(root, 0)):
        with pytest.raises(ValueError, match=message):
            work(tmp_path)
    assert kept(tmp_path, 1) == [0]


def test_a_point_refuses_a_shared_directory_in_one_line(tmp_path):
    """The command itself: exit code 2, nothing computed, nothing touched."""
    shared = tmp_path / "shared"
    files = foreign(shared)
    before = {path: path.lstat().st_mtime for path in shared.rglob("*")}
    fast = ["edit=dare", "evaluator=none", "data.objective.limit=8", f"results={tmp_path / 'r'}"]
    command = [sys.executable, "-m", "deltalab", *fast, f"artifacts={shared}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"deltalab: artifacts={shared}: holds '")
    assert run.stderr.count("\n") == 1
    assert not list((tmp_path / "r").glob("records/*.json"))
    assert {path: path.lstat().st_mtime for path in shared.rglob("*")} == before
    assert all(file.read_text() == "mine" for file in files)


def test_a_store_that_cannot_be_written_costs_time_and_no_point(tmp_path, caplog):
    root = tmp_path / "file"
    root.write_text("not a directory")
    compute, store = Counted(tensors()), Store(root, {})
    assert torch.equal(store.tensors("gradient", compute)["a"], tensors()["a"])
    store.keep_numbers("line", {}, {"a": 1})
    assert store.numbers("line", {}) is None
    assert "could not be kept" in caplog.text
