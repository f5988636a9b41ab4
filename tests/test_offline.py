import json
import os
import random
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

import pytest

from deltalab import cli, run
from deltalab.report import offline, reading
from deltalab.store import records
from deltalab.sweep import closing, sweeps
from deltalab.tracking import trackers

FAST = ["data.test.limit=32", "data.objective.limit=32", "riemann=both", "evaluator=accuracy"]
SWEEP = 'sweeps=[{model: mnist_vit, edit: dare, edit.p: "0.5", seed: "0,1,2"}]'


def read(directory: Path, count: int) -> list:
    """All points below a directory, once the service has written them; a little after finish()."""
    end, warned = time.monotonic() + 20, []
    while len(found := offline.read(directory, warned.append)) < count or warned:
        assert time.monotonic() < end, (len(found), warned)
        time.sleep(0.05)
        warned.clear()
    return found


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


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Three logged points and a run of another project's, as the service leaves them."""
    import wandb

    directory = tmp_path_factory.mktemp("logged")
    tracker = trackers.Wandb(dir=str(directory))
    for number in range(3):
        metrics = {f"task{i}/accuracy": i / 7 for i in range(700 * number)}  # several blocks
        assert tracker.log(record(f"{number:016x}", metrics=metrics), group="g")
    settings = wandb.Settings(silent=True, console="off")
    with wandb.init(project="other", mode="offline", dir=directory, settings=settings) as other:
        other.log({"record": 1.0})
    read(directory, 3)
    return directory


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
    assert [(p.experiment, p.seed) for p in read(tmp_path, 1)] == [("runs", 0)]
    with pytest.raises(SystemExit):
        deltalab(*demo, SWEEP, "tracker=wandb")
    expected = reading.read(tmp_path, pytest.fail)
    found = read(tmp_path, 4)
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
    assert [row["change"] for row in rows] == [point.change for point in expected]
    assert rows[0]["term/gauss"] == expected[0].terms["gauss"].value
    images = {p.name.split("_")[1] for p in tmp_path.glob("wandb/*/files/media/images/*/*.png")}
    assert {"term", "parts"} <= images

    monkeypatch.setattr(run, "evaluate", evaluate)
    before = len(list(tmp_path.glob("wandb/offline-run-*")))
    deltalab(*demo, SWEEP, "tracker=wandb")  # one point goes well and is logged, and a summary
    assert read(tmp_path, 4) == reading.read(tmp_path, pytest.fail)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == before + 2


def test_awkward_values_come_back_as_from_the_file(tmp_path, logged) -> None:
    shutil.copytree(logged / "wandb", tmp_path / "wandb")
    for number in range(3):
        metrics = {f"task{i}/accuracy": i / 7 for i in range(700 * number)}
        records.write(tmp_path, record(f"{number:016x}", metrics=metrics))
    assert offline.read(tmp_path, pytest.fail) == reading.read(tmp_path, pytest.fail)


def test_the_latest_run_of_a_point_counts_and_experiments_are_apart(tmp_path) -> None:
    tracker = trackers.Wandb(dir=str(tmp_path))
    for experiment, seconds in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        again = record("0" * 16, experiment=experiment, seconds={"total": seconds})
        assert tracker.log(again, group="g")
    found = {}
    end = time.monotonic() + 20
    while found != {"a": 3.0, "b": 2.0}:
        assert time.monotonic() < end, found
        found = {p.experiment: p.seconds for p in offline.read(tmp_path, lambda line: None)}


def test_runs_that_were_sent_at_once_are_read_too(tmp_path, logged) -> None:
    shutil.copytree(logged / "wandb", tmp_path / "wandb")
    whole = offline.read(tmp_path, pytest.fail)
    for folder in (tmp_path / "wandb").glob("offline-run-*"):
        folder.rename(folder.with_name(folder.name.removeprefix("offline-")))
    assert len(whole) == 3
    assert offline.read(tmp_path, pytest.fail) == whole


