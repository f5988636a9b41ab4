"""What appears under its final name is whole, and on the disk itself."""

import os
import subprocess
import sys

import pytest

from deltalab.store import files, locks


@pytest.fixture
def done(monkeypatch):
    """The calls of the system that decide what a power cut leaves, in their order."""
    found, sync, replace, rename = [], os.fsync, os.replace, os.rename

    def synced(handle):
        found.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def named(call):
        return lambda old, new: (found.append(("name", os.path.basename(new))), call(old, new))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named(replace))
    monkeypatch.setattr(os, "rename", named(rename))
    return found


def test_a_text_is_on_the_disk_before_its_name_and_the_name_after(tmp_path, done):
    place = tmp_path / "place"
    files.write(place / "a", "text")
    (_, first), *rest = done
    assert first.startswith(".a.")
    assert rest == [("name", "a"), ("sync", "place")]


def test_a_directory_is_on_the_disk_before_its_name_and_the_name_after(tmp_path, done):
    with files.building(tmp_path / "out") as made:
        (made / "a").write_text("text")
        (made / "deep").mkdir()
        (made / "deep" / "b").write_text("text")
    assert {("sync", name) for name in ("a", "b", "deep", made.name)} == set(done[:4])
    assert done[4:] == [("name", "out"), ("sync", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError, SystemExit])
def test_what_fails_leaves_nothing(tmp_path, fault):
    def build():
        with files.building(tmp_path / "out") as made:
            (made / "a").write_text("text")
            raise fault

    with pytest.raises(fault):
        build()
    with pytest.raises(UnicodeEncodeError):
        files.write(tmp_path / "a", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_one_process_builds_a_path(tmp_path):
    with files.building(tmp_path / "out") as made:
        assert files.leftovers(tmp_path / "out") == []
        with (
            pytest.raises(ValueError, match=rf"out: process {os.getpid()} on .* is writing it"),
            files.building(tmp_path / "out"),
        ):
            pass
        assert made.is_dir()
    assert locks.owner(files.hidden(tmp_path / "out")) is None


def test_files_are_as_open_as_the_umask_says(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from deltalab.store import files;"
        "os.umask(int(sys.argv[2], 8)); files.write(Path(sys.argv[1]) / sys.argv[2], 'x')"
    )
    for mask, mode in (("077", 0o600), ("022", 0o644)):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), mask], check=True)
        assert (tmp_path / mask).stat().st_mode & 0o777 == mode


def test_names_as_long_as_names_can_be(tmp_path):
    for name in ("a" * 240, "é" * 120):
        assert files.write(tmp_path / name, "x").read_text() == "x"
        with files.building(tmp_path / (name[:-1] + "z")):
            pass
