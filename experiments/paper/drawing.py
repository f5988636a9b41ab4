"""What the paper's figures share: curves with bands, and lines for the unedited models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deltalab.drawing import looks, panels
from experiments.paper.found import mean, spread

COLUMNS = 3
CLOSE = 0.07
"""Lines closer than this share of the axis have their names beside each other."""


def tiles(count: int) -> tuple[Any, list[Any]]:
    """Make a figure of so many panels, three to a row."""
    columns = 2 if count == 4 else min(count, COLUMNS)
    rows = math.ceil(count / columns)
    drawn, grid = panels(rows, columns, max(4.2, 3.2 * columns), 2.7 * rows + 0.4)
    for axes in grid.flat[count:]:
        axes.remove()
    return drawn, list(grid.flat)[:count]


def curve(
    axes: Any,
    xs: Sequence[float],
    values: Sequence[Sequence[float]],
    index: int,
    label: str,
    **kw: Any,
) -> None:
    """Draw the means of repetitions, and a band of one standard deviation."""
    colour, marker = looks(index)
    middle = [mean(each) for each in values]
    look = {"color": colour, "marker": marker, "markersize": 4, "lw": 1.3, **kw}
    axes.plot(xs, middle, label=label, **look)
    if any(len(each) > 1 for each in values):
        low = [m - spread(v) for m, v in zip(middle, values, strict=True)]
        high = [m + spread(v) for m, v in zip(middle, values, strict=True)]
        axes.fill_between(xs, low, high, color=look["color"], alpha=0.18, lw=0)


def reference(axes: Any, heights: Mapping[str, float]) -> None:
    """Draw the unedited models' scores: post dashed, pre dotted, named at the right margin.

    Called after the curves: where both lines nearly meet, their names step apart.
    """
    for name, height in heights.items():
        axes.axhline(height, color="black", lw=1, ls="--" if name == "post" else ":", zorder=1)
    places = [_place(axes, height) for height in heights.values()]
    for name, height in heights.items():
        above = height == max(heights.values())
        apart = ("bottom" if above else "top") if max(places) - min(places) < CLOSE else "center"
        beside = {"transform": axes.get_yaxis_transform(), "va": apart, "ha": "left"}
        axes.text(1.01, height, name, fontsize=8, **beside)


def _place(axes: Any, height: float) -> float:
    """Return where a height is on the axis, 0 at its lower and 1 at its upper end."""
    point = axes.transData.transform((axes.get_xlim()[0], height))
    return float(axes.transAxes.inverted().transform(point)[1])


def zero(axes: Any) -> None:
    """Draw the line of no change."""
    axes.axhline(0, color="black", lw=0.8, zorder=1)


def one_legend(figure: Any, axes: Any, columns: int) -> None:
    """Put one legend below all panels, as all have the same curves."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
