"""Fault injection: two competing sweeps over one results directory, killed again and again.

    python -m experiments.scale.kills [KILLS] [SEED]        (default: 200 kills)

Each sweep is a real run of the command line, in a process forked from this one after the imports,
so that it lives as long as it works and not as long as it imports. It gets SIGKILL or SIGTERM
after a random time; records on disk are damaged now and then. In the end the same command, left
alone, must complete the sweep. Checked: one valid record per point and no other; no point run by
two processes at the same time; records and report equal to those of an undisturbed run.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

FAST = ("data.test.limit=32", "data.objective.limit=32", "riemann=off", "evaluator=none")
VOLATILE = ("seconds", "peak_memory_bytes", "git")
BEGUN, DELAY = 4, 0.6
"""A sweep is killed when it has begun up to so many points, and up to so many seconds later."""
DAMAGED = 0.1
"""How many of the kills are followed by damage to a record."""


def command(first: int, count: int) -> list[str]:
    """Return the arguments of a sweep over `count` seeds of DARE."""
    seeds = f"seed=range({first},{first + count})"
    return ["-m", "edit=dare", "grid=none", "edit.p=0.5", seeds, *FAST]


@dataclass
class Harness:
    """The processes of one run of faults.

    Attributes:
        results: the directory that all sweeps share.
        lives: begin and end of every process that has run, by number.
        kills: signals that met a living process, by name.
    """

    results: Path
    lives: dict[int, list[float]] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    damaged: int = 0

    def start(self, arguments: list[str]) -> int:
        """Fork a process that runs the command line."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child([*arguments, f"results={self.results}"], self.results)
        self.lives[pid] = [time.monotonic()]
        return pid

    def ended(self, pid: int, wait: bool = False) -> int | None:
        """Return the exit code of a process that has ended (-9 for SIGKILL), else None."""
        found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
        if not found:
            return None
        self.lives[pid].append(time.monotonic())
        return os.waitstatus_to_exitcode(status)

    def kill(self, pid: int, number: signal.Signals) -> int:
        """Signal a process and wait until it is gone."""
        os.kill(pid, number)
        code = self.ended(pid, wait=True)
        assert code is not None
        self.kills[number.name if code != 0 else "too late"] += 1
        return code

    def damage(self, chance: random.Random) -> None:
        """Tear a record as a crash of the machine might."""
        files = sorted((self.results / "records").glob("*.json"))
        if files:
            file = chance.choice(files)
            content = file.read_bytes()
            file.write_bytes(content[: chance.randrange(len(content))])
            self.damaged += 1

    def told(self) -> str:
        """Return the last that the processes have printed."""
        output = self.results / "output"
        return output.read_text()[-2000:] if output.exists() else ""

    def begun(self, pid: int) -> int:
        """Return how many points a process has begun."""
        log = self.results / "evaluations"
        lines = log.read_text().splitlines() if log.exists() else []
        return sum(line.startswith(f"{pid} ") and " begin " in line for line in lines)

    def intervals(self) -> dict[str, list[tuple[float, float, int]]]:
        """Return when each point was evaluated, by key: begin, end, process."""
        found: dict[str, list[tuple[float, float, int]]] = {}
        begun: dict[tuple[int, str], float] = {}
        for line in (self.results / "evaluations").read_text().splitlines():
            pid, key, what, when = line.split()
            if what == "begin":
                begun[int(pid), key] = float(when)
            else:
                began = begun.pop((int(pid), key))
                found.setdefault(key, []).append((began, float(when), int(pid)))
        for (process, key), began in begun.items():  # these never ended
            found.setdefault(key, []).append((began, self.lives[process][1], process))
        return found


