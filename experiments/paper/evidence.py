"""How far points differ, with errors that count documents and draws.

A difference is taken document by document and draw by draw where the documents were kept, and its
error is that of the two-way table (`deltalab.statistics.means`). Where they were not, it falls back
on what there is, each time with a wider error, and remembers which: on the paired errors of the
records, then on the scores alone, as if every model had been scored on documents of its own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deltalab.data.splits import Half, places
from deltalab.report import comparison
from deltalab.statistics.means import Mean, over_draws, two_way
from deltalab.store import files
from deltalab.store.record import Outcome

Documents = Mapping[str, Mapping[str, Any]]
"""Of every point's key what each document scored, by metric; post's scores as `<metric>@post`."""

Side = tuple[float, Sequence[Outcome] | None]
"""A weight and the points, one a draw, whose mean it weighs; None: the post-trained model."""

CHANGE = "objective/change"
MOST_DOCUMENTS = 20_000
BASES = {
    "documents": "Differences are paired, document by document and draw by draw.",
    "errors": "The documents were not kept: errors are the records' paired ones for each draw, with"
    " the draws' spread beside them.",
    "scores": "The documents were not kept: errors are those of scores on documents of their own,"
    " wider than paired ones, with the draws' spread beside them.",
}


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of some points beside their means.

    Attributes:
        points: all points of an artefact.
        documents: may lack any of them.
        used: which of `BASES` the differences so far rest on.
    """

    points: Sequence[Outcome]
    documents: Documents = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    _counts: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What the errors so far rest on, in words."""
        return [told for basis, told in BASES.items() if basis in self.used]

    def score(
        self, metric: str, *sides: Side, least: float = 0.0, half: Half | None = None
    ) -> Mean:
        """Return a weighted sum of mean scores.

        Scores of single documents lie on few values, and few documents differ at all, so that
        their spread may come out as none. One document more each way is counted in the variance,
        and it is never taken below that of 0 and 1 at a mean difference of `least`, the margin
        that the sum is compared with: a loss of 2 points that 100 documents do not show is no
        proof that there is none.

        Args:
            metric: `<task>/<metric>`.
            sides: weights and points.
            least: the margin, a fraction.
            half: of the documents, A to choose by or B to judge by; None: all.
        """
        unit = max(abs(weight) for weight, _ in sides)
        if (table := self._table(metric, sides)) is not None:
            self.used.add("documents")
            table = table if half is None else table[:, halves(table.shape[1], half)]
            found, count = two_way(table), table.shape[1]
        elif half is not None:
            raise ValueError(f"{metric}: no documents to halve")
        else:
            found, count = self._without(metric, sides)
        variance = max(found.error**2 + 2 * (unit / count) ** 2, least * (1 - least) / count)
        return Mean(found.value, math.sqrt(variance), found.freedom)

    def change(self, *sides: Side, rule: str | None = None, half: Half | None = None) -> Mean:
        """Return a weighted sum of mean loss changes, or of a rule's terms for them.

        A term is an account of the change on the same examples: its error is the change's.

        Args:
            sides: weights and points.
            rule: of the terms; None: the measured change.
            half: of the examples, for measured changes alone; None: all.

        Raises:
            ValueError: a half of examples that were not kept.
        """
        parts = [(w, points) for w, points in sides if points]
        if half is not None:
            if (table := self._table(CHANGE, parts)) is None:
                raise ValueError(f"{CHANGE}: no documents to halve")
            return two_way(table[:, halves(table.shape[1], half)])
        value = sum(w * np.mean([_account(p, rule) for p in points]) for w, points in parts)
        if (table := self._table(CHANGE, parts)) is not None:
            found = two_way(table)
            return Mean(float(value), found.error, found.freedom)
        total = Mean(0.0, 0.0)
        for weight, points in parts:
            errors = [math.inf if p.error is None else p.error for p in points]
            mean = over_draws([_account(p, rule) for p in points], errors)
            total = total - mean * -weight
        return total

    def has(self, metric: str, points: Sequence[Outcome]) -> bool:
        """Tell whether every point's documents were kept, and post's beside them."""
        return self._table(metric, [(1.0, points[:1]), (-1.0, None), (0.0, points)]) is not None

    def _table(self, metric: str, sides: Sequence[Side]) -> Any:
        """Return the weighted sum for every draw and document, None where some were not kept."""
        anchor = next(points[0] for _, points in sides if points)
        total: Any = 0.0
        rows = [
            (weight, [anchor] if points is None else points, "@post" if points is None else "")
            for weight, points in sides
        ]
        if not (seeds := _seeds([points for _, points, _ in rows])):
            return None
        for weight, points, suffix in rows:
            by = {p.seed: p for p in points} if len(points) > 1 else dict.fromkeys(seeds, points[0])
            kept = [self.documents.get(by[s].key, {}).get(metric + suffix) for s in seeds]
            if any(k is None or len(k) != len(kept[0]) for k in kept):
                return None
            table = np.asarray(kept, dtype=np.float64)
            if np.ndim(total) and table.shape != total.shape:
                return None
            total = total + weight * table
        return total

    def _without(self, metric: str, sides: Sequence[Side]) -> tuple[Mean, int]:
        """Return the sum from the points' own numbers, and how many documents there were."""
        edited = [(w, points) for w, points in sides if points]
        anchor = edited[0][1][0]
        post = anchor.reference.get("post", {}).get(metric, math.nan)
        if metric not in self._counts:
            every = {p.metrics.get(metric, math.nan) for p in self.points}
            self._counts[metric] = documents_of([*every, post])
        count = self._counts[metric]
        balanced = abs(sum(weight for weight, _ in sides)) < 1e-9
        error = f"{metric}_change_error"
        paired = balanced and all(error in p.metrics for _, points in edited for p in points)
        self.used.add("errors" if paired else "scores")
        total = Mean(0.0, 0.0)
        for weight, points in sides:
            scores = [post] if points is None else [p.metrics.get(metric, math.nan) for p in points]
            if not paired:
                own = [math.sqrt(max(0.0, s * (1 - s)) / count) for s in scores]
                total = total - over_draws(scores, own) * -weight
            elif points is not None:
                changes = [s - post for s in scores]
                total = total - over_draws(changes, [p.metrics[error] for p in points]) * -weight
        return total, count


