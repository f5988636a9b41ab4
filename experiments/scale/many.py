"""A sweep of many points of a trivial edit: what each costs, and what the commands do with them.

    python -m experiments.scale.many [POINTS]        (default: 10,000; about half an hour)

The edit is `keep` on the smallest pair, without term and metrics, so that what is measured is the
machinery. Hydra's own cost is that of the same sweep whose job does nothing, measured on fewer
points of the same sweep. Memory is the peak of the process, from the system.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OVERRIDES = ("edit=keep", "data.test.limit=1", "data.objective.limit=1", "riemann=off",
             "evaluator=none")  # fmt: skip
EMPTY = 500  # points of the sweep whose job does nothing
PROGRAM = """
import sys, time
from pathlib import Path
what, *arguments = sys.argv[1:]
sys.argv = ["deltalab", *arguments]
if what == "report":
    from deltalab import report
    report.main(arguments)
elif what == "status":
    from deltalab import status
    status.main(arguments)
else:
    from deltalab import cli
    if what == "nothing":
        def nothing(cfg):
            pass
        cli.point = nothing
    elif what == "seconds":
        from deltalab import run
        evaluate = run.evaluate
        spent = []
        def timed(point):
            began = time.perf_counter()
            try:
                return evaluate(point)
            finally:
                spent.append(time.perf_counter() - began)
        run.evaluate = timed
    cli.main()
    if what == "seconds":
        print(f"evaluate {sum(spent):.3f} s in {len(spent)} points", file=sys.stderr)
status = Path("/proc/self/status").read_text()
print("VmHWM", status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def measured(what: str, *arguments: str) -> tuple[float, float, str]:
    """Return seconds, peak memory in GiB and the last lines of a command's output."""
    began = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    *said, memory = found.stderr.splitlines()
    return seconds, int(memory.split()[1]) / 2**20, "\n".join([*said, found.stdout])


def sweep(results: Path, points: int) -> list[str]:
    """Return the arguments of a sweep of `keep` over so many seeds."""
    seeds = f"seed=range(0,{points})"
    most = f"most_points={max(points, 10_000)}"
    return ["-m", *OVERRIDES, seeds, most, f"results={results}"]


def size_of(directory: Path) -> tuple[int, float]:
    """Return the number of files below a directory, and their size in MB as a disk counts it."""
    files = [entry for entry in directory.rglob("*") if entry.is_file()]
    return len(files), sum(file.stat().st_blocks * 512 for file in files) / 1e6


def main(points: int = 10_000) -> None:
    """Run the sweep, then the commands that look at it, and print one line for each."""
    with tempfile.TemporaryDirectory() as place:
        results = Path(place) / "results"
        few = min(EMPTY, points)
        start = measured("nothing", *sweep(Path(place) / "one", 1))[0]
        hydra = measured("nothing", *sweep(Path(place) / "nothing", few))[0]
        own = 1000 * (hydra - start) / max(few - 1, 1)
        print(f"Hydra with an empty job: {own:.1f} ms a point ({few} points)", flush=True)
        seconds, memory, said = measured("seconds", *sweep(results, points))
        spent = float(said.split("evaluate ")[1].split()[0])
        each = 1000 * seconds / points
        print(
            f"{points} points: {seconds:.0f} s, {each:.1f} ms a point, of which evaluation"
            f" {1000 * spent / points:.1f} ms; machinery beyond Hydra's own"
            f" {each - own - 1000 * spent / points:.1f} ms; peak {memory:.2f} GiB",
            flush=True,
        )
        seconds, memory, _ = measured("sweep", *sweep(results, points))
        print(f"again, all done before: {seconds:.0f} s, {1000 * seconds / points:.1f} ms a point")
        for name in ("records", "logs", "locks"):
            count, size = size_of(results / name)
            print(f"{name}: {count} files, {size:.0f} MB on disk")
        for what in ("status", "report"):
            seconds, memory, said = measured(what, f"results={results}")
            line = said.strip().splitlines()[min(1, len(said.strip().splitlines()) - 1)][:100]
            print(f"deltalab-{what}: {seconds:.1f} s, peak {memory:.2f} GiB ({line})", flush=True)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
