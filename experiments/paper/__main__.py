"""Make artefacts from finished points: `python -m experiments.paper fig1 fig2 results=results`.

Without names: all artefacts whose points are there. Exit code 1 where points failed or are missing.
"""

import sys
from pathlib import Path

from deltalab.reading import read
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
    points = read(results, warn=lambda line: print(f"warning: {line}", file=sys.stderr))
    lacking = False
    for name in names or ARTEFACTS:
        own = [p for p in points if p.experiment == name]
        done = [p for p in own if p.failure is None]
        if len(own) > len(done):
            print(f"{name}: {len(own) - len(done)} points failed", file=sys.stderr)
            lacking = True
        if not done:
            lacking |= bool(names)
            if names:
                print(f"{name}: no points; run deltalab -m experiment={name}", file=sys.stderr)
            continue
        path, found = write(name, done, results, scale)
        print(f"{name}: {found.verdict}. {found.sentence}\n  {path}")
    return int(lacking)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
