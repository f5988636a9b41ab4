"""Sweeps that share a results directory, and sweeps that are asked to stop."""

import json
import os
import signal
import subprocess
import sys

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from deltalab.keys import Choices
from deltalab.run.building import prepare
from deltalab.settings import conf_dir
from deltalab.store import locks, records

RATES = [0.1, 0.3, 0.5, 0.7]
POINTS = ["edit=dare", "grid=none", "edit.p=0.1,0.3,0.5,0.7", "evaluator=none", "riemann=off"]
CHOICES = ("mnist_vit", "dare", "classification")
FAST = ["data.objective.limit=16"]
HOLD = """
import sys, time
from pathlib import Path
from deltalab.store import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start(results, *arguments):
    command = [sys.executable, "-m", "deltalab", "-m", *POINTS, *FAST, *arguments]
    return subprocess.Popen(
        [*command, f"results={results}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def done_in(results):
    """Return the finished points' drop rates."""
    found = [json.loads(f.read_text()) for f in (results / "records").glob("*.json")]
    assert {r["status"] for r in found} <= {"ok"}
    return sorted(r["edit"]["p"] for r in found)


def test_points_that_stand_for_all_when_a_sweep_is_checked():
    from hydra_plugins.deltalab_sweeper import representatives

    points = [[f"edit={edit}", f"seed={n}"] for edit in ("dare", "expo") for n in range(1000)]
    points += [["edit=dare", "+seed=1"], ["~edit"], ["data@data.test=a"], ["data@data.test=b"]]
    points += [["edit=dare", "seed=1", f"hydra.job.name={name}"] for name in "ab"]
    found = list(representatives(points, {"edit", "data"}.__contains__))
    assert found == [points[0], points[1000], *points[2000:]]


def test_points_that_have_all_values_of_a_sweep():
    from hydra_plugins.deltalab_sweeper import distinct

    points = [
        [f"model={m}", f"edit.p={p}", f"edit.k={k}", f"seed={s}"]
        for m in "abc" for p in range(9) for k in range(5) for s in range(3)
    ]  # fmt: skip
    found = list(distinct(points, {"model", "edit"}.__contains__))
    assert len(found) == 3 * (45 + 2)
    assert {tuple(p[:3]) for p in points} == {tuple(p[:3]) for p in found}
    assert {(p[0], p[3]) for p in points} == {(p[0], p[3]) for p in found}
    assert list(distinct([["edit=a"], ["edit=b"]], {"edit"}.__contains__)) == [
        ["edit=a"],
        ["edit=b"],
    ]


def test_two_sweeps_share_the_points(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    lines = [line for sweep in both for line in sweep.communicate()[0].splitlines()]
    assert [sweep.returncode for sweep in both] == [0, 0]
    assert done_in(tmp_path) == RATES
    assert len(lines) == 8
    assert sum("done before" in line for line in lines) == 4, "each point ran once, in either"
    assert locks.all_held(tmp_path / "locks") == {}


def test_a_point_that_another_process_runs_comes_last(tmp_path):
    arguments = [*POINTS[:2], "edit.p=0.1", *POINTS[3:], *FAST]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("config", [*arguments, f"results={tmp_path}"])
    key = prepare(OmegaConf.to_container(cfg, resolve=True), Choices(*CHOICES)).key
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(records.lock_of(tmp_path, key))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    sweep = start(tmp_path)
    assert "1 point of this sweep" in sweep.stderr.readline()
    assert done_in(tmp_path) == RATES[1:], "the others ran meanwhile"
    holder.kill()
    out, err = sweep.communicate()
    assert sweep.returncode == 0, err
    assert done_in(tmp_path) == RATES
    assert "p=0.1" in out.splitlines()[-1]


def test_sigterm_stops_after_the_point_at_hand(tmp_path):
    sweep = start(tmp_path)
    sweep.stdout.readline()  # the first point is recorded
    sweep.send_signal(signal.SIGTERM)
    err = sweep.communicate()[1]
    assert sweep.returncode == 143
    assert err.splitlines()[-1].startswith("deltalab: stopped; finished points are recorded")
    done = done_in(tmp_path)
    assert 1 <= len(done) < 4
    assert locks.all_held(tmp_path / "locks") == {}
    again = start(tmp_path)
    assert again.communicate()[0].count("done before") == len(done)
    assert done_in(tmp_path) == RATES


TIDIED = """
import os, signal, sys
from deltalab import cli
from deltalab.sweep import composing, stopping

def composed():
    with stopping.working():
        pass
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        raise AttributeError("what tidies up met the half of a config")

composing.guarded = composed
sys.argv = ["deltalab", "edit=dare"]
cli.main()
"""


def test_sigterm_in_the_midst_of_what_raises_an_error_of_its_own_is_still_a_stop():
    """OmegaConf, interrupted while it copies a config, raises an AttributeError instead."""
    found = subprocess.run([sys.executable, "-c", TIDIED], capture_output=True, text=True)
    assert found.returncode == 143, found.stderr
    assert found.stderr.splitlines()[-1].startswith("deltalab: stopped; finished points")


def test_a_grid_may_set_null(tmp_path):
    sweeps = "sweeps=[{edit: twin, edit.rank: null, edit.rate: '0.5,0.9'}]"
    command = [sys.executable, "-m", "deltalab", "-m", sweeps, "plan=true", f"results={tmp_path}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("points       2, of which 0 are finished")
