"""Every number of the committed cards and pages again, from committed points: `make recompute`.

`python -m experiments.paper.recompute [DIR]` writes nothing. It judges every artefact anew and
compares the card byte for byte; it makes the card's further tables anew and compares every number
within one unit of its last place, for points hold six figures; it compares the tables in
`results/README.md` and `README.md` with what they are written from. One line tells each, and what
the points lack; exit code 1 where something differs.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any

from deltalab.store.record import Outcome
from experiments import readme
from experiments.paper import committed, log
from experiments.paper.artefacts import ARTEFACTS
from experiments.paper.card import judged
from experiments.paper.evidence import kept

_NUMBER = re.compile(r"[-+]?(?:nan|\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
_OF_SIX = 1e-3
"""Percent of a change that two numbers of six figures may move their difference by."""
_PRE = re.compile(r"(\S+), (\S+?)(, %)?: pre ([\d.]+), post [\d.]+")


@dataclass(frozen=True)
class Recomputed:
    """What came of one artefact.

    Attributes:
        numbers: of its tables that came out again.
        differs: what did not.
        lacks: what the points do not tell, in words; empty where they suffice.
    """

    numbers: int = 0
    differs: tuple[str, ...] = ()
    lacks: str = ""


def recomputed(name: str, results: Path) -> Recomputed:
    """Make an artefact's verdict, checks and tables anew and compare them with its card."""
    artefact = ARTEFACTS[name]
    path = results / artefact.folder / f"{name}.json"
    text = path.read_text(encoding="utf-8")
    card = json.loads(text)
    try:
        points = _points(name, results, card)
        found = artefact.find(points, kept(path.with_name(f"{name}_documents.jsonl")) or None)
    except ValueError as lacking:
        return Recomputed(lacks=str(lacking))
    tables = [t for t in card["tables"] if t["title"] != "What was checked"]
    again = json.dumps(card | judged(name, found, tables), indent=1, ensure_ascii=False) + "\n"
    differs = [] if again == text else [f"{path}: verdict, sentence, checks or notes"]
    try:
        shown, figures = found.show()
    except (StopIteration, RuntimeError, ZeroDivisionError):
        return Recomputed(differs=tuple(differs), lacks="scores of pre or parts of the model")
    for _, figure, _ in figures:
        _close(figure)
    made = [{"title": t.title, "columns": [*t.columns], "rows": [*t.rows]} for t in shown]
    numbers, missing = 0, 0
    for table in tables:
        same = [t for t in made if t["title"] == table["title"]] or [made[tables.index(table)]]
        count, unknown, wrong = compared(same[0], table)
        numbers, missing = numbers + count, missing + unknown
        differs += [f"{path}: {table['title']}: {row}" for row in wrong]
    lacks = f"{missing} numbers of tables" if missing else ""
    return Recomputed(numbers, tuple(differs), lacks)


def compared(
    made: Mapping[str, Any], there: Mapping[str, Any]
) -> tuple[int, int, list[Sequence[Any]]]:
    """Compare a table with that of a card, whose columns may be fewer and rows in another order.

    Returns:
        How many numbers agree, how many are no numbers in `made` alone, and the rows of `there`
        that no row of `made` agrees with.

    >>> card = {"columns": ["p", "x"], "rows": [["a", "0.10"], ["b", "0.30"]]}
    >>> compared({"columns": ["p", "x"], "rows": [["b", "0.31"], ["a", "0.12"]]}, card)
    (1, 0, [['a', '0.10']])
    """
    at = [made["columns"].index(c) for c in there["columns"] if c in made["columns"]]
    ours = [there["columns"].index(made["columns"][i]) for i in at]
    numbers, unknown, wrong = 0, 0, []
    for row in there["rows"]:
        cells = [str(row[i]) for i in ours]
        each = (
            [_agree(str(m[i]), c) for i, c in zip(at, cells, strict=True)] for m in made["rows"]
        )
        found = next((pairs for pairs in each if None not in pairs), None)
        if found is None:
            wrong.append(row)
            continue
        numbers += sum(known for known, _ in found)
        unknown += sum(lost for _, lost in found)
    return numbers, unknown, wrong


def _agree(made: str, there: str) -> Any:
    """Return how many numbers of two cells agree and how many `made` does not know; else None."""
    ours, theirs = _NUMBER.findall(made), _NUMBER.findall(there)
    if len(ours) != len(theirs) or _NUMBER.sub("", made) != _NUMBER.sub("", there):
        return None
    known, lost, least = 0, 0, _OF_SIX if there.endswith("%") else 0.0
    for a, b in zip(ours, theirs, strict=True):
        if isnan(float(a)) and not isnan(float(b)):
            lost += 1
        elif a == b or abs(float(a) - float(b)) <= 1.01 * max(_unit(a), _unit(b), least):
            known += 1
        else:
            return None
    return known, lost


def _unit(number: str) -> float:
    """Return one unit of the last place of a written number.

    >>> _unit("0.25"), _unit("3e-04"), _unit("7")
    (0.01, 0.0001, 1.0)
    """
    digits, _, exponent = number.partition("e")
    return float(10.0 ** (int(exponent or 0) - len(digits.partition(".")[2])))


def _points(name: str, results: Path, card: Mapping[str, Any]) -> list[Outcome]:
    """Return an artefact's points with the scores of post and pre, as any card tells them."""
    artefact = ARTEFACTS[name]
    if artefact.sources:
        return committed.gather(name, results)
    lines = results / artefact.folder / f"{name}.jsonl"
    before: dict[str, dict[str, float]] = {}
    after = committed.ends(card)
    for other in log.cards(results):
        for model, scores in committed.ends(other).items():
            after[model] = scores | after.get(model, {})
        for table in other["tables"]:
            if title := _PRE.fullmatch(table["title"]):
                value = round(float(title[4]) / 100, 6) if title[3] else float(title[4])
                before.setdefault(title[1], {})[title[2]] = value
    points = committed.points(lines, after)
    return [replace(p, reference={**p.reference, "pre": before.get(p.pair, {})}) for p in points]


def _close(figure: Any) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


def pages(results: Path) -> list[str]:
    """Return the pages whose table is not what it is written from."""
    differs = []
    page = (results / "README.md").read_text(encoding="utf-8")
    if log.with_table(page, log.cards(results)) != page:
        differs.append(f"{results / 'README.md'}: the table of artefacts")
    front = (results.parent / "README.md").read_text(encoding="utf-8")
    demo = (results / "demo.md").read_text(encoding="utf-8")
    if readme.with_table(front, demo) != front:
        differs.append("README.md: the demo's table")
    return differs


def main(results: Path) -> int:
    """Print a line for each artefact and what differs; return the exit code."""
    wrong = pages(results)
    for name in ARTEFACTS:
        if not (results / ARTEFACTS[name].folder / f"{name}.json").is_file():
            continue
        found = recomputed(name, results)
        wrong += found.differs
        told = f"{found.numbers} numbers of tables" + ("" if not found.differs else ", differs")
        print(f"{name}: {told}" + (f"; the points lack {found.lacks}" if found.lacks else ""))
    for line in wrong:
        print(f"differs: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "results")))
