"""Artefacts judged anew from the points that are committed, without running or drawing anything.

`python -m experiments.paper NAME from=committed` reads the points that lie beside the card, as
`DIR/paper/NAME.jsonl`, and writes what the checks say of them into it: verdict, sentence, checks
and notes. Figures, further tables, date,
commit and hardware stay those of the run that computed the points. A study of other artefacts'
points (its `sources`) is drawn as well.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltalab.store import reading
from deltalab.store.record import Outcome
from experiments.paper.artefacts import ARTEFACTS
from experiments.paper.card import gathered, judged, save
from experiments.paper.evidence import kept
from experiments.paper.found import Found

_ENDS = re.compile(r"(\S+), (\S+?)(, %)?: pre [\d.]+, post ([\d.]+)")


def judge(name: str, results: Path) -> tuple[Path, Found]:
    """Judge one artefact by its committed points and write its card.

    Raises:
        ValueError: the points lack what the checks need.
    """
    artefact = ARTEFACTS[name]
    if artefact.sources:
        return gathered(name, gather(name, results), results)
    path = results / artefact.folder / f"{name}.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    documents = kept(path.with_name(f"{name}_documents.jsonl")) or None
    found = artefact.find(points(path.with_suffix(".jsonl"), ends(card)), documents)
    tables = [t for t in card["tables"] if t["title"] != "What was checked"]
    return save(path, card | judged(name, found, tables)), found


def gather(name: str, results: Path) -> list[Outcome]:
    """Return the points of a study's sources, each once, with post's scores as any source has them.

    Raises:
        ValueError: a source has no committed points.
    """
    found: dict[str, Outcome] = {}
    known: dict[str, dict[str, float]] = {}
    for source in ARTEFACTS[name].sources:
        path = results / ARTEFACTS[source].folder / f"{source}.jsonl"
        if not path.is_file():
            raise ValueError(f"{path}: no points; make {source} writes them")
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for point in points(path, ends(card)):
            found.setdefault(point.key, point)
            for metric, value in point.reference["post"].items():
                known.setdefault(point.pair, {}).setdefault(metric, value)
    return [replace(p, reference={"post": known[p.pair]}) for p in found.values()]


def ends(card: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return post's scores by model as the titles of a card's tables tell them, in tenths of 1 %.

    >>> ends({"tables": [{"title": "vit, mnist/accuracy, %: pre 65.8, post 96.0"}]})
    {'vit': {'mnist/accuracy': 0.96}}
    """
    found: dict[str, dict[str, float]] = {}
    for table in card["tables"]:
        if title := _ENDS.fullmatch(table["title"]):
            model, metric, percent, post = title.groups()
            value = round(float(post) / 100, 6) if percent else float(post)
            found.setdefault(model, {})[metric] = value
    return found


def points(path: Path, known: Mapping[str, Mapping[str, float]]) -> list[Outcome]:
    """Read the points of an artefact, with post's metrics worked out from the points' changes.

    Args:
        path: one point a line.
        known: post's metrics by model, for what the points have no change of.
    """
    found = reading.lines(path)
    post = {model: dict(metrics) for model, metrics in known.items()}
    for p in found:
        changes = {n: p.metrics.get(f"{n}_change") for n in p.metrics}
        exact = {n: round(p.metrics[n] - c, 6) for n, c in changes.items() if c is not None}
        post.setdefault(p.pair, {}).update(exact)
    return [replace(p, reference={"post": post[p.pair]}) for p in found]
