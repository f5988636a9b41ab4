"""A sweep on a real Ray: `pytest -m ray`."""

import json
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
FAST = ["data.test.limit=32", "data.objective.limit=32", "riemann=off", "evaluator=none"]
EIGHT = ["edit=dare", "grid=none", "edit.p=0.1,0.3,0.5,0.7", "seed=1,2"]
RAY = ["hydra/launcher=ray", "hydra.launcher.init.num_cpus=2"]
# A task function in which one point kills its process: always, or the first time only.
APP = """
import os, signal, sys
from pathlib import Path
import hydra
from deltalab import cli
from deltalab.terminal import console
from deltalab.settings import conf_dir

def task(cfg):
    mark = Path(cfg.results) / f"killed-{cfg.seed}"
    if cfg.seed == 3 or (cfg.seed == 5 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"point {cfg.seed}")

if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except console.SweepFailed as error:
        sys.exit(str(error))
"""


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("ray", reason="needs Ray: pip install 'deltalab[ray]'")


def finish(command):
    process = subprocess.run(command, capture_output=True, text=True, timeout=500)
    print(process.stdout, process.stderr)
    return process.returncode, process.stdout, process.stderr


def test_eight_points_and_again(tmp_path):
    program = [sys.executable, "-m", "deltalab", "-m", *EIGHT, *FAST, *RAY, f"results={tmp_path}"]
    began = time.monotonic()
    code, out, err = finish(program)
    assert code == 0, err
    print(f"{time.monotonic() - began:.1f} s")
    assert out.count("change") == 8
    records = [json.loads(p.read_text()) for p in (tmp_path / "records").glob("*.json")]
    assert sorted((r["edit"]["p"], r["seed"]) for r in records) == [
        (p, seed) for p in (0.1, 0.3, 0.5, 0.7) for seed in (1, 2)
    ]
    code, out, err = finish(program)
    assert code == 0, err
    assert out.count("done before") == 8


def test_a_process_that_dies_is_tried_again_and_costs_its_point_alone(tmp_path):
    file = tmp_path / "app.py"
    file.write_text(APP)
    code, out, _ = finish(
        [sys.executable, file, "-m", "seed=range(0,8)", *RAY, f"results={tmp_path}"]
    )
    assert code == 1
    for seed in (0, 1, 2, 4, 5, 6, 7):
        assert f"point {seed}\n" in out
    assert [line for line in out.splitlines() if line.startswith("failed: seed=3 ")]


def test_a_pair_that_cannot_be_opened_ends_the_sweep(tmp_path):
    """On the code before, each of the points opened it again."""
    for name in ("pre", "post"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"damaged")
    pair = [f"model.{name}={tmp_path / name}.safetensors" for name in ("pre", "post")]
    model = ["model=timm_vit", "model.name=vit_tiny_patch16_224", *pair, "data.dir=."]
    command = [*EIGHT, *RAY, *model, f"results={tmp_path}", "hydra.launcher.init.num_cpus=1"]
    code, _, err = finish([sys.executable, "-m", "deltalab", "-m", *command])
    assert code == 2
    assert "points were not run" in err.splitlines()[-1]
    assert len(list((tmp_path / "records").glob("*.json"))) < 8
