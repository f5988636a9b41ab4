import json
import subprocess
import sys
import time

import pytest

from deltalab.store import locks, records
from deltalab.sweep import status, sweeps

POINTS = [["edit=dare", f"seed={seed}"] for seed in range(6)]


@pytest.fixture
def results(tmp_path):
    """A sweep of six points: done, done, error record, no key, begun and died, not begun."""
    folder = tmp_path / "logs" / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    sweeps.write(folder, ["edit=dare", "seed=range(0,6)"], POINTS)
    for number in range(5):
        (folder / f"{number}").mkdir()
        if number != 3:
            sweeps.note(folder / f"{number}", sweeps.KEY, f"key{number}")
    for number, error in (
        (0, None),
        (1, None),
        (2, {"type": "RuntimeError", "message": "no\nluck"}),
    ):
        done = {"key": f"key{number}", "status": "error" if error else "ok", "error": error}
        done |= {"schema": 1, "model": "m", "edit": {"name": "dare"}, "loss": {"pre": 1.0}}
        records.write(tmp_path, done | {"seconds": {"total": 60.0}})
    sweeps.note(folder / "3", sweeps.FAILURE, "edit.p=2: must be less than 1")
    return tmp_path


def shown(capsys, *arguments):
    assert status.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_every_point_has_its_state(results, capsys):
    name, counts, *failures = shown(capsys, f"results={results}")
    assert name == "sweep 2026-01-01_00-00-00: deltalab -m edit=dare seed=range(0,6)"
    assert counts == (
        "2 of 6 done (33%), 2 failed, 2 missing; about 4 min in one process; none is running"
    )
    assert failures == [
        "  failed seed=2: RuntimeError: no luck",
        "  failed seed=3: edit.p=2: must be less than 1",
    ]
    listed = shown(capsys, f"results={results}", "list=missing")[2:]
    assert listed == ["  seed=4", "  seed=5"]


def test_a_live_lock_is_a_running_point_and_a_dead_one_is_not(results, capsys):
    with locks.held(records.lock_of(results, "key4")):
        _, counts, running, *_ = shown(capsys, f"results={results}")
    assert ", 1 running, 2 failed, 1 missing; about 4 min with the 1 process" in counts
    assert running.startswith("  running seed=4: process ")
    assert "running" not in shown(capsys, f"results={results}")[2]


def test_the_same_sweep_begun_again_knows_what_was_done(results, capsys):
    again = results / "logs" / "2026-01-02_00-00-00"
    again.mkdir()
    time.sleep(0.01)
    sweeps.write(again, ["seed=range(0,6)", "edit=dare"], [p[::-1] for p in POINTS])
    name, counts, *_ = shown(capsys, f"results={results}")
    assert "2026-01-02" in name
    assert counts.startswith("2 of 6 done (33%), 1 failed, 3 missing")
    name, *_ = shown(capsys, f"results={results}", "sweep=2026-01-01_00-00-00")
    assert "2026-01-01" in name


def test_a_broken_record_is_missing_and_a_broken_list_is_no_sweep(results, capsys):
    (results / "records" / "key0.json").write_text("{")
    assert "1 of 6 done" in shown(capsys, f"results={results}")[1]
    garbled = results / "records" / "key1.json"
    garbled.write_text('{"status": "ok", "schema": 1}')
    assert "0 of 6 done" in shown(capsys, f"results={results}")[1]
    garbled.write_text('{"status": "ok", "schema": 2}')
    assert "  failed seed=1: record of a newer version" in shown(capsys, f"results={results}")[2]
    (results / "logs" / "2026-01-01_00-00-00" / "points.json").write_text("[]")
    assert status.main([f"results={results}"]) == 2
    assert "no sweep in" in capsys.readouterr().err


def test_retry_runs_what_failed_and_nothing_else(results, capsys, monkeypatch):
    run = []

    def fake(command):
        run.append(command)
        return type("Finished", (), {"returncode": 2})

    monkeypatch.setattr("subprocess.run", fake)
    assert status.main([f"results={results}", "--retry-failed"]) == 2
    deltalab = [sys.executable, "-m", "deltalab", "edit=dare"]
    assert run == [[*deltalab, f"seed={seed}", f"results={results}"] for seed in (2, 3)]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("list=lost", "list=lost: must be one of done, running"),
        ("sweep=x", "sweep=x: no such sweep; the latest are 2026-01-01_00-00-00"),
        ("result=x", "result=x: must be results=DIR"),
        ("results=/nowhere", "results=/nowhere: no such directory"),
    ],
)
def test_a_mistake_is_one_line(results, capsys, argument, part):
    assert status.main([f"results={results}", argument]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def test_ten_thousand_points_take_little_time_and_memory(tmp_path, capsys):
    folder = tmp_path / "logs" / "sweep"
    folder.mkdir(parents=True)
    (tmp_path / "records").mkdir()
    count = 2000  # of the 10,000 that `experiments.scale.many` measures
    sweeps.write(folder, ["x"], [[f"seed={n}"] for n in range(count)])
    done = {"status": "ok", "schema": 1, "key": "k", "model": "m", "edit": {"name": "dare"}}
    done |= {"loss": {"pre": 1.0}, "seconds": {"total": 1.0}, "config": {"x": "y" * 4000}}
    text = json.dumps(done)
    for number in range(count):
        (folder / f"{number}").mkdir()
        sweeps.note(folder / f"{number}", sweeps.KEY, f"{number}")
        (tmp_path / "records" / f"{number}.json").write_text(text)
    code = (
        "import sys; from deltalab.sweep import status; status.main(sys.argv[1:]);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # kB
    )
    began = time.perf_counter()
    command = [sys.executable, "-c", code, f"results={tmp_path}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "2000 of 2000 done (100%)" in out
    assert time.perf_counter() - began < 10
    assert int(out.splitlines()[-1]) < 200_000
