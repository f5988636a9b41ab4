"""Figs. 1, 2 and 8 to 11: score against drop rate p, a curve for every multiplier k."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome
from experiments.paper.drawing import curve, one_legend, reference, tiles
from experiments.paper.found import (
    NEAR,
    Check,
    Found,
    Table,
    cell,
    check,
    end,
    grouped,
    is_loss,
    losses,
    mean,
    metrics,
    pairs,
    scored,
)

SMALL = 0.3
"""The largest p that the checks call small."""


@dataclass(frozen=True)
class Panel:
    """One metric of one model: its value at every (p, k), by seed, and of the unedited models."""

    model: str
    metric: str
    values: dict[tuple[float, float], list[float]]
    post: float
    pre: float

    @property
    def rates(self) -> list[float]:
        """All p."""
        return sorted({p for p, _ in self.values})

    @property
    def factors(self) -> list[float]:
        """All k."""
        return sorted({k for _, k in self.values})

    def gap(self, p: float, k: float) -> float:
        """How far the mean value is from post's."""
        return abs(mean(self.values[p, k]) - self.post)


def text(points: Sequence[Outcome]) -> Found:
    """Check that small p keeps all scores for every k, and that k < 0 does so too."""
    found = _panels(points)
    small = [(k, gap) for p, k, gap in _gaps(found) if p <= SMALL]
    checks = [
        check(f"score within {100 * NEAR:.0f} points of post for p <= {SMALL}, k >= 0",
              [gap <= NEAR for k, gap in small if k >= 0]),
        check(f"the same for k < 0, p <= {SMALL}", [gap <= NEAR for k, gap in small if k < 0]),
    ]  # fmt: skip
    return _found(found, checks)


def images(points: Sequence[Outcome]) -> Found:
    """Check that the accuracy is flat at the post-trained model's everywhere."""
    found = _panels(points)
    gaps = _gaps(found)
    checks = [
        check(f"accuracy within {100 * NEAR:.0f} points of post for p <= .5",
              [gap <= NEAR for p, _, gap in gaps if p <= 0.5]),
        check("the same for p > .5, k >= 0",
              [gap <= NEAR for p, k, gap in gaps if p > 0.5 and k >= 0]),
        check("the same for p > .5, k < 0",
              [gap <= NEAR for p, k, gap in gaps if p > 0.5 and k < 0]),
    ]  # fmt: skip
    return _found(found, checks)


def _panels(points: Sequence[Outcome]) -> list[Panel]:
    found = []
    for model, every in pairs(points).items():
        own = [p for p in every if p.edit == "dare"]
        for metric in [*scored(own), *losses(own)]:
            values = {
                (number(p) or 0.0, number(k) or 0.0): metrics(same, metric)
                for (p, k), same in grouped(own, "p", "k").items()
            }
            ends = end(own, "post", metric), end(own, "pre", metric)
            found.append(Panel(model, metric, values, *ends))
    return found


def _gaps(found: Sequence[Panel]) -> list[tuple[float, float, float]]:
    """Return p, k and the gap to post of every score."""
    return [
        (p, k, panel.gap(p, k))
        for panel in found
        if not is_loss(panel.metric)
        for p, k in panel.values
    ]


def _found(found: Sequence[Panel], checks: Sequence[Check]) -> Found:
    caption = (
        "Score against DARE's drop rate p, one curve for each k: mean over the seeds, the band is"
        " one standard deviation; the lines are the unedited models."
    )
    return Found(
        sentence="; ".join(f"{c.held} of {c.cases} cells: {c.claim}" for c in checks) + ".",
        checks=checks,
        notes=[_told(panel) for panel in found if not is_loss(panel.metric)],
        tables=[_table(panel) for panel in found],
        figures=[("", _figure(found), caption)],
    )


def _told(panel: Panel) -> str:
    rates, (p, k) = panel.rates, (panel.rates[-1], panel.factors[0])
    kept = [q for q in rates if all(panel.gap(r, 0.0) <= NEAR for r in rates if r <= q)]
    near = f"within {100 * NEAR:.0f} points up to p = {plain(max(kept))}" if kept else "never near"
    return (
        f"{panel.model} {panel.metric}: post {100 * panel.post:.1f}, DARE (k = 0) {near},"
        f" {cell(panel.values[p, 0.0])} at p = {plain(p)}; {cell(panel.values[p, k])} at p ="
        f" {plain(p)}, k = {plain(k)}."
    )


def _table(panel: Panel) -> Table:
    factors, metric = panel.factors, panel.metric
    rows = [[plain(p), *(cell(panel.values[p, k], metric) for k in factors)] for p in panel.rates]
    unit = "" if is_loss(metric) else ", %"
    ends = f"pre {cell([panel.pre], metric)}, post {cell([panel.post], metric)}"
    columns = ["p", *(f"k = {plain(k)}" for k in factors)]
    return Table(f"{panel.model}, {metric}{unit}: {ends}", columns, rows)


def _figure(found: Sequence[Panel]) -> Any:
    drawn, grid = tiles(len(found))
    for axes, panel in zip(grid, found, strict=True):
        for index, k in enumerate(panel.factors):
            values = [panel.values[p, k] for p in panel.rates]
            curve(axes, panel.rates, values, index, f"k = {plain(k)}")
        axes.set(title=panel.model, xlabel="drop rate p", ylabel=panel.metric)
        if is_loss(panel.metric):
            axes.set(yscale="log", ylabel=f"{panel.metric} (lower is better)")
        reference(axes, {"post": panel.post, "pre": panel.pre})
    one_legend(drawn, grid[0], 5)
    return drawn
