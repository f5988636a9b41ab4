"""Many points, many deaths: small versions of `experiments.scale`, which has the large ones."""

import json
import os
import random
import subprocess
import sys

import pytest

from deltalab.report import command as report
from deltalab.report.figures import agreement
from deltalab.report.outcomes import _ranks, spearman
from deltalab.store.record import Outcome
from deltalab.store.terms import Term


def clouds(count):
    chance = random.Random(0)
    found = []
    for seed in range(count):
        change = chance.gauss(0, 1)
        terms = {"gauss": Term("gauss", 3, change + chance.gauss(0, 0.1), {"attn": change})}
        found.append(
            Outcome("vit", "dare", {"p": 0.5}, seed=seed, terms=terms, main="gauss",
                    change=change, error=0.1, unit="nats")
        )  # fmt: skip
    return found


def test_many_points_are_drawn_together():
    few, many = (agreement.figure(clouds(count)).axes[0] for count in (50, 501))
    assert len(few.lines) > 100, "a bar and a marker each"
    assert len(many.lines) < 10
    drawn = next(line for line in many.lines if len(line.get_xdata()) == 501)
    assert sorted(drawn.get_xdata()) == sorted(p.change for p in clouds(501))
    assert "501 points" in many.get_title()


def test_ranks_of_ties_are_their_mean_as_counted_one_by_one():
    chance = random.Random(1)
    values = [float(chance.randrange(5)) for _ in range(40)]
    ordered = sorted(values)
    slow = [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
    assert _ranks(values) == slow
    assert spearman(values, slow) == 1.0


def test_the_terminal_shows_the_first_points_and_the_page_all(tmp_path, capsys):
    (tmp_path / "records").mkdir()
    for seed in range(report.MOST_ROWS + 7):
        record = {"key": f"{seed:04}", "status": "ok", "model": "vit", "seed": seed,
                  "edit": {"name": "dare", "p": seed}}  # fmt: skip
        (tmp_path / "records" / f"{seed:04}.json").write_text(json.dumps(record))
    assert report.main([f"results={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "and 7 more points, all of them in the page" in out
    assert sum("dare p=" in line for line in out.splitlines()) == report.MOST_ROWS
    page = (tmp_path / "runs.md").read_text()
    assert sum("dare p=" in line for line in page.splitlines()) == report.MOST_ROWS + 7


@pytest.mark.slow
def test_two_sweeps_that_are_killed_again_and_again_leave_what_one_alone_leaves():
    """Ten kills; `python -m experiments.scale.kills 200` is the same with two hundred."""
    command = [sys.executable, "-m", "experiments.scale.kills", "10", "3", "4"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    assert "points:" in found.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk of its own: needs root")
def test_a_full_disk_leaves_nothing_wrong():
    command = [sys.executable, "-m", "experiments.scale.disk", "1", "4"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if "mount" in found.stderr and "denied" in found.stderr:
        pytest.skip("this container may not mount")
    assert found.returncode == 0, found.stderr
    assert "no space left on device" in found.stdout


def test_a_point_without_a_finite_error_can_be_told_again():
    """Such numbers are null in a record: of one example there is no standard error."""
    from deltalab.report.columns import describe

    record = {"model": "vit", "edit": {"name": "keep"}, "loss": {"change": 0.5, "error": None}}
    assert "change +0.5000" in describe(record | {"status": "ok"}, skipped=True)
