"""Packages that bring edits of their own, installed beside a built wheel of deltalab."""

import json
import subprocess
import sys
from pathlib import Path

import omegaconf
import pytest

from deltalab import settings

ROOT = Path(__file__).parents[1]
EXAMPLE = Path(__file__).parent / "example_package"
FAST = ("data.test.limit=32", "data.objective.limit=32", "riemann=off", "evaluator=none")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with both wheels; all else is what this one has."""
    place = tmp_path_factory.mktemp("installed")
    uv = Path(sys.executable).with_name("uv")
    for project in (ROOT, EXAMPLE):
        command = [uv, "build", "--wheel", "-q", "--out-dir", place / "wheels", project]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode and "hatchling" in made.stderr:
            pytest.skip("no package index here, from which hatchling would be fetched")
        assert made.returncode == 0, made.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    (site,) = (place / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(f"{Path(omegaconf.__file__).parents[1]}\n")
    for wheel in sorted((place / "wheels").glob("*.whl")):
        command = [uv, "pip", "install", "-q", "--no-deps", "--python", place / "venv"]
        subprocess.run([*command, wheel], check=True)
    return place / "venv" / "bin"


def run(*command, cwd):
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
def test_an_edit_of_a_package_is_run_like_ones_own(environment, tmp_path):
    arguments = ("edit=shrink", "edit.c=0.25", f"results={tmp_path}", *FAST)
    shown = run(environment / "deltalab", *arguments, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert record["edit"] == {"name": "deltalab_shrink:shrink", "c": 0.25}
    assert record["touched"]["relative_shift"] == pytest.approx(0.75, rel=1e-3)
    assert "done before" in run(environment / "deltalab", *arguments, cwd=tmp_path).stdout
    wrong = run(environment / "deltalab", *arguments[:1], "edit.c=2", *arguments[2:], cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "deltalab: edit.c=2: must be in [0, 1]\n")


@pytest.mark.slow
def test_its_edits_are_tested_by_one_import(environment, tmp_path):
    file = EXAMPLE / "tests" / "test_contract.py"
    command = (
        environment / "python",
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        file,
    )
    shown = run(*command, "--rootdir", tmp_path, cwd=tmp_path)
    assert shown.returncode == 0, shown.stdout
    assert "7 passed" in shown.stdout


@pytest.mark.slow
def test_the_python_of_the_wheel_is_the_wheels(environment, tmp_path):
    program = "import deltalab, hydra_plugins.deltalab_sweeper as h; print(deltalab.__file__, h)"
    shown = run(environment / "python", "-c", program, cwd=tmp_path).stdout
    assert shown.count(str(environment.parent)) == 2, shown


def test_a_class_that_no_entry_point_names_is_refused_and_the_way_out_is_told(tmp_path):
    (tmp_path / "edit").mkdir()
    (tmp_path / "edit" / "own.yaml").write_text("_target_: json.JSONDecoder\nselect: all\n")
    command = [sys.executable, "-m", "deltalab", "--config-dir", tmp_path, "edit=own"]
    shown = run(*command, f"results={tmp_path}", cwd=tmp_path)
    assert shown.returncode == 2
    assert len(shown.stderr.splitlines()) == 1
    assert "only targets of deltalab are allowed" in shown.stderr
    assert "entry point of the group deltalab" in shown.stderr


def test_what_is_installed_here_names_no_foreign_classes():
    assert all(package.name != "deltalab" for package in settings.packages())
