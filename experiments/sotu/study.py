"""The card of `experiment=sotu`: masked deltas against their sum, the base, and going task by task.

The margins: two points against the unmasked sum, half of what sequential fine-tuning forgets;
closed forms within half a hundredth. Some scores had been seen before they were written (`NOTE`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltalab.drawing import looks, panels
from deltalab.statistics.means import Mean
from deltalab.store.record import Outcome
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    NEAR,
    Cell,
    Check,
    Found,
    Table,
    above,
    average,
    cell,
    every,
    kept,
)

SCORE, FORGOTTEN, LEARNED = "stream/accuracy", "stream/forgotten", "stream/learned"
CLOSE = 0.005
"""How far a cosine or a share of collisions may be from its closed form."""
DROPPED = 0.8
"""1 - 1/T of five tasks."""
ARMS = {
    "masked": "drop-only, 1 - p = 1/T",
    "disjoint": "the same, disjoint masks",
    "sum": "unmasked sum",
    "mean": "unmasked sum, weight 1/T",
    "frozen": "frozen base",
    "sequence": "sequential fine-tuning",
}
CAPTION = (
    "Mean accuracy on all tasks so far after each task (nearest class mean, prototypes refreshed),"
    " and at the end against the share of entries dropped; bands are one standard deviation over"
    " five seeds."
)
NOTE = (
    "Experts were trained for 40 steps on two classes each, from a base that knows digits alone;"
    " the paper's base is a ViT of ImageNet-21k."
    " Heads learn from half A of the objective's images (about 25 a class), test images judge."
    " What is forgotten is what is told right after its task less what is at the end, image by"
    " image: the backward transfer with its sign turned. The usual forgetting, from the best"
    " accuracy since, stands in the table."
    " Before the checks were written the frozen base, sums at four weights and masks of p = .5 and"
    " .8, two draws each, had been scored on the same test images with each head, the last task"
    " learned. What is checked is the paper's claim, and p = 1 - 1/T the paper's choice."
)


def sotu(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Judge a stream whose backbones are sums of masked deltas."""
    evidence, by = Evidence(points, _Scores(documents or {})), arms(points)
    main = {head: own for head, own in by.items() if "masked" in own}
    told = "; ".join(f"{head} {_told(own)}" for head, own in main.items())
    measured = average([*_deviations(next(iter(main.values()))["masked"])])
    return Found(
        sentence=f"Accuracy at the end, %: {told}. Cosines and collisions are off their closed"
        f" forms by {measured.value:+.1e} on average.",
        checks=_checks(evidence, main),
        notes=[NOTE, *evidence.notes],
        show=lambda: ([_accuracies(by), _forms(main)], [("", _figure(points, main), CAPTION)]),
    )


