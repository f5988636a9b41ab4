import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deltalab.store import locks

HOLD = """
import sys, time
from pathlib import Path
from deltalab.store import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "locks" / "abc"


@pytest.fixture
def holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def forged(path, **changes):
    """Write the lock of an owner elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = replace(locks._myself(), host="elsewhere", space="another", **changes)
    file = path.parent / f"{path.name}.0.lock"
    file.write_text(json.dumps(asdict(owner)))
    return file


def test_a_held_lock_is_held_and_then_gone(path):
    with locks.held(path) as lock:
        assert locks.owner(path).pid == os.getpid()
        assert not lock.lost()
        with pytest.raises(locks.Busy, match=f"process {os.getpid()} on"), locks.held(path):
            pass
    assert locks.owner(path) is None
    assert list(path.parent.iterdir()) == []


def test_names_that_begin_alike_are_different_locks(path):
    with locks.held(path), locks.held(path.with_name("abcd")), locks.held(path.with_name("ab")):
        assert set(locks.all_held(path.parent)) == {"ab", "abc", "abcd"}


def test_another_process_holds_it_until_it_is_killed(path, holder):
    assert locks.owner(path).pid == holder.pid
    with pytest.raises(locks.Busy), locks.held(path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.held(path) as lock:
        assert lock.file.name == "abc.1.lock"
        assert [f.name for f in path.parent.iterdir()] == ["abc.1.lock"]


def test_a_stopped_process_keeps_its_lock(path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(locks.Busy), locks.held(path):
        pass


def test_an_owner_elsewhere_lives_as_long_as_it_touches_its_lock(path):
    file = forged(path)
    with pytest.raises(locks.Busy, match="elsewhere"), locks.held(path):
        pass
    old = time.time() - locks.STALE - 1
    os.utime(file, (old, old))
    with locks.held(path) as lock:
        assert lock.file.name == "abc.1.lock"


def test_held_locks_are_touched(path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "_thread", None)
    with locks.held(path) as lock:
        os.utime(lock.file, (0, 0))
        until = time.time() + 10
        while lock.file.stat().st_mtime == 0 and time.time() < until:
            time.sleep(0.01)
        assert abs(lock.file.stat().st_mtime - time.time()) < 5


def test_a_number_used_again_is_another_process(path):
    path.parent.mkdir()
    gone = replace(locks._myself(), start=1)
    (path.parent / "abc.3.lock").write_text(json.dumps(asdict(gone)))
    with locks.held(path) as lock:
        assert lock.file.name == "abc.4.lock"


def test_the_owner_that_was_taken_for_dead_sees_that_it_lost(path):
    with locks.held(path) as lock:
        forged(path.with_name("abc")).rename(path.parent / "abc.1.lock")
        assert lock.lost()
    assert (path.parent / "abc.1.lock").exists(), "the other's lock is not ours to remove"


def test_a_lock_without_an_owner_yet_is_held_until_it_is_old(path):
    path.parent.mkdir()
    file = path.parent / "abc.0.lock"
    file.touch()
    with pytest.raises(locks.Busy, match="unknown machine"), locks.held(path):
        pass
    os.utime(file, (0, 0))
    with locks.held(path):
        pass


def test_waiting_ends_when_one_is_free(path, holder):
    assert locks.wait([path, path.with_name("free")]) == [path.with_name("free")]
    holder.kill()
    holder.wait()
    assert locks.wait([path]) == [path]


def _count(arguments: tuple[Path, int]) -> int:
    """Add to a file's number under a lock; without the lock additions would be lost."""
    path, times = arguments
    done, counter = 0, path.with_name("counter")
    while done < times:
        try:
            with locks.held(path) as lock:
                number = int(counter.read_text() or 0)
                time.sleep(0.0005)
                counter.write_text(str(number + 1))
                done += 1
                if done % 5 == 0:  # die without releasing
                    dead = replace(lock.owner, start=1)
                    lock.file.write_text(json.dumps(asdict(dead)))
        except locks.Busy:
            time.sleep(0.0005)
    return done


def test_processes_never_hold_a_lock_together_also_when_some_die(path):
    path.parent.mkdir()
    path.with_name("counter").write_text("0")
    with ProcessPoolExecutor(8) as pool:
        assert sum(pool.map(_count, [(path, 60)] * 8)) == 480
    assert int(path.with_name("counter").read_text()) == 480
