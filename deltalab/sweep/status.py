"""`deltalab-status`: how far a sweep is, what failed, what runs where, and how long it may take."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltalab.store import locks, shown
from deltalab.store.record import fault, is_newer, peek
from deltalab.sweep import sweeps
from deltalab.terminal.commands import command

USAGE = """\
usage: deltalab-status [results=DIR] [sweep=NAME] [list=STATE] [--retry-failed]

Say how many points of a sweep are done, running, failed and missing, and what remains.

  results=DIR      where the records are (default: results)
  sweep=NAME       a folder of DIR/logs (default: the latest sweep)
  list=STATE       list every point that is done, with what came out, running, failed or missing
  --retry-failed   run the failed points again, one after another, and nothing else

The command of the sweep itself, given again, runs all that failed or is missing.
"""
STATES = ("done", "running", "failed", "missing")
SHOWN = 10  # failures that are listed unasked


@dataclass(frozen=True)
class Point:
    """One point of a sweep: what sets it apart, its state, and what there is to say of it."""

    overrides: tuple[str, ...]
    state: str
    note: str = ""
    seconds: float | None = None
    key: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success and 2 on a user's mistake, told in one line."""
    return command("deltalab-status", USAGE, lambda arguments: status(**settings(arguments)), argv)


def settings(arguments: Sequence[str]) -> dict[str, str]:
    """Read the arguments over the defaults.

    >>> settings(["results=out", "--retry-failed"])
    {'results': 'out', 'sweep': '', 'list_': '', 'retry': 'true'}
    """
    found = {"results": "results", "sweep": "", "list_": "", "retry": ""}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument in ("--retry-failed", "retry_failed=true"):
            found["retry"] = "true"
        elif name in ("results", "sweep", "list") and equals and value:
            found[name + "_" * (name == "list")] = value
        else:
            raise ValueError(
                f"{argument}: must be results=DIR, sweep=NAME, list=STATE or --retry-failed"
            )
    if found["list_"] and found["list_"] not in STATES:
        raise ValueError(f"list={found['list_']}: must be one of {', '.join(STATES)}")
    return found


def status(results: str, sweep: str = "", list_: str = "", retry: str = "") -> int:
    """Print how far a sweep is; run its failed points again if asked."""
    directory = Path(results).expanduser()
    if not directory.is_dir():
        raise ValueError(f"results={results}: no such directory")
    known = list(sweeps.listed(directory))
    chosen = [one for one in known if sweep in ("", one.folder.name)]
    if not chosen:
        names = ", ".join(one.folder.name for one in known[:5])
        raise ValueError(
            f"sweep={sweep}: no such sweep; the latest are {names}" if names
            else f"results={results}: no sweep in {directory / 'logs'}"
        )  # fmt: skip
    points = look(directory, chosen[0], known)
    if retry:
        return _retry([point for point in points if point.state == "failed"], results)
    one = chosen[0]
    print(shown.line(f"sweep {one.folder.name}: deltalab -m {' '.join(one.command)}"))
    print(summary(points))
    common = set.intersection(*(set(point.overrides) for point in points)) if points else set()
    for state in [list_] if list_ else ["running", "failed"]:
        found = [point for point in points if point.state == state]
        for point in found if list_ else found[:SHOWN]:
            point = _outcome(directory, point)
            print(
                f"  {'' if list_ else f'{state} '}{shown.name(told(point, common), shown.MESSAGE)}"
            )
        if not list_ and len(found) > SHOWN:
            print(f"  and {len(found) - SHOWN} more: list={state}")
    return 0


def look(directory: Path, sweep: sweeps.Listed, known: Iterable[sweeps.Listed]) -> list[Point]:
    """Return every point of a sweep with its state.

    A point that this sweep has not begun is known by the key that it has in another sweep.
    """
    elsewhere: dict[tuple[str, ...], str] = {}
    for one in known:
        for number, key in one.keys.items():
            elsewhere.setdefault(tuple(sorted(one.points[number])), key)
    held = locks.all_held(directory / "locks")
    found = []
    for number, overrides in enumerate(sweep.points):
        key = sweep.keys.get(number) or elsewhere.get(tuple(sorted(overrides)), "")
        record = _record(directory, key) if key else {}
        if (state := peek(record, "status")) == "ok" and fault(record) is None:
            seconds = peek(record, "seconds")
            found.append(Point(overrides, "done", seconds=seconds, key=key))
        elif key in held:
            found.append(Point(overrides, "running", _holder(held[key])))
        elif state == "error":
            kind, message = (peek(record, name) for name in ("kind_of_failure", "message"))
            why = f"{kind or 'Error'}: {message or ''}"
            found.append(Point(overrides, "failed", " ".join(why.split())))
        elif number in sweep.failures:
            found.append(Point(overrides, "failed", sweep.failures[number]))
        elif is_newer(record):
            found.append(Point(overrides, "failed", f"record of a newer version: {fault(record)}"))
        else:
            found.append(Point(overrides, "missing"))
    return found


def _holder(owner: locks.Owner) -> str:
    if owner == locks.UNKNOWN:
        return f"{owner}"
    return f"{owner}, for {duration(max(time.time() - owner.since, 0.0))}"


def _record(directory: Path, key: str) -> Mapping[str, object]:
    try:
        found = json.loads((directory / "records" / f"{key}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _outcome(directory: Path, point: Point) -> Point:
    """Return a point with what came out of it as its note, if it is done."""
    if point.state != "done":
        return point
    from deltalab.report.columns import describe

    try:
        return replace(point, note=" ".join(describe(_record(directory, point.key)).split()))
    except ValueError:  # no record that this version can read
        return point


def summary(points: Sequence[Point]) -> str:
    """Say how many points are in each state, and how long the rest may take.

    >>> done = [Point(("seed=1",), "done", seconds=30.0)] * 3
    >>> print(summary([*done, Point(("seed=2",), "running"), Point(("seed=3",), "missing")]))
    3 of 5 done (60%), 1 running, 1 missing; about 1 min with the 1 process that is running
    """
    counts = Counter(point.state for point in points)
    done, total, running = counts["done"], len(points), counts["running"]
    text = f"{done} of {total} done ({100 * done // max(total, 1)}%)"
    text += "".join(f", {counts[state]} {state}" for state in STATES[1:] if counts[state])
    seconds = [point.seconds for point in points if point.seconds is not None]
    if done == total or not seconds:
        return text
    rest = (total - done) * sum(seconds) / len(seconds) / max(running, 1)
    processes = "process that is" if running == 1 else "processes that are"
    who = (
        f"with the {running} {processes} running" if running else "in one process; none is running"
    )
    return f"{text}; about {duration(rest)} {who}"


def duration(seconds: float) -> str:
    """Write a length of time for a person.

    >>> duration(5), duration(90), duration(9000), duration(200000)
    ('5 s', '2 min', '2.5 h', '2.3 days')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} days"


def told(point: Point, common: Collection[str]) -> str:
    """Return what sets a point apart from all others, and what there is to say of it.

    >>> told(Point(("edit=dare", "seed=1"), "failed", "ValueError: no"), {"edit=dare"})
    'seed=1: ValueError: no'
    """
    own = [override for override in point.overrides if override not in common]
    return " ".join(own or point.overrides) + (f": {point.note}" if point.note else "")


def _retry(failed: Sequence[Point], results: str) -> int:
    if not failed:
        print("no point has failed")
    codes = []
    for point in failed:
        again = [sys.executable, "-m", "deltalab", *point.overrides]
        if not any(override.startswith("results=") for override in point.overrides):
            again.append(f"results={results}")
        codes.append(subprocess.run(again).returncode)
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
