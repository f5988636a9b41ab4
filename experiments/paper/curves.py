"""Figs. 1, 2 and 8 to 11: score against drop rate p, a curve for every multiplier k."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltalab.statistics.means import Mean
from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome
from experiments.paper.drawing import curve, one_legend, reference, tiles
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    NEAR,
    Found,
    Table,
    average,
    cell,
    end,
    every,
    grouped,
    is_loss,
    kept,
    losses,
    mean,
    metrics,
    pairs,
    scored,
    told,
)

SMALL = 0.3
"""The largest p that the checks call small."""


WHERE = {
    "small": (f"p <= {SMALL}, k >= 0", lambda p, k: p <= SMALL and k >= 0),
    "small_negative": (f"p <= {SMALL}, k < 0", lambda p, k: p <= SMALL and k < 0),
    "half": ("p <= .5", lambda p, k: p <= 0.5),
    "large": ("p > .5, k >= 0", lambda p, k: p > 0.5 and k >= 0),
    "large_negative": ("p > .5, k < 0", lambda p, k: p > 0.5 and k < 0),
}
"""The parts of the plane of p and k that are checked, by the checks' names."""


@dataclass(frozen=True)
class Panel:
    """One metric of one model: its points at every (p, k), by seed."""

    model: str
    metric: str
    points: dict[tuple[float, float], list[Outcome]]

    @property
    def values(self) -> dict[tuple[float, float], list[float]]:
        """The metric at every (p, k), by seed."""
        return {at: metrics(same, self.metric) for at, same in self.points.items()}

    @property
    def rates(self) -> list[float]:
        """All p."""
        return sorted({p for p, _ in self.points})

    @property
    def factors(self) -> list[float]:
        """All k."""
        return sorted({k for _, k in self.points})

    def end(self, name: str) -> float:
        """The metric of an unedited model."""
        return end([p for same in self.points.values() for p in same], name, self.metric)


def text(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check that small p keeps all scores for every k, and that k < 0 does so too."""
    return _found(points, documents, "score", ("small", "small_negative"))


def images(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check that the accuracy is flat at the post-trained model's everywhere."""
    return _found(points, documents, "accuracy", ("half", "large", "large_negative"))


def _panels(points: Sequence[Outcome]) -> list[Panel]:
    found = []
    for model, same in pairs(points).items():
        own = [p for p in same if p.edit == "dare"]
        by = {
            (number(p) or 0.0, number(k) or 0.0): same
            for (p, k), same in grouped(own, "p", "k").items()
        }
        for metric in [*scored(own), *losses(own)]:
            has = {at: [p for p in same if metric in p.metrics] for at, same in by.items()}
            found.append(Panel(model, metric, {at: same for at, same in has.items() if same}))
    return found


def _found(
    points: Sequence[Outcome], documents: Documents | None, what: str, names: Sequence[str]
) -> Found:
    evidence, panels = Evidence(points, documents or {}), _panels(points)
    scores = [panel for panel in panels if not is_loss(panel.metric)]
    losses_at: dict[str, list[Mean]] = {name: [] for name in names}
    for panel in scores:
        for at, same in panel.points.items():
            for name in names:
                if WHERE[name][1](*at):
                    loss = evidence.score(panel.metric, (1, same), (-1, None), least=NEAR)
                    losses_at[name].append(loss)
    below = f"{what} less than {100 * NEAR:.0f} points below post for"
    checks = [
        every(name, f"{below} {WHERE[name][0]}", [kept(loss, NEAR) for loss in lost],
              kept(average(lost), NEAR))
        for name, lost in losses_at.items()
    ]  # fmt: skip
    caption = (
        "Score against DARE's drop rate p, one curve for each k: mean over the seeds, the band is"
        " one standard deviation; the lines are the unedited models."
    )
    return Found(
        sentence="; ".join(told(c) for c in checks) + ".",
        checks=checks,
        notes=[*(_told(panel) for panel in scores), *evidence.notes],
        show=lambda: ([_table(panel) for panel in panels], [("", _figure(panels), caption)]),
    )


def _told(panel: Panel) -> str:
    """Say up to which p DARE has lost little, and what is left at the largest p."""
    rates, values, post = panel.rates, panel.values, panel.end("post")
    p, k = rates[-1], panel.factors[0]
    lost = {q: post - mean(values[q, 0.0]) for q in rates}
    near = [q for q in rates if all(lost[r] <= NEAR for r in rates if r <= q)]
    reach = f"up to p = {plain(max(near))}" if near else f"not even at p = {plain(rates[0])}"
    return (
        f"{panel.model} {panel.metric}: post {100 * post:.1f}, DARE (k = 0) has lost no more than"
        f" {100 * NEAR:.0f} points in the mean {reach}, {cell(values[p, 0.0])} at p = {plain(p)};"
        f" {cell(values[p, k])} at p = {plain(p)}, k = {plain(k)}."
    )


def _table(panel: Panel) -> Table:
    factors, metric, values = panel.factors, panel.metric, panel.values
    rows = [[plain(p), *(cell(values[p, k], metric) for k in factors)] for p in panel.rates]
    unit = "" if is_loss(metric) else ", %"
    ends = ", ".join(f"{name} {cell([panel.end(name)], metric)}" for name in ("pre", "post"))
    columns = ["p", *(f"k = {plain(k)}" for k in factors)]
    return Table(f"{panel.model}, {metric}{unit}: {ends}", columns, rows)


def _figure(found: Sequence[Panel]) -> Any:
    drawn, grid = tiles(len(found))
    for axes, panel in zip(grid, found, strict=True):
        values = panel.values
        for index, k in enumerate(panel.factors):
            curve(axes, panel.rates, [values[p, k] for p in panel.rates], index, f"k = {plain(k)}")
        axes.set(title=panel.model, xlabel="drop rate p", ylabel=panel.metric)
        if is_loss(panel.metric):
            axes.set(yscale="log", ylabel=f"{panel.metric} (lower is better)")
        reference(axes, {name: panel.end(name) for name in ("post", "pre")})
    one_legend(drawn, grid[0], 5)
    return drawn
