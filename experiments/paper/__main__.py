"""Make artefacts from finished points: `python -m experiments.paper fig1 fig2 results=results`.

Without names: all that have been swept. Exit code 1 where points failed or are missing. With
`from=committed` nothing is drawn: the checks judge the points in `DIR/paper/` anew.
"""

import sys
from pathlib import Path

from deltalab.store import shown
from deltalab.store.reading import read
from deltalab.sweep.sweeps import listed
from experiments.paper import committed, log
from experiments.paper.artefacts import ARTEFACTS
from experiments.paper.card import write
from experiments.paper.found import Found


def main(arguments: list[str]) -> int:
    """Write the artefacts that the arguments name."""
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    results, scale = Path(given.get("results", "results")), given.get("scale", "demo")
    names = [a for a in arguments if "=" not in a]
    if unknown := [n for n in names if n not in ARTEFACTS]:
        known = ", ".join(ARTEFACTS)
        print(shown.line(f"{unknown[0]}: no such artefact; there are {known}"), file=sys.stderr)
        return 2
    if given.get("from") == "committed":
        return _judge(names or [*ARTEFACTS], results)
    points = read(results, warn=lambda text: print(shown.line(f"warning: {text}"), file=sys.stderr))
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
            print(shown.line(f"{name}: {problem}"), file=sys.stderr)
            lacking = True
            continue
        _say(name, found, path)
    log.main(results)
    return int(lacking)


def _say(name: str, found: Found, path: Path) -> None:
    """Print what came of an artefact: names of models and metrics in it are anyone's."""
    print(shown.line(f"{name}: {found.verdict}. {found.sentence}"))
    print(shown.line(f"  {path}"))


def _judge(names: list[str], results: Path) -> int:
    """Judge artefacts by their committed points."""
    for name in names:
        try:
            path, found = committed.judge(name, results)
            _say(name, found, path)
        except (OSError, ValueError) as problem:
            print(shown.line(f"{name}: left as it is; {problem}"), file=sys.stderr)
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