def _child(arguments: list[str], results: Path) -> None:
    """Be the command line: run, and never return into the harness."""
    from deltalab import cli, run

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(results / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _noted(run, results / "evaluations")
    sys.argv = ["deltalab", *arguments]
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        print(f"crash: {error!r}", flush=True)
        code = 70
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def _noted(run: Any, log: Path) -> None:
    """Note when every point's evaluation begins and ends; a short append is never torn."""
    evaluate: Callable[[Any], Any] = run.evaluate

    def note(key: str, what: str) -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{os.getpid()} {key} {what} {time.monotonic()}\n".encode())
        os.close(handle)

    def noted(point: Any) -> Any:
        note(point.key, "begin")
        try:
            return evaluate(point)
        finally:
            note(point.key, "end")

    run.evaluate = noted


def disturb(harness: Harness, kills: int, points: int, chance: random.Random) -> int:
    """Run sweeps of `points` points, two at a time, until so many were killed; return all points.

    A sweep that a process has completed is followed by one over further seeds.
    """
    first, running, slot_first = 0, dict.fromkeys(range(2), 0), dict.fromkeys(range(2), 0)
    begun, ends = dict.fromkeys(range(2), 0), dict.fromkeys(range(2), 0.0)
    while harness.kills.total() - harness.kills["too late"] < kills:
        for slot in running:
            pid = running[slot]
            if not pid:
                slot_first[slot] = first
                running[slot] = harness.start(command(first, points))
                begun[slot], ends[slot] = chance.randrange(BEGUN), 0.0
            elif (code := harness.ended(pid)) is not None:
                assert code == 0, f"a sweep that was left alone ended with {code}"
                if slot_first[slot] == first:
                    first += points
                running[slot] = 0
            elif not ends[slot] and harness.begun(pid) >= begun[slot]:
                ends[slot] = time.monotonic() + chance.uniform(0, DELAY)
            elif ends[slot] and time.monotonic() > ends[slot]:
                number = chance.choices((signal.SIGKILL, signal.SIGTERM), (0.7, 0.3))[0]
                code = harness.kill(pid, number)
                expected = code in (0, -number, 128 + number)
                assert expected, f"{number.name}: {code}\n{harness.told()}"
                running[slot] = 0
                if chance.random() < DAMAGED:
                    harness.damage(chance)
        time.sleep(0.01)
    for pid in filter(None, running.values()):
        harness.kill(pid, signal.SIGKILL)
    return first + points


def verify(harness: Harness, undisturbed: Path, points: int) -> dict[str, Any]:
    """Check what the faults have left against an undisturbed run; return what to tell."""
    theirs, ours = _records(undisturbed), _records(harness.results)
    assert len(theirs) == points
    assert ours == theirs, "records differ from an undisturbed run's"
    assert _report(ours) == _report(theirs), "reports differ"
    assert not list((harness.results / "locks").iterdir()), "a lock is left"
    intervals = harness.intervals()
    for key, times in intervals.items():
        times.sort()
        for (_, end, one), (begin, _, other) in pairwise(times):
            assert end <= begin, f"{key} was run by {one} and {other} at the same time"
    again = sum(len(times) - 1 for times in intervals.values())
    left = len(list((harness.results / "records").glob(".*")))
    return {"points": points, "evaluations repeated": again, "temporary files left": left}


def _records(results: Path) -> dict[str, dict[str, Any]]:
    """Return all records by file name without what differs from run to run; all must be valid."""
    found = {}
    for file in (results / "records").glob("*.json"):
        record = json.loads(file.read_text())
        assert record["status"] == "ok", f"{file}: {record['error']}"
        assert file.stem == record["key"]
        found[file.stem] = {k: v for k, v in record.items() if k not in VOLATILE}
    return found


def _report(records: dict[str, dict[str, Any]]) -> bytes:
    """Return the report's page of some records; the time that each took is not part of them."""
    from contextlib import redirect_stdout
    from io import StringIO

    from deltalab.report import command as report

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "records").mkdir()
        for name, record in records.items():
            (Path(place) / "records" / f"{name}.json").write_text(json.dumps(record))
        with redirect_stdout(StringIO()):
            assert report.main([f"results={place}"]) == 0
        return (Path(place) / "runs.md").read_bytes()


def main(kills: int = 200, seed: int = 0, points: int = 12) -> None:
    """Inject the faults, complete the sweep, and compare it with an undisturbed one."""
    import timm  # noqa: F401  what every sweep needs is imported once, here
    import torch

    from deltalab import run  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        harness, calm = Harness(Path(place) / "faults"), Harness(Path(place) / "calm")
        harness.results.mkdir()
        calm.results.mkdir()
        began = time.perf_counter()
        total = disturb(harness, kills, points, random.Random(seed))
        disturbed = time.perf_counter() - began
        for one in (harness, calm):
            code = one.ended(one.start(command(0, total)), wait=True)
            assert code == 0, (one.results / "output").read_text()[-2000:]
        told = {"kills": dict(harness.kills), "records damaged": harness.damaged}
        told |= verify(harness, calm.results, total) | {"seconds": round(disturbed, 1)}
        print("; ".join(f"{name}: {value}" for name, value in told.items()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
