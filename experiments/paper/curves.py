"""Figs. 1, 2 and 8 to 11: score against drop rate p, a curve for every multiplier k."""

import math
from collections.abc import Sequence

from deltalab.figures.style import panels
from deltalab.outcomes import Outcome, number, plain
from experiments.paper.drawing import curve, one_legend, reference
from experiments.paper.found import (
    NEAR,
    Check,
    Found,
    Table,
    cell,
    check,
    end,
    grouped,
    mean,
    metrics,
    models,
    scored,
)

SMALL = 0.3
"""The largest p that the checks call small."""

COLUMNS = 3
Panel = tuple[str, str, dict[tuple[float, float], list[float]], float, float]


def text(points: Sequence[Outcome]) -> Found:
    """Check that small p keeps all scores for every k, and that k < 0 does so too."""
    found = _panels(points)
    small = [(k, gap) for (*panel,) in found for (p, k), gap in _gaps(panel).items() if p <= SMALL]
    checks = [
        check(f"score within {100 * NEAR:.0f} points of post for p <= {SMALL}, k >= 0",
              [gap <= NEAR for k, gap in small if k >= 0]),
        check(f"the same for k < 0, p <= {SMALL}", [gap <= NEAR for k, gap in small if k < 0]),
    ]  # fmt: skip
    return _found(points, found, checks)


def images(points: Sequence[Outcome]) -> Found:
    """Check that the accuracy is flat at the post-trained model's everywhere."""
    found = _panels(points)
    gaps = [(p, k, gap) for (*panel,) in found for (p, k), gap in _gaps(panel).items()]
    checks = [
        check(f"accuracy within {100 * NEAR:.0f} points of post for p <= .5",
              [gap <= NEAR for p, _, gap in gaps if p <= 0.5]),
        check("the same for p > .5, k >= 0",
              [gap <= NEAR for p, k, gap in gaps if p > 0.5 and k >= 0]),
        check("the same for p > .5, k < 0",
              [gap <= NEAR for p, k, gap in gaps if p > 0.5 and k < 0]),
    ]  # fmt: skip
    return _found(points, found, checks)


def _panels(points: Sequence[Outcome]) -> list[Panel]:
    """Return model, metric, the scores of every (p, k), and the scores of post and pre."""
    found: list[Panel] = []
    for model in models(points):
        own = [p for p in points if p.model == model and p.edit == "dare"]
        for metric in scored(own):
            scores = {
                (number(p) or 0.0, number(k) or 0.0): metrics(same, metric)
                for (p, k), same in grouped(own, "p", "k").items()
            }
            ends = end(own, "post", metric), end(own, "pre", metric)
            found.append((model, metric, scores, *ends))
    return found


def _gaps(panel: Sequence) -> dict[tuple[float, float], float]:  # type: ignore[type-arg]
    """Return how far the mean score of every (p, k) is from post's."""
    _, _, scores, post, _ = panel
    return {at: abs(mean(values) - post) for at, values in scores.items()}


def _found(points: Sequence[Outcome], found: Sequence[Panel], checks: Sequence[Check]) -> Found:
    parts = []
    for model, metric, scores, post, _ in found:
        rates, factors = (sorted({at[i] for at in scores}) for i in (0, 1))
        kept = [
            p
            for p in rates
            if all(abs(mean(scores[q, 0.0]) - post) <= NEAR for q in rates if q <= p)
        ]
        corner = rates[-1], factors[0]
        parts.append(
            f"{model} {metric}: post {100 * post:.1f}, DARE (k = 0) within {100 * NEAR:.0f} points"
            f" up to p = {plain(max(kept)) if kept else 'none'}, {cell(scores[rates[-1], 0.0])} at"
            f" p = {plain(rates[-1])}, {cell(scores[corner])} at p = {plain(corner[0])}, k ="
            f" {plain(corner[1])}"
        )
    return Found(
        sentence="; ".join(f"{c.held} of {c.cases} cells: {c.claim}" for c in checks) + ".",
        checks=checks,
        notes=[f"{part}." for part in parts],
        tables=[_table(panel) for panel in found],
        figures=[("", _figure(found), (
            "Score against DARE's drop rate p, one curve for each k: mean over the seeds, the band"
            " is one standard deviation; the lines are the unedited models."
        ))],
    )  # fmt: skip


def _table(panel: Panel) -> Table:
    model, metric, scores, post, pre = panel
    rates, factors = (sorted({at[i] for at in scores}) for i in (0, 1))
    rows = [[plain(p), *(cell(scores[p, k]) for k in factors)] for p in rates]
    title = f"{model}, {metric}, %: pre {100 * pre:.1f}, post {100 * post:.1f}"
    return Table(title, ["p", *(f"k = {plain(k)}" for k in factors)], rows)


def _figure(found: Sequence[Panel]):  # type: ignore[no-untyped-def]
    columns = min(len(found), COLUMNS)
    rows = math.ceil(len(found) / columns)
    drawn, grid = panels(rows, columns, max(4.2, 3.2 * columns), 2.7 * rows + 0.4)
    for axes in grid.flat[len(found) :]:
        axes.remove()
    for axes, (model, metric, scores, post, pre) in zip(grid.flat, found, strict=False):
        rates, factors = (sorted({at[i] for at in scores}) for i in (0, 1))
        for index, k in enumerate(factors):
            curve(axes, rates, [scores[p, k] for p in rates], index, f"k = {plain(k)}")
        reference(axes, {"post": post, "pre": pre})
        axes.set(title=model, xlabel="drop rate p", ylabel=metric)
    one_legend(drawn, grid.flat[0], 5)
    return drawn
