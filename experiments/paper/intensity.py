"""Study: is what a random edit does a function of its editing intensity alone?

Editing intensity is our reading of the follow-up of arXiv 2410.13841: the variance v of
x_i = E_i / D_i. DARE with k has v = (1 - k)^2 p / (1 - p), noise sigma^2, sign flips of a fraction
f have 4 f (1 - f), besides their mean -2 f.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from deltalab.drawing import looks, panels
from deltalab.edits.dare import Dare
from deltalab.edits.noise import Noise
from deltalab.edits.sign_flip import SignFlip
from deltalab.report.outcomes import spearman
from deltalab.store.fields import number
from deltalab.store.record import Outcome
from experiments.paper.drawing import one_legend
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    Cell,
    Found,
    Table,
    above,
    end,
    every,
    mean,
    metrics,
    pairs,
    scored,
)

EDITS = {"dare": Dare, "noise": Noise, "sign_flip": SignFlip}
TITLES = {"noise": "noise", "sign_flip": "sign flips (biased)"}
ALIKE = 2.0
"""Two changes are alike where neither is more than so many times the other."""

SAME = 1e-3
"""How far apart, relatively, two intensities are the same."""

Place = tuple[float, float, float | None]
"""Intensity, mean change over the seeds, mean score where there is one."""

Groups = dict[tuple[str, float], list[Outcome]]
"""The points of every series, by its name and their intensity."""


def intensity(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Put measured change and score over intensity, for every pair."""
    rows, notes, curves, evidence = [], [], {}, Evidence(points, documents or {})
    alike: list[Cell] = []
    grows: list[Cell] = []
    for model, own in pairs(points).items():
        groups = _groups(own)
        by = _series(groups, own)
        alike += _alike(evidence, groups)
        grows.append(_grows(evidence, groups))
        curves[model] = by, own
        plain = [place for name, places in by.items() if name != "sign_flip" for place in places]
        dare = [place for name, places in by.items() if name.startswith("k = ") for place in places]
        factors = [f for place in dare if (f := _factor(place, by["noise"])) is not None]
        flips = [f for place in by["sign_flip"] if (f := _factor(place, by["noise"])) is not None]
        order = spearman([v for v, *_ in plain], [c for _, c, _ in plain])
        rates = spearman(*_by_rate(own))
        off = [abs(math.log(f)) for f in factors]
        rows.append([
            model,
            f"{order:.3f}" if order is not None else "-",
            f"{rates:.3f}" if rates is not None else "-",
            f"{math.exp(_median(off)):.2f}" if off else "-",
            f"{math.exp(sorted(off)[int(0.9 * len(off))]):.2f}" if off else "-",
            f"{len(off)} of {len(dare)}",
            f"{_median(flips):.1f}" if flips else "-",
        ])  # fmt: skip
    columns = ["pair", "Spearman of change with v", "with p, DARE alone",
               "DARE off noise of the same v by a factor of (median)", "(9 of 10 below)",
               "points compared", "sign flips above noise of the same v by (median)"]  # fmt: skip
    told = "; ".join(f"{r[0]} {r[1]} (p alone {r[2]}), factor {r[3]}" for r in rows)
    notes.append(
        "Compared are means over the seeds, inside the range of the noise that was tried and where"
        " both changes are positive. Sign flips also shrink the delta, by 2 f of it, which"
        " intensity does not count. Where v is small and the delta too, a change is mostly the"
        " first-order term of the very draw, so that factors there are also those of chance."
    )
    caption = (
        "Measured loss change (above) and score (below) against editing intensity v: DARE for all p"
        " and k, noise, and sign flips; means over the seeds. A score's line is the post-trained"
        " model's."
    )
    return Found(
        sentence="Rank correlation of intensity and loss change, and how far DARE lies from noise"
                 f" of the same intensity: {told}.",
        checks=[
            every("grows", "the change of noise grows from the least intensity to the most, pair"
                  " by pair", grows),
            every("alike", f"DARE changes the loss by no more than {ALIKE:g} times, and no less"
                  f" than 1/{ALIKE:g} of, what noise of the same intensity does", alike),
        ],
        notes=notes,
        show=lambda: (
            [Table("Does intensity alone tell the change?", columns, rows)],
            [("", _figure(curves), caption)],
        ),
    )  # fmt: skip


