import json
import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltalab.store.record import parse
from deltalab.tracking import runs, trackers

BLOCK = 32768


def frames(path: Path) -> Iterator[bytes]:
    """The messages of a run's log file: blocks of 32 KiB, each piece with checksum and length."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, message = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little of the block is left for a header
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        message += piece
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""
        at += 7 + length


def read_back(directory: Path) -> list[dict[str, Any]]:
    """All runs below a directory in the order in which they were made: what a service would get."""
    paths = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
    runs = [read_run(path) for path in paths]
    end = time.monotonic() + 20
    while any(run["exit"] is None for run in runs):  # the service writes a little after finish()
        assert time.monotonic() < end, f"an unfinished run among {paths}"
        time.sleep(0.05)
        runs = [read_run(path) for path in paths]
    return sorted(runs, key=lambda run: run["started"])


def read_run(path: Path) -> dict[str, Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    run: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "exit": None}
    for frame in frames(path):
        message = Record.FromString(frame)
        match message.WhichOneof("record_type"):
            case "run":
                run |= {"name": message.run.display_name, "group": message.run.run_group}
                run |= {"project": message.run.project, "tags": list(message.run.tags)}
                run["job"] = message.run.job_type
                run["started"] = message.run.start_time.ToNanoseconds()
                run["config"] |= values(message.run.config.update)
            case "config":
                run["config"] |= values(message.config.update)
            case "history":
                row = values(message.history.item)
                run["history"].append({"_step": message.history.step.num} | row)
            case "summary":
                run["summary"] |= values(message.summary.update)
            case "exit":
                run["exit"] = message.exit.exit_code
    return run


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage() for each in caplog.records if each.name == "deltalab.tracking.trackers"
    ]


def values(items: Any) -> dict[str, Any]:
    found = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
    return {name: value for name, value in found.items() if name != "_wandb"}


def record(p: float, seed: int) -> dict[str, Any]:
    nodes = {"left": [0.0, 0.2, 0.4, 0.6, 0.8], "gauss": [0.211, 0.789]}
    terms = {
        rule: {
            "rule": rule,
            "points": len(ts),
            "value": 0.1 * p,
            "nodes": ts,
            "inner": [p * (1 + t) for t in ts],
            "by_part": {"mlp": 0.06 * p, "head": 0.04 * p},
        }
        for rule, ts in nodes.items()
    }
    return {
        "schema": 1,
        "key": f"{seed:016x}",
        "status": "ok",
        "error": None,
        "experiment": "demo",
        "model": "mnist_vit",
        "edit": {"name": "dare", "p": p, "k": 0.0},
        "seed": seed,
        "select": "matrices",
        "touched": {"tensors": 18, "relative_shift": 0.9, "lost_in_storage": None},
        "term": terms["gauss"],
        "terms": terms,
        "prediction": {"first_order": 0.02, "second_order": None},
        "loss": {
            "unit": "nats per example",
            "post": 0.1,
            "change": 0.11 * p,
            "error": 0.004,
            "gap": 1.0,
            "gap_error": 0.1,
        },
        "metrics": {"mnist/accuracy": 0.95, "mnist/loss": 0.2},
        "class": "decreased",
        "seconds": {"total": 4.5, "term": 2.0},
        "gradient_evaluations": 7,
        "peak_memory_bytes": None,
        "device": "cpu, 2 threads",
        "config": {"model": {"_target_": "deltalab.models.zoo.Zoo", "task": "mnist"}, "seed": seed},
    }


def test_two_points_are_found_in_the_files_of_their_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(
        "WANDB_MODE", "online"
    )  # the spec decides, not what the shell happens to say
    tracker = trackers.Wandb(dir=str(tmp_path))
    tracker.log(record(0.5, 0), group="sweep-1")
    tracker.log(record(0.9, 1), group="sweep-1")
    first, second = read_back(tmp_path)
    assert first["name"] == "dare p=0.5 k=0 seed=0 mnist_vit"
    assert second["name"] == "dare p=0.9 k=0 seed=1 mnist_vit"
    for run, p in ((first, 0.5), (second, 0.9)):
        assert (run["project"], run["group"], run["exit"]) == ("deltalab", "demo", 0)
        assert sorted(run["tags"]) == ["dare", "decreased", "demo", "mnist_vit"]
        config = run["config"]
        assert (config["edit/name"], config["edit/p"], config["model"]) == ("dare", p, "mnist_vit")
        assert (config["model/task"], config["sweep"]) == ("mnist", "sweep-1")
        nodes = [row for row in run["history"] if "left/t" in row]
        assert [row["_step"] for row in nodes] == [0, 1, 2, 3, 4]
        assert [row["left/t"] for row in nodes] == [0.0, 0.2, 0.4, 0.6, 0.8]
        assert [row["left/inner"] for row in nodes] == [
            p * (1 + t) for t in (0, 0.2, 0.4, 0.6, 0.8)
        ]
        assert [row["gauss/t"] for row in nodes if "gauss/t" in row] == [0.211, 0.789]
        last = run["history"][-1]
        expected = {
            "term": 0.1 * p,
            "term/left": 0.1 * p,
            "term/gauss/by_part/mlp": 0.06 * p,
            "loss/change": 0.11 * p,
            "loss/error": 0.004,
            "prediction/first_order": 0.02,
            "mnist/accuracy": 0.95,
            "seconds/total": 4.5,
            "gradient_evaluations": 7,
        }
        assert {name: last[name] for name in expected} == expected
        assert run["summary"]["class"] == "decreased"


def test_group_of_the_tracker_wins_and_failed_points_are_marked(tmp_path: Path) -> None:
    failed = record(0.5, 0) | {"status": "error", "term": None, "terms": None, "loss": None}
    failed |= {"metrics": None, "class": None, "prediction": None}
    failed["error"] = {"type": "RuntimeError", "message": "out of memory"}
    trackers.Wandb(dir=str(tmp_path), group="mine").log(failed, group="sweep-1")
    (run,) = read_back(tmp_path)
    assert (run["group"], run["exit"]) == ("mine", 1)
    assert run["summary"]["error/type"] == "RuntimeError"
    assert "error" in run["tags"]


def test_a_run_left_open_gets_nothing(tmp_path: Path) -> None:
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    wandb.init(project="other", mode="offline", dir=tmp_path, settings=settings)
    trackers.Wandb(dir=str(tmp_path)).log(record(0.5, 0), group="sweep-1")
    assert wandb.run is None
    left, point = read_back(tmp_path)
    assert left["history"] == []
    assert point["history"][-1]["term"] == 0.05


def test_failure_is_one_warning(tmp_path: Path, caplog, monkeypatch) -> None:
    import wandb

    uneven = record(0.5, 3)
    uneven["terms"]["left"]["inner"] = [1.0]
    trackers.Wandb(dir=str(tmp_path)).log(uneven, group="g")
    (line,) = warnings(caplog)
    assert line.startswith("wandb: point 0000000000000003 was not logged: ValueError")
    assert wandb.run is None
    caplog.clear()
    assert not read_back(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space\nleft on device")

    monkeypatch.setattr(wandb.Run, "log", full)
    trackers.Wandb(dir=str(tmp_path)).log(record(0.5, 4), group="g")
    reason = "OSError: no space left on device"
    assert warnings(caplog) == [f"wandb: point 0000000000000004 was not logged: {reason}"]
    assert wandb.run is None


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A home without an account, and a service that does not answer."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    return tmp_path


def test_online_without_an_account_is_refused_before_the_first_point(
    nobody, monkeypatch, capfd
) -> None:
    """On the code before, the whole run went on, with a warning a point and exit code 0."""
    from deltalab import cli

    point = ["riemann=off", "evaluator=none", "data.objective.limit=8", "tracker=wandb"]
    for more in ([], ["-m", "seed=0,1"]):
        arguments = [*more, "edit=keep", *point, "tracker.mode=online", f"results={nobody / 'r'}"]
        monkeypatch.setattr("sys.argv", ["deltalab", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        err = capfd.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("deltalab: tracker.mode=online: no key of an account here")
        assert err.count("\n") == 1
    assert not (nobody / "r" / "records").exists()


def test_an_account_is_found_where_login_puts_it(nobody, monkeypatch) -> None:
    (nobody / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert not trackers.has_account(), "it is of another host"
    (nobody / "netrc").write_text("machine 127.0.0.1 login user password key\n")
    assert trackers.has_account()
    (nobody / "netrc").write_text("machine")
    assert not trackers.has_account()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert trackers.has_account()


def test_a_service_that_does_not_answer_is_a_warning(nobody, caplog, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    trackers.Wandb(dir=str(nobody), mode="online").log(record(0.5, 5), group="g")
    assert ["0000000000000005 was not logged" in line for line in warnings(caplog)] == [True]


@pytest.mark.parametrize("field", ["project", "entity", "group"])
def test_names_that_the_service_refuses_are_refused_at_once(field) -> None:
    with pytest.raises(ValueError, match=f"tracker.{field}: must have 128 characters"):
        trackers.Wandb(**{field: "x" * 129})


def test_nothing_is_written_when_disabled_or_absent(tmp_path: Path) -> None:
    trackers.Wandb(dir=str(tmp_path), mode="disabled").log(record(0.5, 0), group="g")
    trackers.NoTracker().log(record(0.5, 0), group="g")
    assert not read_back(tmp_path)


def test_secrets_stay_at_home() -> None:
    config = {"model": {"hub_token": "s1", "tokenizer": "bpe"}, "api_key": "s2", "PASSWORD": "s3"}
    full = record(0.5, 0) | {"config": config}
    found = runs.config(parse(full))
    assert found["model/tokenizer"] == "bpe"
    assert not {"s1", "s2", "s3"} & {str(value) for value in found.values()}
    assert found["key"] == f"{0:016x}"
    full["edit"] = {"name": "dare", "p": 0.5, "judge": {"api_key": "s4"}}
    assert not {"s1", "s2", "s3", "s4"} & set(re.findall(r"\bs\d\b", runs.essence(full)))


def test_without_an_experiment_a_sweep_is_the_group(tmp_path: Path) -> None:
    trackers.Wandb(dir=str(tmp_path)).log(record(0.5, 0) | {"experiment": None}, group="sweep-1")
    (run,) = read_back(tmp_path)
    assert run["group"] == "sweep-1"


def test_a_point_is_known_to_be_logged_for_its_experiment(tmp_path: Path) -> None:
    tracker, full = trackers.Wandb(dir=str(tmp_path)), record(0.5, 0)
    assert not tracker.logged(full)
    assert tracker.log(full, group="sweep-1")
    assert tracker.logged(full)
    assert not tracker.logged(full | {"experiment": "other/one"})
    assert not trackers.Wandb(dir=str(tmp_path), project="other").logged(full)
    failed = full | {"status": "error", "key": "failed"}
    assert tracker.log(failed, group="sweep-1")
    assert not tracker.logged(failed), "it runs again, and is logged again"


def test_a_summary_is_a_run_of_the_group_with_table_and_figures(tmp_path: Path) -> None:
    from PIL import Image

    figure = tmp_path / "demo_term.png"
    Image.new("RGB", (8, 8)).save(figure)
    rows = [["vit", 0.5, 1, None], ["vit", None, "x", "no luck"]]
    sheet = trackers.Sheet(
        ["model", "term/left", "k", "failure"], rows, {"count": 2}, [(figure, "c")]
    )
    assert trackers.Wandb(dir=str(tmp_path)).log_sheet(sheet, name="demo", group="sweep-1")
    (run,) = read_back(tmp_path)
    named = {"name": "demo summary", "group": "demo", "job": "summary", "exit": 0}
    assert {name: run[name] for name in named} == named
    assert run["summary"]["count"] == 2
    assert run["config"]["sweep"] == "sweep-1"
    (row,) = run["history"]
    files = next(tmp_path.glob("wandb/offline-run-*/files"))
    assert json.loads((files / row["points.path"]).read_text())["data"] == rows
    assert (files / row["figures/demo_term.path"]).read_bytes() == figure.read_bytes()
    assert row["figures/demo_term.caption"] == "c"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "of"}, "tracker.mode='of': must be one of"),
        ({"project": ""}, "tracker.project=''"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trackers.Wandb(**settings)


def test_missing_package_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package wandb"):
        trackers.Wandb()


@pytest.mark.parametrize("name", ["none", "wandb"])
def test_configs_build_a_tracker(name: str, tmp_path: Path) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    path = Path(__file__).parents[1] / "conf" / "tracker" / f"{name}.yaml"
    cfg = OmegaConf.create({"results": str(tmp_path), "tracker": OmegaConf.load(path)})
    tracker = instantiate(cfg.tracker, _convert_="all")
    expected = trackers.Wandb(dir=str(tmp_path)) if name == "wandb" else trackers.NoTracker()
    assert tracker == expected
