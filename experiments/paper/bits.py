"""Figs. 4, 5 and 12: how many magnitudes BitDelta needs, and which."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome
from experiments.paper.drawing import curve, one_legend, reference, tiles
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    NEAR,
    Cell,
    Figure,
    Found,
    Table,
    above,
    cell,
    end,
    every,
    grouped,
    kept,
    mean,
    metrics,
    pairs,
    scored,
    some,
)

FOUR = 4
BACK = 0.01
"""How far below post a score may be to have come back to it."""

KINDS = {"mean": "one value", "normal": "normal", "uniform": "uniform"}
DRAWN = ("normal", "uniform")
CAPTION = (
    "Score against the multiple of the mean magnitude: one value for every entry, or values drawn"
    " from a normal or uniform distribution of that mean (mean and standard deviation over the"
    " seeds)."
)


def blocks(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check that four magnitude bits bring every score back, where there is one to bring back."""
    evidence, panel = Evidence(points, documents or {}), []
    for model, own in pairs(points).items():
        by = {int(b): same for (b,), same in grouped(own, "bits").items()}
        panel += [(model, metric, by, end(own, "post", metric)) for metric in scored(own)]
    back = [evidence.score(m, (1, by[FOUR]), (-1, None), least=BACK) for _, m, by, _ in panel]
    gain = [evidence.score(m, (1, by[FOUR]), (-1, by[0]), least=BACK) for _, m, by, _ in panel]
    checks = [
        every("back", "four bits reach post, one point aside or better",
              [kept(loss, BACK) for loss in back]),
        some("needed", "four bits score above none, somewhere",
             [Cell(g.above(), g.below(BACK)) for g in gain]),
    ]  # fmt: skip
    cells = [{b: metrics(same, m) for b, same in by.items()} for _, m, by, _ in panel]
    told = "; ".join(
        f"{model} {metric} {cell(s[0])} with none, {cell(s[FOUR])} with four, post {100 * post:.1f}"
        for (model, metric, _, post), s in zip(panel, cells, strict=True)
    )

    def show() -> tuple[list[Table], list[Figure]]:
        drawn, grid = tiles(len(panel))
        for axes, (model, metric, by, post), s in zip(grid, panel, cells, strict=False):
            own = [p for same in by.values() for p in same]
            curve(axes, sorted(s), [s[b] for b in sorted(s)], 0, "multibit")
            reference(axes, {"post": post, "pre": end(own, "pre", metric)})
            axes.set(title=model, xlabel="magnitude bits b", ylabel=metric)
        rows = [
            [m, t, *(cell(s[b]) for b in sorted(s)), f"{100 * post:.1f}"]
            for (m, t, _, post), s in zip(panel, cells, strict=True)
        ]
        heads = ["model", "score, %", *(f"b = {b}" for b in sorted(cells[0])), "post"]
        caption = "Score of BitDelta with 2^b magnitude levels; the lines are the unedited models."
        return [Table("Score against magnitude bits", heads, rows)], [("", drawn, caption)]

    return Found(f"Magnitude bits: {told}.", checks, show, evidence.notes)


@dataclass(frozen=True)
class Panel:
    """One score of one model: its points by kind of magnitudes and by multiple."""

    model: str
    metric: str
    points: dict[str, dict[float, list[Outcome]]]

    def scores(self, kind: str) -> dict[float, list[float]]:
        """The score at every multiple, by seed."""
        return {c: metrics(same, self.metric) for c, same in self.points[kind].items()}

    def end(self, name: str) -> float:
        """The score of an unedited model."""
        return end(next(iter(self.points["mean"].values())), name, self.metric)


def statistic(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check that the mean magnitude is near the best, and drawn magnitudes are on par (5, 12).

    "Near the best" is checked against every other multiple, which needs no choice of the best: one
    made on half of the documents would often miss it and find nothing lost.
    """
    evidence, found = Evidence(points, documents or {}), list(_panels(points))
    checks = [
        every("best", f"the mean (multiple 1) is less than {100 * NEAR:.0f} points below any other"
              " multiple", [_best(evidence, panel) for panel in found]),
        every("far", f"the largest multiple loses more than {100 * NEAR:.0f} points against 1",
              [_far(evidence, panel) for panel in found]),
        every("par", f"drawn magnitudes at 1 are less than {100 * NEAR:.0f} points below the single"
              " value", [_par(evidence, panel, k) for panel in found for k in DRAWN]),
    ]  # fmt: skip
    told = "; ".join(_told(panel) for panel in found)
    return Found(
        sentence=f"Multiple of the mean: {told}.",
        checks=checks,
        notes=evidence.notes,
        show=lambda: ([_table(panel) for panel in found], [("", _figure(found), CAPTION)]),
    )


def _panels(points: Sequence[Outcome]) -> Iterator[Panel]:
    for model, own in pairs(points).items():
        by: dict[str, dict[float, list[Outcome]]] = {}
        for (kind, multiple), same in grouped(own, "magnitudes", "multiple").items():
            by.setdefault(str(kind), {})[number(multiple) or 0.0] = same
        yield from (Panel(model, metric, by) for metric in scored(own))


def _best(evidence: Evidence, panel: Panel) -> Cell:
    """Return the case that the mean is near the best: near or above every other multiple."""
    mean_of = panel.points["mean"]
    sides = [(mean_of[1.0], same) for c, same in mean_of.items() if c != 1.0]
    lost = [evidence.score(panel.metric, (1, one), (-1, c), least=NEAR) for one, c in sides]
    cells = [kept(each, NEAR) for each in lost]
    return Cell(max(c.holds for c in cells), min(1.0, len(cells) * min(c.fails for c in cells)))


def _far(evidence: Evidence, panel: Panel) -> Cell:
    mean_of = panel.points["mean"]
    sides = (1, mean_of[1.0]), (-1, mean_of[max(mean_of)])
    return above(evidence.score(panel.metric, *sides, least=NEAR), NEAR)


def _par(evidence: Evidence, panel: Panel, kind: str) -> Cell:
    sides = (1, panel.points[kind][1.0]), (-1, panel.points["mean"][1.0])
    return kept(evidence.score(panel.metric, *sides, least=NEAR), NEAR)


def _told(panel: Panel) -> str:
    at = {kind: panel.scores(kind)[1.0] for kind in KINDS}
    one = {c: mean(v) for c, v in panel.scores("mean").items()}
    best = max(one, key=lambda c: (one[c], -abs(c - 1)))
    return (
        f"{panel.model} {panel.metric} highest at {plain(best)} with {cell([one[best]])}, at 1"
        f" {cell(at['mean'])}, normal {cell(at['normal'])}, uniform {cell(at['uniform'])}, post"
        f" {100 * panel.end('post'):.1f}"
    )


def _table(panel: Panel) -> Table:
    scores = {kind: panel.scores(kind) for kind in KINDS}
    rows = [[plain(c), *(cell(scores[k][c]) for k in KINDS)] for c in sorted(scores["mean"])]
    return Table(f"{panel.model}, {panel.metric}, %", ["multiple", *KINDS.values()], rows)


def _figure(found: Sequence[Panel]) -> Any:
    drawn, grid = tiles(len(found))
    for axes, panel in zip(grid, found, strict=False):
        for index, (kind, title) in enumerate(KINDS.items()):
            scores = panel.scores(kind)
            curve(axes, sorted(scores), [scores[c] for c in sorted(scores)], index, title)
        reference(axes, {name: panel.end(name) for name in ("post", "pre")})
        axes.set(title=panel.model, xlabel="multiple of the mean magnitude", ylabel=panel.metric)
    one_legend(drawn, grid[0], 3)
    return drawn
