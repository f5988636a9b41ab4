"""A sweep of many points of a trivial edit: what each costs, and what the commands do with them.

    python -m experiments.scale.many [POINTS [SEEN [ROUNDS]]]   (default: 10,000; half an hour)

The edit is `keep` on the smallest pair, without term and metrics, so that what is measured is the
machinery. Hydra's own cost is that of the same sweep with a job that does nothing and a config that
nobody checks, less what one point costs. Times are of the processor, beside the wall's: the least
of so many rounds, since other programs on the machine can only add to them. Memory is the peak of
the process, from the system.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltalab.sweep import sweeps

OVERRIDES = ("edit=keep", "data.test.limit=1", "data.objective.limit=1", "riemann=off",
             "evaluator=none")  # fmt: skip
EMPTY = 500  # points of the sweep whose job does nothing
PROGRAM = """
import sys, time
from pathlib import Path
what, *arguments = sys.argv[1:]
sys.argv = ["deltalab", *arguments]
if what == "report":
    from deltalab.report import command as report
    report.main(arguments)
elif what == "status":
    from deltalab.sweep import status
    status.main(arguments)
else:
    from contextlib import nullcontext
    from deltalab import cli
    from deltalab.sweep import composing
    if what == "nothing":
        def nothing(cfg):
            pass
        cli.point, composing.guarded = nothing, nullcontext
    elif what == "seconds":
        from deltalab import run
        evaluate = run.evaluate
        spent = []
        def timed(point):
            began = time.process_time()
            try:
                return evaluate(point)
            finally:
                spent.append(time.process_time() - began)
        run.evaluate = timed
    cli.main()
    if what == "seconds":
        print(f"evaluate {sum(spent):.3f} s in {len(spent)} points", file=sys.stderr)
status = Path("/proc/self/status").read_text()
print("used", status.split("VmHWM:")[1].split()[0], time.process_time(), file=sys.stderr)
"""


@dataclass(frozen=True)
class Cost:
    """What a command cost: seconds by the clock and of the processor, and its peak in GiB."""

    wall: float
    processor: float
    memory: float
    said: str


def measured(what: str, *arguments: str) -> Cost:
    """Run a command in a process of its own."""
    began = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    wall = time.perf_counter() - began
    *said, used = found.stderr.splitlines()
    _, memory, processor = used.split()
    text = "\n".join([*said, found.stdout]).strip()
    return Cost(wall, float(processor), int(memory) / 2**20, text)


def least(rounds: Sequence[Sequence[Cost]]) -> list[Cost]:
    """Return of each command the round that took the least time of the processor."""
    return [min(costs, key=lambda cost: cost.processor) for costs in zip(*rounds, strict=True)]


def sweep(results: Path, points: int) -> list[str]:
    """Return the arguments of a sweep of `keep` over so many seeds."""
    seeds = f"seed=range(0,{points})"
    most = f"most_points={max(points, 10_000)}"
    return ["-m", *OVERRIDES, seeds, most, f"results={results}"]


def size_of(directory: Path) -> tuple[int, float]:
    """Return the number of files below a directory, and their size in MB as a disk counts it."""
    files = [entry for entry in directory.rglob("*") if entry.is_file()]
    return len(files), sum(file.stat().st_blocks * 512 for file in files) / 1e6


def main(points: int = 10_000, seen: int = 10_000, rounds: int = 1) -> None:
    """Run the sweep, then the commands that look at it, and print one line for each.

    Args:
        points: of the sweep that is run.
        seen: points that status and report look at; beyond those of the sweep, copies of its
            records with another seed and key.
        rounds: how often the sweep is run, each time into another directory.
    """
    with tempfile.TemporaryDirectory() as place:
        results = Path(place) / "results"
        few_points = min(EMPTY, points)
        found = [
            [
                measured(what, *sweep(results if last else Path(place) / f"{what}-{n}-{round_}", n))
                for what, n, last in (
                    ("nothing", 1, False),
                    ("nothing", few_points, False),
                    ("seconds", 1, False),
                    ("seconds", points, round_ == rounds - 1),
                )
            ]
            for round_ in range(rounds)
        ]
        one, few, first, all_ = least(found)
        own = 1000 * (few.processor - one.processor) / max(few_points - 1, 1)
        growth = (few.memory - one.memory) * 2**20 / max(few_points - 1, 1)
        print(f"Hydra with an empty job: {own:.1f} ms and {growth:.0f} kB a point", flush=True)
        each = 1000 * (all_.processor - first.processor) / max(points - 1, 1)
        inside = 1000 * (_spent(all_) - _spent(first)) / max(points - 1, 1)
        print(
            f"{points} points: {each:.1f} ms a point, of which evaluation {inside:.1f} ms; beyond"
            f" both {each - inside - own:.1f} ms; by the clock {all_.wall:.0f} s; peak"
            f" {all_.memory:.2f} GiB, with one point {first.memory:.2f} GiB",
            flush=True,
        )
        again = measured("sweep", *sweep(results, points))
        done = 1000 * (again.processor - one.processor) / points
        print(f"again, all done before: {done:.1f} ms a point")
        for name in ("records", "logs", "locks"):
            count, size = size_of(results / name)
            print(f"{name}: {count} files, {size:.1f} MB on disk")
        multiply(results, seen)
        for what in ("status", "report"):
            cost = measured(what, f"results={results}")
            print(
                f"deltalab-{what}, {seen} points: {cost.wall:.1f} s, of the processor"
                f" {cost.processor:.1f} s, peak {cost.memory:.2f} GiB",
                flush=True,
            )
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def _spent(cost: Cost) -> float:
    return float(cost.said.split("evaluate ")[1].split()[0])


def multiply(results: Path, count: int) -> None:
    """Copy the records of a sweep under further seeds and keys, and list all as one sweep."""
    files = sorted((results / "records").glob("*.json"))
    example = json.loads(files[0].read_text())
    keys = [file.stem for file in files][:count]
    for number in range(len(keys), count):
        keys.append(f"{number:016x}")
        record = example | {"key": keys[-1], "seed": 10**6 + number}
        (results / "records" / f"{keys[-1]}.json").write_text(json.dumps(record, indent=1))
    folder = results / "logs" / "multiplied"
    folder.mkdir(exist_ok=True)
    for number, key in enumerate(keys):
        (folder / f"{number}").mkdir(exist_ok=True)
        sweeps.note(folder / f"{number}", sweeps.KEY, key)
    sweeps.write(folder, ["copies"], [[f"seed={number}"] for number in range(count)])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
