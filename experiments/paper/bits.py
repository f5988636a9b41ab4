"""Figs. 4, 5 and 12: how many magnitudes BitDelta needs, and which."""

from collections.abc import Sequence

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
    mean,
    metrics,
    pairs,
    scored,
)

FOUR = 4
BACK = 0.01
"""How far below post a score may be to have come back to it."""

KINDS = {"mean": "one value", "normal": "normal", "uniform": "uniform"}


def blocks(points: Sequence[Outcome]) -> Found:
    """Check that four magnitude bits bring every score back (Fig. 4)."""
    panel = []
    for model, own in pairs(points).items():
        for metric in scored(own):
            scores = {int(b): metrics(same, metric) for (b,), same in grouped(own, "bits").items()}
            panel.append((model, metric, scores, end(own, "post", metric), end(own, "pre", metric)))
    checks = [
        Check("four bits reach post, one point aside or better",
              sum(mean(s[FOUR]) >= post - BACK for _, _, s, post, _ in panel), len(panel)),
    ]  # fmt: skip
    told = "; ".join(
        f"{model} {metric} {cell(s[0])} with none, {cell(s[FOUR])} with four, post {100 * post:.1f}"
        for model, metric, s, post, _ in panel
    )
    drawn, grid = tiles(len(panel))
    for axes, (model, metric, s, post, pre) in zip(grid, panel, strict=False):
        curve(axes, sorted(s), [s[b] for b in sorted(s)], 0, "multibit")
        reference(axes, {"post": post, "pre": pre})
        axes.set(title=model, xlabel="magnitude bits b", ylabel=metric)
    rows = [
        [m, t, *(cell(s[b]) for b in sorted(s)), f"{100 * post:.1f}"] for m, t, s, post, _ in panel
    ]
    heads = ["model", "score, %", *(f"b = {b}" for b in sorted(panel[0][2])), "post"]
    return Found(
        sentence=f"Magnitude bits: {told}.",
        checks=checks,
        tables=[Table("Score against magnitude bits", heads, rows)],
        figures=[("", drawn, (
            "Score of BitDelta with 2^b magnitude levels; the lines are the unedited models."
        ))],
    )  # fmt: skip


def statistic(points: Sequence[Outcome]) -> Found:
    """Check that the mean magnitude is near the best, and drawn magnitudes are on par (5, 12)."""
    panel = []
    for model, own in pairs(points).items():
        for metric in scored(own):
            scores: dict[str, dict[float, list[float]]] = {}
            for (kind, multiple), same in grouped(own, "magnitudes", "multiple").items():
                scores.setdefault(str(kind), {})[number(multiple) or 0.0] = metrics(same, metric)
            panel.append((model, metric, scores, end(own, "post", metric), end(own, "pre", metric)))
    at_one, best, far, par = [], [], [], []
    for *_, scores, _, _ in panel:
        one = {c: mean(v) for c, v in scores["mean"].items()}
        at_one.append(max(one.values()) - one[1.0] <= NEAR)
        far.append(one[max(one)] < one[1.0] - NEAR)
        best.append(max(one, key=lambda c: (one[c], -abs(c - 1))))
        par += [abs(mean(scores[kind][1.0]) - one[1.0]) <= NEAR for kind in ("normal", "uniform")]
    checks = [
        check(
            f"the mean (multiple 1) is within {100 * NEAR:.0f} points of the best multiple", at_one
        ),
        check(f"the largest multiple loses more than {100 * NEAR:.0f} points against 1", far),
        check(f"drawn magnitudes at 1 are within {100 * NEAR:.0f} points of the single value", par),
    ]
    told = "; ".join(
        f"{model} {metric} best at {plain(b)} with {cell(s['mean'][b])}, at 1"
        f" {cell(s['mean'][1.0])}, normal {cell(s['normal'][1.0])}, uniform"
        f" {cell(s['uniform'][1.0])}, post {100 * post:.1f}"
        for (model, metric, s, post, _), b in zip(panel, best, strict=True)
    )
    drawn, grid = tiles(len(panel))
    for axes, (model, metric, s, post, pre) in zip(grid, panel, strict=False):
        for index, (kind, title) in enumerate(KINDS.items()):
            at = sorted(s[kind])
            curve(axes, at, [s[kind][c] for c in at], index, title)
        reference(axes, {"post": post, "pre": pre})
        axes.set(title=model, xlabel="multiple of the mean magnitude", ylabel=metric)
    one_legend(drawn, grid[0], 3)
    tables = [
        Table(f"{model}, {metric}, %", ["multiple", *KINDS.values()],
              [[plain(c), *(cell(s[kind][c]) for kind in KINDS)] for c in sorted(s["mean"])])
        for model, metric, s, *_ in panel
    ]  # fmt: skip
    return Found(
        sentence=f"Multiple of the mean: {told}.",
        checks=checks,
        tables=tables,
        figures=[("", drawn, (
            "Score against the multiple of the mean magnitude: one value for every entry, or values"
            " drawn from a normal or uniform distribution of that mean (mean and standard deviation"
            " over the seeds)."
        ))],
    )  # fmt: skip
