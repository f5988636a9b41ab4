import json

import pytest

from deltalab.store import locks, reading, records
from deltalab.store.digests import key_of


def test_key_does_not_depend_on_order_but_on_every_value():
    a = key_of({"edit": {"p": 0.5, "k": 0}, "seed": 0})
    assert a == key_of({"seed": 0, "edit": {"k": 0, "p": 0.5}})
    assert a != key_of({"seed": 1, "edit": {"k": 0, "p": 0.5}})
    assert len(a) == 16


def whole(**more):
    record = {"schema": 1, "key": "k", "status": "ok", "experiment": None, "model": "m"}
    record |= {"edit": {"name": "keep"}, "loss": {"pre": 1.0, "change": 0.1}}
    return record | {"seconds": {"total": 1.0}} | more


def test_write_then_read(tmp_path):
    record = whole(x=float("nan"), y=(1, 2.5))
    path = records.write(tmp_path, record)
    assert records.read(tmp_path, "k") == {**record, "x": None, "y": [1, 2.5]}
    assert [p.name for p in path.parent.iterdir()] == ["k.json"]  # no temporary left behind


@pytest.mark.parametrize("text", ["", "{", '{"status": "error", "schema": 1}', '{"status": "ok"}'])
def test_unfinished_records_count_as_absent(tmp_path, text):
    path = records.path_of(tmp_path, "k")
    path.parent.mkdir()
    path.write_text(text)
    assert records.read(tmp_path, "k") is None


def test_a_failed_write_leaves_the_old_record(tmp_path):
    records.write(tmp_path, whole())
    with pytest.raises(TypeError):
        records.write(tmp_path, whole(x=object()))
    assert records.read(tmp_path, "k") is not None
    assert len(list((tmp_path / "records").iterdir())) == 1
    json.loads(records.path_of(tmp_path, "k").read_text())


def test_a_point_of_two_experiments_is_read_for_both(tmp_path):
    edit = {"name": "keep"}
    record = {"schema": 1, "status": "ok", "model": "m", "edit": edit, "experiment": "one"}
    records.write(tmp_path, {**record, "key": "a"})
    records.write(tmp_path, {**record, "key": "b"})
    records.enrol(tmp_path, "two/half", "a")
    records.enrol(tmp_path, "two/half", "a")
    found = [(p.key, p.experiment) for p in reading.read(tmp_path, warn=pytest.fail)]
    assert sorted(found) == [("a", "one"), ("a", "two/half"), ("b", "one")]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": None}, "model is missing"),
        ({"edit": None}, "edit is missing"),
        ({"edit": {"p": 0.5}}, "edit.name None, must be a text"),
        ({"loss": {"change": "large"}}, "loss.change 'large', must be a number"),
        ({"loss": 3}, "loss 3, must be an object or null"),
        ({"metrics": [1]}, "metrics [1], must be an object or null"),
        ({"terms": {"left": 1}}, "left 1, must be an object or null"),
        ({"config": "x"}, "config 'x', must be an object or null"),
        ({"seconds": {}}, "seconds is missing"),
        ({"experiment": ["x"]}, "experiment ['x'], must be a text"),
        ({"schema": "1"}, "has schema '1', this version of deltalab writes 1"),
    ],
)
def test_a_record_that_is_not_whole_is_run_again_and_told_once(tmp_path, caplog, change, why):
    """On the code before, the point of such a record crashed until somebody removed it."""
    records.write(tmp_path, whole(**change))
    for _ in range(2):
        assert records.finished(tmp_path, "k", experiment="one") is None
    path = records.path_of(tmp_path, "k")
    assert [r.getMessage() for r in caplog.records] == [f"{path}: {why}; the point is run again"]


@pytest.mark.parametrize("status", ["ok", "error", None])
def test_a_record_of_a_newer_version_is_never_overwritten(tmp_path, status):
    text = json.dumps({"schema": 2, "status": status, "what": "is not known here"})
    path = records.path_of(tmp_path, "k")
    path.parent.mkdir()
    path.write_text(text)
    for force in (False, True):
        with pytest.raises(ValueError, match=r"k\.json: a newer version of"):
            records.finished(tmp_path, "k", force)
    with pytest.raises(ValueError, match="schema 2, this one knows 1"):
        records.write(tmp_path, whole())
    assert path.read_text() == text


def test_who_may_only_read_sees_who_holds_a_lock(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    (tmp_path / "k.0.lock").write_text(
        '{"token":"x","host":"other","space":"zzz","pid":1,"start":1,"since":1}'
    )
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    assert locks.all_held(tmp_path)["k"].host == "other"


def test_paths_below_the_home_directory_are_written_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jo")
    paths = ["/home/jo/a.json", "'/home/jo': no", "/home/jo", "see /home/jo/x.", "/home/jo."]
    others = ["/home/joe/a", "/mnt/home/jo/a", "/home/jo.old/a", "~/a", "/home/jo-2"]
    record = whole(config={"model": {"post": paths, "pre": others}})
    kept = json.loads(records.write(tmp_path, record).read_text())["config"]["model"]
    assert kept["post"] == ["~/a.json", "'~': no", "~", "see ~/x.", "~."]
    assert kept["pre"] == others
    monkeypatch.setenv("HOME", "/")
    assert records.redacted(paths) == paths
