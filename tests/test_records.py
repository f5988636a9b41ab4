import json

import pytest

from deltalab.store import reading, records
from deltalab.store.digests import key_of


def test_key_does_not_depend_on_order_but_on_every_value():
    a = key_of({"edit": {"p": 0.5, "k": 0}, "seed": 0})
    assert a == key_of({"seed": 0, "edit": {"k": 0, "p": 0.5}})
    assert a != key_of({"seed": 1, "edit": {"k": 0, "p": 0.5}})
    assert len(a) == 16


def test_write_then_read(tmp_path):
    record = {"schema": 1, "key": "k", "status": "ok", "x": float("nan"), "y": (1, 2.5)}
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
    records.write(tmp_path, {"schema": 1, "key": "k", "status": "ok"})
    with pytest.raises(TypeError):
        records.write(tmp_path, {"schema": 1, "key": "k", "status": "ok", "x": object()})
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
