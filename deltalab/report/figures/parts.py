"""The term by part of the model, as in Fig. 3 of the paper."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deltalab.drawing import HATCHES, looks, panels, short
from deltalab.report.outcomes import by_pair, pair_names
from deltalab.store.record import Outcome

CAPTION = (
    "The term by part of the model, after Fig. 3 of the paper, by the record's main rule; diamonds"
    " are the sums. The unedited models are left out; seeds are averaged."
)
MOST_BARS = 60


def figure(points: Sequence[Outcome]) -> Any:
    """Draw the term's parts as stacked bars, a panel for each pair.

    Returns None if no edit has parts, or if a pair has too many edits for its bars to be read.
    """
    named = pair_names(points)
    split: dict[str, dict[str, dict[str, float]]] = {}
    units = {}
    for own in by_pair(points):
        terms: dict[str, list[Mapping[str, float]]] = {}
        shown = [p for p in own if p.main and p.edit not in ("keep", "discard")]
        for point, name in zip(shown, _bar_names(shown), strict=True):
            terms.setdefault(name, []).append(point.terms[point.main or ""].by_part)
        bars = {name: mean for name, parts in terms.items() if (mean := _mean(parts))}
        if bars:
            title = named[own[0].of]
            split[title], units[title] = bars, own[-1].unit or "nats"
    counts = [len(bars) for bars in split.values()]
    if not counts or max(counts) > MOST_BARS:
        return None
    every = [part for bars in split.values() for bar in bars.values() for part in bar.items()]
    names = list(dict.fromkeys(name for name, value in every if value))
    height = 0.21 * sum(counts) + 0.75 * len(counts) + 0.3
    drawn, grid = panels(len(counts), 1, 6.8, height, [count + 2 for count in counts])
    for axes, (title, means) in zip(grid.flat, split.items(), strict=True):
        _stack(axes, means, names)
        axes.set(title=short(title), xlabel=f"term ({short(units[title])})")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    drawn.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], loc="outside right upper")
    return drawn


def _bar_names(points: Sequence[Outcome]) -> list[str]:
    """Name the bars of points of one pair: those that differ in their seed alone share one."""
    found = []
    for point in points:
        alike = [other for other in points if other.label == point.label]
        apart = [
            getattr(point, name) or "none"
            for name in ("select", "main")
            if len({getattr(other, name) for other in alike}) > 1
        ]
        found.append(", ".join([point.label, *apart]))
    return found


def _mean(terms: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for parts in terms for name in parts)
    return {name: statistics.fmean(parts.get(name, 0.0) for parts in terms) for name in names}


def _stack(axes: Any, bars: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    """Stack the positive parts to the right of zero and the negative ones to its left."""
    places = list(range(len(bars)))
    left, right = [0.0] * len(bars), [0.0] * len(bars)
    for index, name in enumerate(names):
        widths = [bar.get(name, 0.0) for bar in bars.values()]
        starts = [left[i] if width < 0 else right[i] for i, width in enumerate(widths)]
        look = {"color": looks(index)[0], "hatch": HATCHES[index % len(HATCHES)]}
        axes.barh(
            places, widths, left=starts, height=0.7, lw=0.4, ec="white", label=short(name), **look
        )
        left = [a + min(width, 0.0) for a, width in zip(left, widths, strict=True)]
        right = [a + max(width, 0.0) for a, width in zip(right, widths, strict=True)]
    sums = [sum(bar.values()) for bar in bars.values()]
    axes.plot(sums, places, ls="none", marker="D", color="black", markersize=4, label="sum")
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(places, [short(name) for name in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