def _alike(evidence: Evidence, groups: Groups) -> list[Cell]:
    """Return the cases of DARE and noise of the same intensity: within a factor of each other."""
    cells = []
    for (name, v), own in groups.items():
        noise = next((g for (n, u), g in groups.items() if n == "noise" and _same(u, v)), None)
        if name.startswith("k = ") and noise is not None:
            sides = [
                above(evidence.change((ALIKE, noise), (-1, own))),
                above(evidence.change((ALIKE, own), (-1, noise))),
            ]
            fails = min(1.0, 2 * min(c.fails for c in sides))
            cells.append(Cell(max(c.holds for c in sides), fails))
    return cells


def _grows(evidence: Evidence, groups: Groups) -> Cell:
    at = sorted(v for name, v in groups if name == "noise")
    return above(evidence.change((1, groups["noise", at[-1]]), (-1, groups["noise", at[0]])))


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME)


def _groups(points: Sequence[Outcome]) -> Groups:
    """Group points by series, DARE by its k, noise, sign flips, and by their intensity."""
    same: Groups = {}
    for point in points:
        if point.edit not in EDITS:
            continue
        found = EDITS[point.edit](**point.settings).moments()
        k = number(point.settings.get("k"))
        name = point.edit if k is None else f"k = {k:g}"
        if found is not None and found[1] > 0:
            same.setdefault((name, round(found[1], 9)), []).append(point)
    return dict(sorted(same.items(), key=lambda item: item[0][1]))


def _series(groups: Groups, points: Sequence[Outcome]) -> dict[str, list[Place]]:
    """Return the places of every series, means over the draws."""
    metric = next(iter(scored(points)), None)
    series: dict[str, list[Place]] = {}
    for (name, v), group in groups.items():
        change = mean([p.change for p in group if p.change is not None])
        values = metrics(group, metric) if metric else []
        series.setdefault(name, []).append((v, change, mean(values) if values else None))
    return series


def _by_rate(points: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    dare = [p for p in points if p.edit == "dare" and p.change is not None]
    return [number(p.settings["p"]) or 0.0 for p in dare], [p.change or 0.0 for p in dare]


def _factor(place: Place, noise: Sequence[Place]) -> float | None:
    """Return a change over that of noise of the same intensity, read off between its points."""
    v, change, _ = place
    at = [n[0] for n in noise]
    i = bisect_left(at, v)
    if i < len(at) and _same(at[i], v):
        other = noise[i][1]
    elif 0 < i < len(at):
        (v0, c0, _), (v1, c1, _) = noise[i - 1], noise[i]
        if c0 <= 0 or c1 <= 0:
            return None
        share = math.log(v / v0) / math.log(v1 / v0)
        other = math.exp((1 - share) * math.log(c0) + share * math.log(c1))
    else:
        return None
    return change / other if change > 0 and other > 0 else None


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _figure(curves: dict[str, Any]) -> Any:
    drawn, grid = panels(2, len(curves), 2.5 * len(curves) + 0.6, 5.4)
    names = sorted(
        {n for by, _ in curves.values() for n in by if n.startswith("k")},
        key=lambda n: float(n[4:]),
    )
    names += [*TITLES]
    for column, (model, (by, own)) in enumerate(curves.items()):
        above, below = grid[0][column], grid[1][column]
        for index, name in enumerate(names):
            colour, marker = looks(index)
            look = {"color": colour, "marker": marker, "ms": 3.5, "lw": 0.8, "label": _title(name)}
            places = by.get(name, [])
            above.plot([v for v, *_ in places], [c for _, c, _ in places], **look)
            seen = [(v, s) for v, _, s in places if s is not None]
            below.plot([v for v, _ in seen], [s for _, s in seen], **look)
        metric = next(iter(scored(own)), None)
        if metric:
            below.axhline(end(own, "post", metric), color="black", lw=1, ls="--")
            below.set_ylabel(metric)
        above.set(title=model, ylabel="loss change, nats", xscale="log")
        above.set_yscale("symlog", linthresh=1e-3)
        below.set(xlabel="editing intensity v", xscale="log")
    one_legend(drawn, grid[0][0], 7)
    return drawn


def _title(name: str) -> str:
    return f"DARE, {name}" if name.startswith("k") else TITLES[name]
