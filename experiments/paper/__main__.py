"""Make artefacts from finished points: `python -m experiments.paper fig1 fig2 results=results`.

Without names: all that have been swept. Exit code 1 where points failed or are missing. With
`from=committed` nothing is drawn: the checks judge the points in `DIR/paper/` anew.
"""

import sys
from pathlib import Path

from deltalab.store.reading import read
from deltalab.sweep.sweeps import listed
from experiments.paper import committed, log
from experiments.paper.artefacts import ARTEFACTS
from experiments.paper.card import write


def main(arguments: list[str]) -> int:
    """Write the artefacts that the arguments name."""
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    results, scale = Path(given.get("results", "results")), given.get("scale", "demo")
    names = [a for a in arguments if "=" not in a]
    if unknown := [n for n in names if n not in ARTEFACTS]:
        print(f"{unknown[0]}: no such artefact; there are {', '.join(ARTEFACTS)}", file=sys.stderr)
        return 2
    if given.get("from") == "committed":
        return _judge(names or [*ARTEFACTS], results)
    points = read(results, warn=lambda line: print(f"warning: {line}", file=sys.stderr))
    wanted = _wanted(results)
    lacking = False
    for name in names or wanted:
        done = [p for p in points if p.experiment == name and p.failure is None]
        if len(done) < wanted.get(name, 1):
            told = f"{len(done)} of {wanted.get(name, 'its')} points are done"
            print(f"{name}: {told}; run deltalab -m experiment={name}", file=sys.stderr)
            lacking = True
            continue
        try:
            path, found = write(name, done, results, scale)
        except ValueError as problem:
            print(f"{name}: {problem}", file=sys.stderr)
            lacking = True
            continue
        print(f"{name}: {found.verdict}. {found.sentence}\n  {path}")
    log.main(results)
    return int(lacking)


def _judge(names: list[str], results: Path) -> int:
    """Judge artefacts by their committed points."""
    for name in names:
        try:
            path, found = committed.judge(name, results)
            print(f"{name}: {found.verdict}. {found.sentence}\n  {path}")
        except (OSError, ValueError) as problem:
            print(f"{name}: left as it is; {problem}", file=sys.stderr)
    log.main(results)
    return 0


def _wanted(results: Path) -> dict[str, int]:
    """Return how many points the latest sweep of every artefact has."""
    wanted: dict[str, int] = {}
    for sweep in listed(results):
        for name in ARTEFACTS:
            if f"experiment={name}" in sweep.command:
                wanted.setdefault(name, len(sweep.points))
    return wanted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
