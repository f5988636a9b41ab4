import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from deltalab import cli, run
from deltalab.run import building
from deltalab.store import reading, records
from deltalab.sweep import closing, sweeps
from deltalab.tracking import trackers

FAST = ["data.test.limit=32", "data.objective.limit=32", "riemann=both", "evaluator=accuracy"]
SWEEP = 'sweeps=[{model: mnist_vit, edit: dare, edit.p: "0.5", seed: "0,1,2"}]'


def read(directory: Path) -> list:
    """All points that were logged below a directory."""
    return reading.read_tracked(directory, pytest.fail)


def record(key: str, **fields) -> dict:
    edit = {"name": "darex", "p": 0.1 + 0.2, "k": None, "rescale": [1, "x"]}
    term = {"rule": "left", "points": 5, "value": 1 / 3, "by_part": {"mlp": 0.1}, "nodes": [0.0]}
    term |= {"inner": [float("nan")], "converged": False}
    full = {
        "schema": 1, "key": key, "status": "ok", "error": None, "experiment": None,
        "model": "vit", "edit": edit, "seed": 3, "select": ["linear", "proj"],
        "term": term, "terms": {"left": term}, "prediction": {"second_order": float("nan")},
        "loss": {"objective": "classification", "unit": "nats", "change": 0.1, "error": 1e-17},
        "metrics": {"mnist/accuracy": 0.5, "mnist/é": float("inf")},
        "reference": {"pre": {"mnist/accuracy": 0.1}, "post": {}}, "class": "decreased",
        "gradient_evaluations": 5, "seconds": {"total": 0.1}, "config": {"seed": 3},
    }  # fmt: skip
    return full | fields


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Log a record without the service, which has tests of its own."""

    class Run:
        def __init__(self):
            self.summary = {}

        def __getattr__(self, name):
            return lambda *_, **__: None

    monkeypatch.setattr(trackers.Wandb, "_begun", lambda self, **_: Run())
    return lambda made, **more: trackers.Wandb(dir=str(tmp_path), **more).log(made, group="g")


def test_a_sweep_read_back_is_the_sweep_read_from_its_records(tmp_path, monkeypatch) -> None:
    """One point was done outside the experiment, one without a tracker, one fails."""
    evaluate = run.evaluate

    def failing(point):
        if point.seed == 2:
            raise RuntimeError("no luck, and a\nsecond line")
        return evaluate(point)

    def deltalab(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["deltalab", "-m", *arguments, f"results={tmp_path}"])
        cli.main()

    monkeypatch.setattr(run, "evaluate", failing)
    deltalab("edit=dare", "grid=none", "edit.p=0.5", "seed=0", *FAST, "tracker=wandb")
    demo = ["experiment=demo", *FAST]
    deltalab(*demo, SWEEP.replace("0,1,2", "1"))
    assert [(p.experiment, p.seed) for p in read(tmp_path)] == [("runs", 0)]
    with pytest.raises(SystemExit):
        deltalab(*demo, SWEEP, "tracker=wandb")
    expected = reading.read(tmp_path, pytest.fail)
    found = read(tmp_path)
    assert found == expected
    assert {(p.experiment, p.seed, p.failure is None) for p in found} == {
        ("runs", 0, True), ("demo", 0, True), ("demo", 1, True), ("demo", 2, False)
    }  # fmt: skip
    assert [list(point.settings) for point in found] == [["p", "k"]] * 4
    expected = [point for point in expected if point.experiment == "demo"]
    assert {"left", "gauss"} <= found[0].terms.keys()
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/points_*.json"))
    table = max((json.loads(file.read_text()) for file in tables), key=lambda t: len(t["data"]))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["key"] for row in rows] == [point.key for point in expected]
    assert [row["loss/change"] for row in rows] == [point.change for point in expected]
    assert rows[0]["term/gauss"] == expected[0].terms["gauss"].value
    images = {p.name.split("_")[1] for p in tmp_path.glob("wandb/*/files/media/images/*/*.png")}
    assert {"term", "parts"} <= images

    monkeypatch.setattr(run, "evaluate", evaluate)
    before = len(list(tmp_path.glob("wandb/offline-run-*")))
    deltalab(*demo, SWEEP, "tracker=wandb")  # one point goes well and is logged, and a summary
    assert read(tmp_path) == reading.read(tmp_path, pytest.fail)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == before + 2


def test_awkward_values_come_back_as_from_the_file(tmp_path, log) -> None:
    for number in range(3):
        metrics = {f"task{i}/accuracy": i / 7 for i in range(700 * number)}
        made = record(f"{number:016x}", metrics=metrics)
        assert log(made)
        records.write(tmp_path, made)
    assert len(read(tmp_path)) == 3
    assert read(tmp_path) == reading.read(tmp_path, pytest.fail)


def test_the_latest_run_of_a_point_counts_and_experiments_are_apart(tmp_path, log) -> None:
    for project, experiment, seconds in (
        ("p", "a", 1.0), ("p", "b/c", 2.0), ("p", "a", 3.0), ("q", "a", 4.0),
    ):  # fmt: skip
        again = record("0" * 16, experiment=experiment, seconds={"total": seconds})
        assert log(again, project=project)
        time.sleep(0.01)
    assert {p.experiment: p.seconds for p in read(tmp_path)} == {"a": 4.0, "b/c": 2.0}


def test_a_point_that_failed_is_told_until_it_goes_well(tmp_path, log) -> None:
    failed = record("a", status="error", error={"type": "E", "message": "m"})
    assert log(failed)
    assert not trackers.Wandb(dir=str(tmp_path)).logged(failed), "it runs again"
    assert [p.failure for p in read(tmp_path)] == ["E: m"]
    assert log(record("a"))
    assert [p.failure for p in read(tmp_path)] == [None]


def test_what_an_earlier_version_has_logged_is_read_from_the_records(tmp_path) -> None:
    """It left files without content, to know what it had logged."""
    place = tmp_path / reading.TRACKED / "deltalab" / "fig%2F1"
    place.mkdir(parents=True)
    (place / "a").touch()
    records.write(tmp_path, record("a"))
    (point,) = read(tmp_path)
    assert (point.key, point.experiment) == ("a", "fig/1")


def test_a_report_is_the_same_from_either_source_and_needs_no_wandb(
    tmp_path, log, capsys, monkeypatch
) -> None:
    from deltalab.report import command

    for number in range(3):
        assert log(record(f"{number:016x}"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert command.main([f"results={tmp_path}"]) == 2
    assert "no record in" in capsys.readouterr().err
    assert command.main([f"results={tmp_path}", "from=wandb"]) == 0
    theirs = (tmp_path / "runs.md").read_bytes()
    for number in range(3):
        records.write(tmp_path, record(f"{number:016x}"))
    assert command.main([f"results={tmp_path}"]) == 0
    assert (tmp_path / "runs.md").read_bytes() == theirs
    capsys.readouterr()
    assert command.main([f"results={tmp_path}", "from=cloud"]) == 2
    assert "from=cloud: must be one of records, wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "delimiter|Expecting"),
        ("[]", "not a record but a list"),
        ('{"schema": 7}', "schema 7"),
    ],
)
def test_what_is_no_record_is_told(tmp_path, log, text: str, message: str) -> None:
    assert log(record("0" * 16))
    (file,) = tmp_path.glob(f"{reading.TRACKED}/*/*/*")
    file.write_text(text)
    told: list[str] = []
    assert reading.read_tracked(tmp_path, told.append) == []
    assert re.search(message, told[0])


# What a sweep's end sends


class Counting:
    """A tracker that fails from the n-th point on."""

    def __init__(self, most: int) -> None:
        self.most, self.points, self.sheets = most, [], []

    def log(self, record, *, group):
        if len(self.points) == self.most:
            return False
        self.points.append((group, record["experiment"], record["key"]))
        return True

    def logged(self, record):
        return record["key"] == "done"

    def log_sheet(self, sheet, *, name, group):
        self.sheets.append((name, group, sheet))


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """End a sweep over four points, one logged, one failed, one without a record."""
    from omegaconf import OmegaConf

    folder = tmp_path / "logs" / "sweep-1"
    for number, key in enumerate(("new", "done", "bad", "none")):
        (folder / f"{number}").mkdir(parents=True)
        sweeps.note(folder / f"{number}", sweeps.KEY, key)
    for key in ("new", "done"):
        records.write(tmp_path, record(key))
    records.write(tmp_path, record("bad", status="error", error={"type": "E", "message": "m"}))

    def end(most: int = 9, experiment: str | None = "fig1") -> Counting:
        tracker = Counting(most)
        monkeypatch.setattr(building, "build", lambda node, setting: tracker)
        hydra = {"runtime": {"choices": {"experiment": experiment}}}
        config = {"results": str(tmp_path), "tracker": {"_target_": "W"}, "hydra": hydra}
        closing.sweep_ended(OmegaConf.create(config), folder)
        return tracker

    return end


def test_the_end_of_a_sweep_sends_what_was_not_sent(ended) -> None:
    tracker = ended()
    assert tracker.points == [("sweep-1", "fig1", "new"), ("sweep-1", "fig1", "bad")]
    ((name, group, sheet),) = tracker.sheets
    assert (name, group) == ("fig1", "sweep-1")
    column = sheet.columns.index("key")
    assert sorted(row[column] for row in sheet.rows) == ["bad", "done", "new"]
    assert sheet.numbers["count"] == 3
    assert sheet.numbers["failed"] == 1
    assert sheet.numbers["median_relative_error/left"] == pytest.approx(10 / 3 - 1)
    assert {len(row) for row in sheet.rows} == {len(sheet.columns)}


def test_without_an_experiment_the_sweep_has_its_own_name(ended) -> None:
    tracker = ended(experiment=None)
    assert tracker.points[0] == ("sweep-1", None, "new")
    assert tracker.sheets[0][0] == "sweep-1"


def test_a_tracker_that_fails_once_is_asked_no_further(ended) -> None:
    tracker = ended(most=1)
    assert len(tracker.points) == 1
    assert tracker.sheets == []


def test_own_figures_are_those_of_these_records(tmp_path) -> None:
    (tmp_path / "paper").mkdir()
    written = records.write(tmp_path, record("k")).stat().st_mtime
    for name, later in (("fig1", 1), ("fig1_b", 1), ("fig1_old", -1), ("fig10", 1)):
        path = tmp_path / "paper" / f"{name}.png"
        path.touch()
        os.utime(path, (written + later,) * 2)
    found = closing.own_figures(tmp_path, "fig1", [record("k")])
    assert [path.stem for path, _ in found] == ["fig1", "fig1_b"]


def test_whatever_goes_wrong_at_the_end_is_a_warning(tmp_path, caplog) -> None:
    from omegaconf import OmegaConf

    closing.sweep_ended(OmegaConf.create({"tracker": {"_target_": "x.Wandb"}}), tmp_path)
    assert "summary was not logged" in caplog.text
    closing.sweep_ended(OmegaConf.create({"tracker": {"_target_": "x.NoTracker"}}), tmp_path)