def test_a_report_is_the_same_from_either_source(tmp_path, logged, capsys) -> None:
    from deltalab.report import command

    shutil.copytree(logged / "wandb", tmp_path / "wandb")
    assert command.main([f"results={tmp_path}"]) == 2
    assert "no record in" in capsys.readouterr().err
    assert command.main([f"results={tmp_path}", "from=wandb"]) == 0
    theirs = (tmp_path / "runs.md").read_bytes()
    for number in range(3):
        metrics = {f"task{i}/accuracy": i / 7 for i in range(700 * number)}
        records.write(tmp_path, record(f"{number:016x}", metrics=metrics))
    assert command.main([f"results={tmp_path}"]) == 0
    assert (tmp_path / "runs.md").read_bytes() == theirs
    capsys.readouterr()
    assert command.main([f"results={tmp_path}", "from=cloud"]) == 2
    assert "from=cloud: must be one of records, wandb" in capsys.readouterr().err


def test_a_run_that_was_cut_short_is_told_and_the_others_are_read(tmp_path, logged) -> None:
    shutil.copytree(logged / "wandb", tmp_path / "wandb")
    whole = offline.read(tmp_path, pytest.fail)
    files = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    cut = sorted(files, key=lambda file: file.stat().st_size)[-2]  # the second of the three points
    data = cut.read_bytes()
    for length in (0, 7, len(data) // 8):
        cut.write_bytes(data[:length])
        told: list[str] = []
        assert offline.read(tmp_path, told.append) == [whole[0], whole[2]]
        assert [f"skipped {cut}: " in line for line in told] == [True]
    cut.write_bytes(data[:-9])  # the record was reached
    assert offline.read(tmp_path, pytest.fail) == whole


def test_damage_is_found_by_checksums_and_never_raises(tmp_path, logged) -> None:
    shutil.copytree(logged / "wandb", tmp_path / "wandb")
    whole = offline.read(tmp_path, pytest.fail)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    chance = random.Random(0)
    for _ in range(40):
        file = chance.choice(files)
        data = file.read_bytes()
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 20))):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(damaged)
        assert all(point in whole for point in offline.read(tmp_path, lambda line: None))
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "delimiter|Expecting"),
        ("[]", "not a record but a list"),
        ('{"schema": 7}', "schema 7"),
    ],
)
def test_what_is_no_record_is_told(tmp_path, monkeypatch, text: str, message: str) -> None:
    from deltalab.tracking import runs

    monkeypatch.setattr(runs, "essence", lambda record: text)
    trackers.Wandb(dir=str(tmp_path)).log(record("0" * 16), group="g")
    end = time.monotonic() + 20
    while "ends before" in (told := read_told(tmp_path)):
        assert time.monotonic() < end
    assert re.search(message, told)


def read_told(directory: Path) -> str:
    told: list[str] = []
    assert offline.read(directory, told.append) == []
    return told[0]


def test_frames_that_span_blocks_are_joined() -> None:
    """An independent writer: pieces of at most what a block has left, blocks padded with zeros."""
    data, sizes = bytearray(b":W&B\xe1\xbe\x00"), [1, 32768, 100_000, 5, 32740, 3, 0, 9]
    messages = [bytes([i]) * size for i, size in enumerate(sizes)]
    for message in messages:
        rest, first = message, True
        while True:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            data += zlib.crc32(bytes([kind]) + piece).to_bytes(4, "little")
            data += len(piece).to_bytes(2, "little") + bytes([kind]) + piece
            first = False
            if not rest:
                break
    assert list(offline.frames(bytes(data))) == messages
    with pytest.raises(ValueError, match="not a run"):
        list(offline.frames(b"PK\x03\x04"))


def test_wandb_must_be_installed(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "wandb.proto", None)
    with pytest.raises(ValueError, match="from=wandb: needs the package wandb"):
        offline.read(tmp_path, pytest.fail)


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
        monkeypatch.setattr(run, "build", lambda node, setting: tracker)
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