@cache
def halves(count: int, half: Half) -> Any:
    """Return the places of a half of so many documents, as an array that indexes them."""
    return np.asarray(places(count, half))


def _seeds(sides: Sequence[Sequence[Outcome]]) -> list[int | None]:
    """Return the draws that all sides have; sides of a single point go with any."""
    several = [[p.seed for p in points] for points in sides if len(points) > 1]
    if not several:
        return [sides[0][0].seed]
    return [seed for seed in several[0] if all(seed in other for other in several)]


def _account(point: Outcome, rule: str | None) -> float:
    value = point.change if rule is None else point.terms[rule].value
    return math.nan if value is None else value


def documents_of(scores: Sequence[float]) -> int:
    """Return the least number of documents on which scores of 0 and 1 can have these means.

    >>> documents_of([0.95, 0.9, 0.25]), documents_of([0.333333, 1.0])
    (20, 3)
    """
    values = np.asarray([s for s in scores if math.isfinite(s)])
    for most in (1000, MOST_DOCUMENTS) if len(values) else ():
        counts = np.arange(1, most + 1)
        off = np.abs(values[:, None] * counts - np.round(values[:, None] * counts))
        fits = (off <= 1e-5 * counts).all(0)
        if fits.any():
            return int(counts[fits.argmax()])
    return 1


class Stored(Mapping[str, Mapping[str, Any]]):
    """The documents below a results directory, read when they are asked for."""

    def __init__(self, results: Path) -> None:
        self._results, self._read = results, dict[str, Mapping[str, Any]]()

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        if key not in self._read:
            try:
                self._read[key] = comparison.documents(self._results, Outcome("", "", key=key))
            except ValueError:
                self._read[key] = {}
        return self._read[key]

    def __bool__(self) -> bool:
        """Say that there may be some: none read yet is not none at all."""
        return True

    def __iter__(self) -> Any:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def keep(
    points: Sequence[Outcome], documents: Documents, ends: tuple[str, ...], path: Path
) -> None:
    """Write what single documents scored, one line a point, so that its checks can be repeated.

    Args:
        points: of an artefact.
        documents: of every point.
        ends: the ends of the metrics that are kept; scores of 0 and 1 are written as digits.
        path: a file of JSON lines.
    """
    lines = []
    for point in points:
        kept = documents[point.key]
        found = {n: _short(values) for n, values in kept.items() if n.endswith(ends)}
        lines.append(json.dumps({"key": point.key, **found}) + "\n")
    files.write(path, "".join(lines))


def kept(path: Path) -> dict[str, dict[str, list[float]]]:
    """Read what `keep` has written; nothing where it has not."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        own = json.loads(line)
        key = own.pop("key")
        found[key] = {name: _long(values) for name, values in own.items()}
    return found


def _short(values: Sequence[float]) -> Any:
    """Write scores of single documents, null for what has none.

    >>> _short([1.0, 0.0]), _short([0.5, math.nan]), _long("10"), _long([0.5, None])
    ('10', [0.5, None], [1.0, 0.0], [0.5, nan])
    """
    if all(v in (0.0, 1.0) for v in values):
        return "".join(str(int(v)) for v in values)
    return [None if math.isnan(v) else v for v in values]


def _long(values: Any) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]
