"""Sweeps over several processes: who runs what, with which device, and what a death costs."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from hydra import compose, initialize_config_dir

from deltalab import allowed, settings
from deltalab.sweep import gpus, launching
from deltalab.sweep.clusters import shares
from deltalab.sweep.launching import Job

APP = """
import os, signal, sys, time
from pathlib import Path
import hydra
from deltalab import cli
from deltalab.terminal import console
from deltalab.settings import conf_dir
from deltalab.sweep import composing

LOG = Path({log!r})

def note(*words):
    with open(LOG, "a") as file:
        file.write(" ".join(map(str, (os.getpid(), *words))) + "\\n")

def task(cfg):
{body}

if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"
    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)
    try:
        with composing.guarded():
            run()
    except console.SweepFailed as error:
        sys.exit(str(error))
"""


class App:
    """A program with deltalab's config and sweeper whose jobs do as the test says."""

    def __init__(self, directory, body, arguments):
        self.log = directory / "log"
        file = directory / "app.py"
        file.write_text(APP.format(log=str(self.log), body=body))
        command = [sys.executable, file, "-m", *arguments, f"results={directory}"]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def finish(self):
        out, err = self.process.communicate(timeout=240)
        return self.process.returncode, out, err

    def lines(self):
        text = self.log.read_text() if self.log.exists() else ""
        return [line.split() for line in text.splitlines()]

    def until(self, count):
        while len(self.lines()) < count:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        return self.lines()


TWO = ("hydra/launcher=workers", "hydra.launcher.n_jobs=2")


