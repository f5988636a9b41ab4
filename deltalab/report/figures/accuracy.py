"""Score against drop rate, as in Fig. 2 of the paper."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from deltalab.drawing import looks, panels, short
from deltalab.report.outcomes import by_pair, pair_names, references
from deltalab.report.tables import is_lenient, scores
from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome

CAPTION = (
    "Score against DARE's drop rate p, one curve for each k, after Fig. 2 of the paper; the lines"
    " are the unedited models. Points that differ in their seed alone: mean, standard deviation."
)
COLUMNS = 3


def figure(points: Sequence[Outcome]) -> Any:
    """Draw DARE's scores against p, a curve for each k and a panel for each pair and metric.

    Returns None if no pair has a metric at two values of p.
    """
    wanted, named = [], pair_names(points)
    for every in by_pair(points):
        own = [p for p in every if _rate(p) is not None]
        for metric in (name for name in scores(own) if not is_lenient(name)):
            found = [p for p in own if metric in p.metrics]
            if len({_rate(p) for p in found}) > 1:
                wanted.append((named[own[0].of], metric, found, references(every)))
    if not wanted:
        return None
    columns = min(len(wanted), COLUMNS)
    rows = math.ceil(len(wanted) / columns)
    drawn, grid = panels(rows, columns, max(4.6, 3.4 * columns), 3.0 * rows)
    for axes in grid.flat[len(wanted) :]:
        axes.remove()
    for axes, (name, metric, found, ends) in zip(grid.flat, wanted, strict=False):
        _curves(axes, metric, found)
        axes.set(title=short(name), xlabel="drop rate p", ylabel=short(metric))
        for end in ends:
            if metric in end.metrics:
                _line(axes, end.metrics[metric], end.edit)
    return drawn


def _rate(point: Outcome) -> float | None:
    return number(point.settings.get("p")) if point.edit == "dare" else None


def _curves(axes: Any, metric: str, points: Sequence[Outcome]) -> None:
    curves: dict[str, dict[float, list[float]]] = {}
    several = len({p.select for p in points}) > 1
    for point in sorted(points, key=lambda p: number(p.settings.get("k")) or 0.0):
        others = {name: value for name, value in point.settings.items() if name != "p"}
        others.update({"select": point.select} if several else {})
        name = ", ".join(f"{key} = {plain(value)}" for key, value in others.items())
        curve = curves.setdefault(name, {})
        curve.setdefault(_rate(point) or 0.0, []).append(point.metrics[metric])
    for index, (name, values) in enumerate(curves.items()):
        rates = sorted(values)
        mean = [statistics.fmean(values[p]) for p in rates]
        spread = [statistics.stdev(values[p]) if len(values[p]) > 1 else 0.0 for p in rates]
        colour, marker = looks(index)
        axes.plot(rates, mean, color=colour, marker=marker, markersize=4, lw=1.3, label=short(name))
        if any(spread):
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axes.fill_between(rates, low, high, color=colour, alpha=0.2, lw=0)
    axes.legend(handlelength=1.8)


def _line(axes: Any, height: float, name: str) -> None:
    axes.axhline(height, color="black", lw=1, ls="--" if name == "post" else ":")
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "left"}
    axes.text(1.01, height, name, fontsize=8, **beside)
