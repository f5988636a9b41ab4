"""Points of a family taken apart: its methods, the setting of each, and the points of experts."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from deltalab.data.splits import Half
from deltalab.store.record import Outcome, label
from deltalab.store.terms import terms_of
from experiments.paper.evidence import CHANGE, Documents, halves
from experiments.paper.found import pairs, scored

NAMED = {"regmean": "gram", "fisher": "normalise", "adamerging": "scope"}
"""The setting that makes another method of a merge."""


def method(point: Outcome) -> str:
    """Name the method of a point, whose further settings are chosen on half A.

    >>> method(Outcome("m", "keep", merge="regmean", merging={"gram": "delta", "ridge": 0}))
    'regmean delta'
    >>> method(Outcome("m", "dare", {"p": 0.5}, merge="sum"))
    'dare, sum'
    """
    name = str(point.merge)
    if (setting := NAMED.get(name)) and setting in point.merging:
        name = f"{name} {point.merging[setting]}"
    return name if point.edit == "keep" else f"{point.edit}, {name}"


def setting(point: Outcome) -> str:
    """Name what of a point its method leaves open.

    >>> setting(Outcome("m", "dare", {"p": 0.5}, merge="sum", merging={"weight": 0.2}))
    'dare p=0.5, weight=0.2'
    """
    own = {k: v for k, v in point.merging.items() if k != NAMED.get(str(point.merge))}
    parts = [label("", own).strip()]
    return ", ".join(p for p in [point.label * (point.edit != "keep"), *parts] if p)


@dataclass(frozen=True, eq=False)
class Family:
    """The points of one family.

    Attributes:
        name: of the family.
        points: in their order.
        documents: what every document scored, by point.
    """

    name: str
    points: Sequence[Outcome]
    documents: Documents
    _own: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    _chosen: dict[str, Outcome] = field(default_factory=dict)

    @cached_property
    def experts(self) -> list[str]:
        """The names of the experts."""
        return [*self.points[0].experts]

    @cached_property
    def methods(self) -> dict[str, list[Outcome]]:
        """The points of every method."""
        found: dict[str, list[Outcome]] = {}
        for point in self.points:
            found.setdefault(method(point), []).append(point)
        return found

    def with_weight(self, name: str, *weights: float) -> list[Outcome]:
        """Return the points of a method at some weights, its other settings those of the first."""
        own = self.methods.get(name, [])
        return [
            next(p for p in own if p.merging.get("weight") == w)
            for w in weights
            if any(p.merging.get("weight") == w for p in own)
        ]

    def chosen(self, name: str) -> Outcome:
        """Return the point of a method whose experts lose least on half A of the examples.

        Raises:
            ValueError: there are several, and no documents of half A to choose by.
        """
        if name not in self._chosen:
            own = self.methods[name]
            least = own[0] if len(own) == 1 else min(own, key=lambda p: self.change(p, "A"))
            self._chosen[name] = least
        return self._chosen[name]

    def change(self, point: Outcome, half: Half) -> float:
        """Return the experts' mean loss change on one half of their examples.

        Raises:
            ValueError: it was not kept.
        """
        each = []
        for expert in self.experts:
            kept = self.documents.get(point.key, {}).get(f"{expert}/{CHANGE}")
            if kept is None:
                raise ValueError(f"{point.merge}: no documents of {point.key} to choose by")
            own = np.asarray(kept, dtype=float)[halves(len(kept), half)]
            each.append(float(own.mean() if math.isfinite(own.sum()) else np.nanmean(own)))
        return sum(each) / len(each)

    def of(self, point: Outcome, expert: str) -> Outcome:
        """Return what a point is to one expert, as a point of its pair."""
        if (point.key, expert) not in self._own:
            told = point.experts[expert]
            loss, touched = told.get("loss", {}), told.get("touched", {})
            self._own[point.key, expert] = Outcome(
                point.model,
                point.edit,
                point.settings,
                pair=f"{self.name} {expert}",
                data="",
                merge=point.merge,
                merging=point.merging,
                key=f"{point.key}/{expert}",
                change=loss.get("change"),
                error=loss.get("error"),
                half=loss.get("half"),
                terms=terms_of(told.get("terms", {}), "terms"),
                prediction=told.get("prediction", {}),
                metrics=told.get("metrics", {}),
                reference=told.get("reference", {}),
                relative_shift=touched.get("relative_shift"),
            )
        return self._own[point.key, expert]

    def ways(self, points: Iterable[Outcome] | None = None) -> Iterator[Outcome]:
        """Yield every expert's way to every merge, or to some."""
        for point in self.points if points is None else points:
            for expert in self.experts:
                yield self.of(point, expert)

    @cached_property
    def metric(self) -> dict[str, str]:
        """The score of every expert."""
        first = self.points[0]
        return {expert: scored([self.of(first, expert)])[0] for expert in self.experts}

    def score(self, point: Outcome, own: bool = False) -> float:
        """Return the experts' mean score; `own`: as a share of each one's own."""
        total = 0.0
        for expert in self.experts:
            name, way = self.metric[expert], self.of(point, expert)
            total += way.metrics[name] / (way.reference["post"][name] if own else 1.0)
        return total / len(self.experts)


def families(points: Sequence[Outcome], documents: Documents) -> list[Family]:
    """Return the families of some points, in their order."""
    return [Family(name, own, documents) for name, own in pairs(points).items()]


class OfExperts(Mapping[str, Mapping[str, Any]]):
    """The documents of every expert's own points: those of a family's, by `<key>/<expert>`."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        point, _, expert = key.rpartition("/")
        start = f"{expert}/"
        kept = self._documents[point]
        return {n.removeprefix(start): v for n, v in kept.items() if n.startswith(start)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)

    def __len__(self) -> int:
        return len(self._documents)