def test_each_worker_opens_each_pair_once_and_has_its_share_of_the_cores(tmp_path):
    body = """
    import torch
    from deltalab.models import zoo
    if not hasattr(zoo, "opened"):
        zoo.opened, original = [], zoo.live_pair
        zoo.live_pair = lambda *a: zoo.opened.append(1) or original(*a)
    result = cli.point(cfg)
    note(len(zoo.opened), torch.get_num_threads())
    return result
"""
    models = "model=mnist_vit,mnist_vit_early"
    fast = ("data.test.limit=32", "data.objective.limit=32", "riemann=off", "evaluator=none")
    app = App(tmp_path, body, ["seed=1,2,3,4", models, "edit=dare", "grid=none", *fast, *TWO])
    code, out, err = app.finish()
    assert code == 0, err
    assert out.count("change") == 8, "the sweep shows the line of every point"
    opens = {pid: int(misses) for pid, misses, _ in app.lines()}  # the last line counts
    assert len(opens) == 2
    assert 2 <= sum(opens.values()) <= 4, "at most pairs x workers"
    assert {int(threads) for *_, threads in app.lines()} == {max(launching.cores() // 2, 1)}


def test_a_worker_that_is_killed_costs_one_point(tmp_path):
    body = """
    note(cfg.seed)
    if cfg.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"point {cfg.seed}")
"""
    app = App(tmp_path, body, ["seed=range(0,8)", *TWO])
    code, out, _ = app.finish()
    assert code == 1
    for seed in (0, 1, 2, 4, 5, 6, 7):
        assert f"point {seed}\n" in out
    (line,) = [line for line in out.splitlines() if line.startswith("failed: seed=3 ")]
    assert line.endswith(": its process was killed, or out of memory")


def test_an_exception_that_cannot_travel_is_told(tmp_path):
    body = """
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")
    raise Odd(1, 2)
"""
    code, _, err = App(tmp_path, body, ["seed=1,2", *TWO]).finish()
    assert code == 1
    assert "2 of 2 points failed; the first: Odd: 1 and 2" in err


def test_sigterm_waits_for_the_points_at_hand_and_begins_no_other(tmp_path):
    body = """
    note("begin", cfg.seed)
    time.sleep(1.0)
    note("end", cfg.seed)
"""
    app = App(tmp_path, body, ["seed=range(0,50)", *TWO])
    app.until(2)
    app.process.send_signal(signal.SIGTERM)
    app.finish()
    words = [line[1:] for line in app.lines()]
    begun = sorted(seed for word, seed in words if word == "begin")
    assert begun == sorted(seed for word, seed in words if word == "end")
    assert 2 <= len(begun) <= 6


def test_workers_end_when_their_sweep_is_killed(tmp_path):
    app = App(tmp_path, "    note(cfg.seed); time.sleep(0.2)", ["seed=range(0,900)", *TWO])
    pids = {int(line[0]) for line in app.until(6)}
    assert len(pids) == 2
    app.process.kill()
    end = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "a worker outlives its sweep"
        time.sleep(0.1)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def three_gpus(tmp_path, monkeypatch):
    """A machine that says it has three GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '0, GPU-aa\\n1, GPU-bb\\n2, GPU-cc\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(gpus, "_claimed", {})
    return ["GPU-aa", "GPU-bb", "GPU-cc"]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["GPU-aa", "GPU-bb", "GPU-cc"]),
        ("2,0", ["GPU-cc", "GPU-aa"]),
        ("GPU-bb", ["GPU-bb"]),
        ("1, MIG-xx", ["GPU-bb", "MIG-xx"]),
        ("0,-1,2", ["GPU-aa"]),
        ("", []),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_see(three_gpus, monkeypatch, chosen, names):
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible() == names


CLAIM = """
import os, sys, time
from deltalab.sweep import gpus
print(gpus.claim(sys.argv[1:]), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(60)
"""


def test_no_two_processes_hold_one_gpu_and_a_killed_one_lets_go(three_gpus, tmp_path):
    def claimer():
        return subprocess.Popen(
            [sys.executable, "-c", CLAIM, *three_gpus[:2]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    holders = [claimer(), claimer()]
    try:
        held = [one.stdout.readline().split() for one in holders]
        assert sorted(held) == [["GPU-aa", "GPU-aa"], ["GPU-bb", "GPU-bb"]]
        holders.append(claimer())
        assert "waiting for a GPU: others hold GPU-aa, GPU-bb" in holders[2].stderr.readline()
        holders[0].kill()
        assert holders[2].stdout.readline().split() == held[0]
        mode = (tmp_path / "deltalab-GPU-aa.lock").stat().st_mode
        assert stat.S_IMODE(mode) == 0o666, "other users must be able to lock it"
    finally:
        for one in holders:
            one.kill()
            one.communicate()


def test_a_process_keeps_the_gpu_that_it_has(three_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert gpus.claim(["GPU-cc"]) == "GPU-cc"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-cc"
    assert gpus.claim(["GPU-aa"]) == "GPU-cc"
    gpus._claimed["GPU-cc"].release()


def test_every_worker_of_a_sweep_sees_a_gpu_of_its_own(three_gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    body = '    note(os.environ["CUDA_VISIBLE_DEVICES"]); time.sleep(0.5)'
    app = App(tmp_path, body, ["seed=range(0,6)", "hydra/launcher=gpus"])
    code, _, err = app.finish()
    assert code == 0, err
    seen = dict(app.lines())
    assert sorted(seen.values()) == ["GPU-aa", "GPU-cc"]


@pytest.mark.parametrize("name", ["workers", "gpus", "slurm", "ray"])
def test_presets_pass_the_guard(name):
    with initialize_config_dir(str(settings.conf_dir()), version_base="1.3"):
        cfg = compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
    allowed.check_hydra(cfg.hydra, [])
    assert cfg.hydra.launcher._target_.startswith("hydra_plugins.deltalab_launchers.")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["hydra/launcher=workers", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: must be"),
        (["hydra/launcher=gpus"], "hydra/launcher=gpus: no GPU is visible"),
        (["hydra/launcher=slurm", "hydra.launcher.tasks=x"], "hydra.launcher.tasks=x: must be"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capfd, tmp_path, arguments, part):
    from deltalab import cli

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["deltalab", "-m", *arguments, f"results={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert part in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "package"), [("workers", "joblib"), ("slurm", "submitit"), ("ray", "ray")]
)
def test_a_missing_engine_names_what_to_install(monkeypatch, capfd, tmp_path, name, package):
    import importlib.util

    from deltalab import cli

    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda wanted, *rest: None if wanted == package else real(wanted, *rest),
    )
    argv = ["deltalab", "-m", f"hydra/launcher={name}", f"results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capfd.readouterr().err == (
        f"deltalab: hydra/launcher={name}: needs the package {package}:"
        f" pip install 'deltalab[{name}]'\n"
    )


def test_completion_knows_the_presets():
    from hydra._internal.config_loader_impl import ConfigLoaderImpl  # noqa: F401

    environment = os.environ | {"COMP_LINE": "deltalab hydra/launcher=", "COMP_POINT": "24"}
    program = [sys.executable, "-m", "deltalab", "-sc", "query=bash"]
    found = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert {"workers", "gpus", "slurm", "ray"} <= {
        word.rpartition("=")[2] for word in found.stdout.split()
    }


@pytest.mark.parametrize("count", [1, 3, 8, 9, 20])
def test_shares_are_runs_of_neighbours_that_cover_all(count):
    jobs = [Job(number, ()) for number in range(9)]
    split = shares(jobs, count)
    assert [job for share in split for job in share] == jobs
    sizes = [len(share) for share in split]
    assert max(sizes) - min(sizes) <= 1
    assert len(split) == min(count, 9)


def test_a_pair_that_cannot_be_opened_ends_a_sweep_on_ray(monkeypatch):
    """On the code before, Ray was given all the other points too."""
    from types import SimpleNamespace

    from deltalab.sweep import clusters, launching, stopping

    done = {}

    def run(data, job):
        why = launching.failed(job, ValueError("model.pre=x: damaged"))
        done[job.number] = launching.Done(job.number, why, "", last=job.number == 2)
        return job.number

    engine = SimpleNamespace(
        is_initialized=lambda: True,
        put=lambda data: data,
        get=lambda number: done[number],
        remote=lambda **_: lambda task: SimpleNamespace(remote=task),
        cluster_resources=lambda: {"CPU": 2.0},
        wait=lambda running: (running[:1], running[1:]),
    )
    monkeypatch.setitem(sys.modules, "ray", engine)
    errors = SimpleNamespace(RayError=RuntimeError)
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    monkeypatch.setattr(clusters, "run", run)
    sweep = SimpleNamespace(packed=lambda: b"")
    jobs = [launching.Job(number, ()) for number in range(8)]
    with pytest.raises(stopping.Ended, match="damaged"):
        clusters.ray(sweep, jobs, init={}, remote={"num_cpus": 1})
    assert list(done) == [0, 1, 2, 3]