class _Scores(Mapping[str, Mapping[str, Any]]):
    """What test images scored, and what of it was forgotten at the end."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        own = self._documents.get(key, {})
        if SCORE not in own or LEARNED not in own:
            return own
        gone = np.asarray(own[LEARNED], dtype=float) - np.asarray(own[SCORE], dtype=float)
        return {**own, FORGOTTEN: gone}

    def __iter__(self) -> Any:
        return iter(self._documents)

    def __len__(self) -> int:
        return len(self._documents)


def arms(points: Sequence[Outcome]) -> dict[str, dict[str, list[Outcome]]]:
    """Return the points of every arm, one a seed, by head (`ncm`, `ncm, stale`, ...)."""
    found: dict[str, dict[str, list[Outcome]]] = {}
    for point in points:
        if (arm := _arm(point)) is not None:
            stale = ", stale" * (point.stream.get("prototypes") == "stale")
            found.setdefault(f"{point.stream['head']}{stale}", {}).setdefault(arm, []).append(point)
    return found


def _arm(point: Outcome) -> str | None:
    if point.stream.get("backbone") == "own":
        return "sequence"
    if point.edit == "keep":
        weights = {1.0: "sum", 0.2: "mean", 0.0: "frozen"}
        return weights.get(float(point.merging.get("weight", 1.0)))
    if point.edit == "drop_only" and point.settings.get("p") == DROPPED:
        return "disjoint" if point.settings.get("masks") else "masked"
    return None


def _checks(evidence: Evidence, by: Mapping[str, Mapping[str, list[Outcome]]]) -> list[Check]:
    """Judge the claim head by head; with stale prototypes there is no base to compare with."""
    whole = {head: own for head, own in by.items() if "frozen" in own}

    def over(other: str) -> list[Mean]:
        sides = [((1.0, own["masked"]), (-1.0, own[other])) for own in whole.values()]
        return [evidence.score(SCORE, *each, least=NEAR) for each in sides]

    lost = [
        evidence.score(FORGOTTEN, (0.5, own["sequence"]), (-1.0, own["masked"]))
        for own in whole.values()
    ]
    first = next(iter(whole.values()))
    near = [
        Cell(max(d.above(-CLOSE), d.below(CLOSE)), min(d.below(-CLOSE), d.above(CLOSE)))
        for d in _deviations(first["masked"])
    ]
    exact = [p for own in by.values() for p in own.get("disjoint", [])]
    return [
        every("kept", f"masks lose less than {100 * NEAR:.0f} points against the unmasked sum, each"
              " head", [kept(m, NEAR) for m in over("sum")]),
        every("collides", "masks score above the unmasked sum, whose deltas collide",
              [above(m) for m in over("sum")]),
        every("frozen", "masks score above the frozen base", [above(m) for m in over("frozen")]),
        every("sequence", "masks score above sequential fine-tuning",
              [above(m) for m in over("sequence")]),
        every("forgets", "masks forget less than half of what sequential fine-tuning does",
              [above(m) for m in lost]),
        every("closed", f"collisions and cosines are within {CLOSE} of their closed forms", near),
        every("exact", "with disjoint masks every cosine and the share of collisions are exactly 0",
              [_is(_is_apart(p)) for p in exact]),
    ]  # fmt: skip


def _is(so: bool) -> Cell:
    return Cell(0.0, 1.0) if so else Cell(1.0, 0.0)


def _is_apart(point: Outcome) -> bool:
    found = point.overlap
    return not found["collisions"] and not any(found["cosine"].values())


def _deviations(points: Sequence[Outcome]) -> list[Mean]:
    """Return how far collisions and every cosine are from their closed forms, over the seeds."""
    first = points[0].overlap
    places = [("collisions", None), *(("cosine", pair) for pair in first["cosine"])]
    return [_deviation(points, *place) for place in places]


def _deviation(points: Sequence[Outcome], kind: str, pair: str | None) -> Mean:
    def at(found: Mapping[str, Any]) -> float:
        return float(found[kind] if pair is None else found[kind][pair])

    off = [at(p.overlap) - at(p.overlap["expected"]) for p in points]
    error = at(points[0].overlap["expected_error"])
    return Mean(sum(off) / len(off), error / len(off) ** 0.5)


def _told(own: Mapping[str, list[Outcome]]) -> str:
    parts = [f"{name} {cell(_scores(own[name]))}" for name in ARMS if name in own]
    return ", ".join(parts)


def _scores(points: Sequence[Outcome], name: str = "accuracy") -> list[float]:
    return [p.metrics[f"stream/{name}"] for p in points]


def _accuracies(by: Mapping[str, Mapping[str, list[Outcome]]]) -> Table:
    rows = []
    for head, own in by.items():
        for arm, title in ARMS.items():
            if arm in own:
                names = ("accuracy", "incremental_accuracy", "forgetting", "backward_transfer")
                rows.append(
                    [head, title, len(own[arm]), *(cell(_scores(own[arm], n)) for n in names)]
                )
    columns = ["head", "backbone", "seeds", "accuracy at the end", "mean over all steps",
               "forgetting", "backward transfer"]  # fmt: skip
    return Table("The stream of five tasks, %", columns, rows)


def _forms(by: Mapping[str, Mapping[str, list[Outcome]]]) -> Table:
    """Show collisions and cosines beside their closed forms, of the first seed and over all."""
    own = next(iter(by.values()))
    rows = []
    for arm in ("sum", "masked", "disjoint"):
        for point in own.get(arm, [])[:1]:
            found, form = point.overlap, point.overlap.get("expected", {})
            error = point.overlap.get("expected_error", {})
            for name, pair in [("collisions", ""), *(("cosine", p) for p in found["cosine"])]:
                value, wanted, spread = (
                    each[name] if not pair else each[name][pair] for each in (found, form, error)
                )
                row = [f"{name} {pair}".strip(), f"{value:.4f}", f"{wanted:.4f}", f"{spread:.4f}"]
                rows.append([ARMS[arm], *row])
    columns = ["deltas", "quantity", "measured, first seed", "closed form", "its standard error"]
    return Table("Collisions and cosines", columns, rows)


def _figure(points: Sequence[Outcome], by: Mapping[str, Mapping[str, list[Outcome]]]) -> Any:
    drawn, ((left, right),) = panels(1, 2, 8.6, 3.4)
    own = next(iter(by.values()))
    for index, arm in enumerate(a for a in ARMS if a in own):
        curves = np.array([_along(p) for p in own[arm]])
        colour, marker = looks(index)
        steps = range(1, curves.shape[1] + 1)
        middle, wide = curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else 0.0
        left.plot(steps, middle, color=colour, marker=marker, ms=4, lw=1.3, label=ARMS[arm])
        left.fill_between(steps, middle - wide, middle + wide, color=colour, alpha=0.18, lw=0)
    left.set(xlabel="tasks so far", ylabel="accuracy, %", xticks=[*steps])
    rates = _over_rates(points, own)
    xs = sorted(rates)
    middle = np.array([100 * np.mean(rates[p]) for p in xs])
    wide = np.array([100 * np.std(rates[p], ddof=1) if len(rates[p]) > 1 else 0.0 for p in xs])
    colour, marker = looks(0)
    right.plot(xs, middle, color=colour, marker=marker, ms=4, lw=1.3)
    right.fill_between(xs, middle - wide, middle + wide, color=colour, alpha=0.18, lw=0)
    right.axvline(DROPPED, color="#666666", lw=0.8, ls=":")
    right.set(xlabel="share of entries dropped", ylabel="accuracy at the end, %")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn


def _along(point: Outcome) -> list[float]:
    """Return the mean accuracy on the tasks so far after each task, in per cent."""
    return [100 * sum(row.values()) / len(row) for row in point.stream["accuracy"].values()]


def _over_rates(
    points: Sequence[Outcome], own: Mapping[str, list[Outcome]]
) -> dict[float, list[float]]:
    """Return the accuracies of the nearest class mean by share of entries dropped."""
    found: dict[float, list[float]] = {0.0: _scores(own["sum"])}
    for p in points:
        plain = p.stream.get("head") == "ncm" and p.stream.get("prototypes") == "refreshed"
        if p.edit == "drop_only" and plain and not p.settings.get("masks"):
            found.setdefault(float(p.settings["p"]), []).extend(_scores([p]))
    return found
