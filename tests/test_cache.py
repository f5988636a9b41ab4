import subprocess
import sys

import pytest
import torch

from deltalab import cache
from deltalab.artifacts import Store
from deltalab.store import eviction


@pytest.fixture
def results(tmp_path):
    store = Store(tmp_path / "artifacts", {})
    store.tensors("gradient", lambda: {"a": torch.zeros(10_000)})
    for line in range(3):
        store.keep_numbers("line", {"line": line}, {"slopes": {}})
    return tmp_path


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_kinds_counts_and_sizes_are_those_on_disk(results, capsys):
    assert cache.main([f"results={results}"]) == 0
    head, gradient, line, all_ = lines(capsys)
    assert head == ["kind", "count", "size", "last", "used"]
    on_disk = sum(f.stat().st_size for f in results.rglob("gradient/*/*"))
    assert gradient[:4] == ["gradient", "1", f"{on_disk / 1000:.1f}", "KB"]
    assert line[:2] == ["line", "3"]
    assert all_[:2] == ["all", "4"]


def test_clear_removes_a_kind_or_all(results, capsys):
    assert cache.main([f"artifacts={results / 'artifacts'}", "kind=line", "clear"]) == 0
    assert "removed 3 artefacts" in capsys.readouterr().out
    assert {e.kind for e in eviction.entries(results / "artifacts")} == {"gradient"}
    assert cache.main([f"results={results}", "clear"]) == 0
    assert list(eviction.entries(results / "artifacts")) == []


def test_a_largest_size_is_kept(results, capsys):
    assert cache.main([f"results={results}", "--max-size=1KB"]) == 0
    size = sum(entry.size for entry in eviction.entries(results / "artifacts"))
    assert 0 < size <= 1000
    assert cache.main([f"results={results}", "max-size=1KB"]) == 0
    assert "removed 0 artefacts, 0 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("clear=all", "clear=all: takes no value"),
        ("max-size=much", "max-size=much: must be a size as 500MB"),
        ("kind=gradents", "kind=gradents: none here; there are gradient, line"),
        ("size=3", "size=3: must be results=DIR"),
        ("artifacts=/nowhere", "/nowhere: no such directory"),
    ],
)
def test_a_mistake_is_one_line(results, capsys, argument, part):
    assert cache.main([f"results={results}", argument]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1
    assert len(list(eviction.entries(results / "artifacts"))) == 4


def test_it_starts_without_torch():
    code = "import sys, deltalab.cache, deltalab.sweep.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("words", [["clear"], ["max-size=0"], []])
def test_a_directory_of_somebody_else_is_refused(tmp_path, words):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "thesis.tex").write_text("mine")
    command = [sys.executable, "-m", "deltalab.cache", f"artifacts={tmp_path}", *words]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert "holds 'models', which is none of deltalab's" in run.stderr
    assert (tmp_path / "models" / "thesis.tex").read_text() == "mine"


def test_clearing_follows_no_link_and_spares_what_is_not_ours(results):
    home = results / "home"
    home.mkdir()
    thesis = home / "thesis.tex"
    thesis.write_text("mine")
    note = results / "artifacts" / "line" / "note.txt"
    note.write_text("mine")
    (results / "artifacts" / "curvature").symlink_to(home)
    command = [sys.executable, "-m", "deltalab.cache", f"results={results}", "clear"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0
    assert "removed 4 artefacts" in run.stdout
    assert (thesis.read_text(), note.read_text()) == ("mine", "mine")
