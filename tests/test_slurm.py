"""A sweep on a real SLURM of one node: `pytest -m slurm`, as root, with Debian's slurm-wlm."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("slurmctld") or not shutil.which("munged"),
        reason="needs root and a SLURM: experiments/slurm/one_node.sh install",
    ),
]
ONE_NODE = Path(__file__).parents[1] / "experiments" / "slurm" / "one_node.sh"
FAST = ["data.test.limit=32", "data.objective.limit=32", "riemann=off", "evaluator=none"]
EIGHT = ["edit=dare", "grid=none", "edit.p=0.1,0.3,0.5,0.7", "seed=1,2"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]
# The fourth point of a task sleeps where the test's own file says so.
SLEEPER = """
import os, time
from pathlib import Path
if "SLURM_JOB_ID" in os.environ:
    from deltalab import cli
    original = cli._run
    def slow(cfg, *rest):
        sleep = Path(os.environ["SLEEP"])
        if sleep.exists() and cfg.edit.p == 0.7 and cfg.seed == 2:
            print("asleep", flush=True)
            sleep.with_suffix(".asleep").touch()
            time.sleep(float(sleep.read_text()))
        return original(cfg, *rest)
    cli._run = slow
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running SLURM; yields the environment in which its commands work."""
    directory = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([ONE_NODE, "start", directory], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        conf, path = re.fullmatch(
            r"export SLURM_CONF=(\S+) PATH=(\S+):\$PATH\n", started.stdout
        ).groups()
        yield os.environ | {"SLURM_CONF": conf, "PATH": f"{path}:{os.environ['PATH']}"}
    finally:
        subprocess.run([ONE_NODE, "stop", directory], check=True)


@pytest.fixture
def sleeper(tmp_path, cluster):
    """Jobs sleep in the last point for as many seconds as the file `sleep` says, if it is there."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "usercustomize.py").write_text("")
    (tmp_path / "site" / "sitecustomize.py").write_text(SLEEPER)
    paths = filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")])
    return cluster | {"PYTHONPATH": os.pathsep.join(paths), "SLEEP": str(tmp_path / "sleep")}


def sweep(results, environment, *arguments):
    command = [sys.executable, "-m", "deltalab", "-m", *EIGHT, *FAST, *SLURM, f"results={results}"]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=280)
    print(out, err)
    return process.returncode, out, err


def done(results):
    files = (results / "records").glob("*.json")
    return [one for one in map(json.loads, (f.read_text() for f in files)) if one["status"] == "ok"]


def test_eight_points_in_two_tasks(cluster, tmp_path):
    code, out, err = finish(sweep(tmp_path, cluster, "hydra.launcher.tasks=2"))
    assert code == 0, err
    assert re.search(r"8 points, tasks of job \d+: 2,", err)
    assert out.count("change") == 8
    assert len(done(tmp_path)) == 8
    hosts = list((tmp_path / "logs").glob("*/slurm/*/*_log.out"))
    assert len(hosts) == 2, "two processes ran them"


def test_a_cancelled_job_costs_its_points_and_the_second_call_completes(sleeper, tmp_path):
    (tmp_path / "sleep").write_text("600")
    process = sweep(tmp_path, sleeper, "hydra.launcher.tasks=2")
    asleep = tmp_path / "sleep.asleep"
    while not asleep.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)
    listed = subprocess.run(
        ["squeue", "--noheader", "--array", "-t", "RUNNING", "-o", "%i"],
        capture_output=True, text=True, env=sleeper, check=True,
    ).stdout.split()  # fmt: skip
    second = next(job for job in listed if job.endswith("_1"))
    subprocess.run(["scancel", second], env=sleeper, check=True)
    code, out, err = finish(process)
    assert code == 1
    assert "1 of 8 points failed" in err
    assert re.search(r"failed: .*seed=2.*job \d+_1 is CANCELLED", out)
    assert len(done(tmp_path)) == 7
    (tmp_path / "sleep").unlink()
    code, out, err = finish(sweep(tmp_path, sleeper, "hydra.launcher.tasks=2"))
    assert code == 0, err
    assert out.count("done before") == 7
    assert len(done(tmp_path)) == 8


def test_a_job_over_its_time_is_requeued_and_goes_on(sleeper, tmp_path):
    """SLURM warns, the sleeping point outlasts the grace, and the task starts a second time."""
    (tmp_path / "sleep").write_text("70")
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30"]
    process = sweep(tmp_path, sleeper, "hydra.launcher.tasks=1", *limits)
    while not (tmp_path / "sleep.asleep").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)
    (tmp_path / "sleep").unlink()
    code, _, err = finish(process)
    assert code == 0, err
    assert len(done(tmp_path)) == 8
    (log,) = (tmp_path / "logs").glob("*/slurm/*/*_log.err")
    text = log.read_text() + log.with_suffix(".out").read_text()
    assert "timed-out" in text
    assert text.count("Starting with JobEnvironment") >= 2
    assert list((tmp_path / "locks").iterdir()) == []
