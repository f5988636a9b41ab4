"""All candidates on five pairs, measured once: what they cost, and what was expected of them.

    python -m experiments.choosing.grid

Processor seconds of this process, the pair opened beforehand: opening is the same for every search.
The candidates are ranked first, so that the ranking pays for all that is made at first use.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltalab.choosing import command
from deltalab.choosing.candidates import candidates, label
from deltalab.run.building import prepare
from deltalab.run.point import reference

PAIRS = ("mnist_vit", "fashion_vit", "digits_vit", "tiny_llm", "tiny_llm_far")
"""None of them is among those that the prediction was made on."""
FILE = Path(__file__).parents[2] / "results" / "choosing" / "grid.jsonl"


def lines(pair: str, results: str) -> Iterator[dict[str, Any]]:
    """Yield one line of a pair, then one of each candidate."""
    settings, choices = command.composed([f"model={pair}", "evaluator=none", f"results={results}"])
    every = candidates()
    points = [command.pointed(settings, choices, each) for each in every]
    reference(prepare(*points[0]))
    start = time.process_time()
    curves, expected = command.ranked(points)
    yield {"pair": pair, "gap": curves.gap, "ranking": round(time.process_time() - start, 4)}
    for each, point, told in zip(every, points, expected, strict=True):
        if told is None:
            continue
        start = time.process_time()
        measured = command.measure(*point, curves)
        spent = round(time.process_time() - start, 4)
        told_of = {"expected": asdict(told), "measured": asdict(measured), "seconds": spent}
        yield {"pair": pair, "edit": label(each), **told_of}


def main(pairs: Sequence[str]) -> None:
    """Measure pairs and write all their lines."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as results, open(FILE, "w", encoding="utf-8") as file:
        for pair in pairs:
            for line in lines(pair, f"{results}/{pair}"):
                print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or PAIRS)
