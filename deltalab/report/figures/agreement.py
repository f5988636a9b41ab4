"""Riemann term against measured loss change, for every rule."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from deltalab.drawing import looks, panels, short
from deltalab.report.outcomes import by_pair, pair_names, rules
from deltalab.store.record import Outcome

CAPTION = (
    "Riemann term against measured loss change, a panel for each pair and rule. On the diagonal the"
    " two agree; bars are two standard errors of the measured change. Points of the wrong sign are"
    " named."
)
MOST_TICKS = 8
MANY = 500
"""Points beyond which they are drawn together, as pixels, without bars and names."""


def figure(points: Sequence[Outcome]) -> Any:
    """Draw every rule's term against the measured change; return None if no point has both."""
    titles = rules(points)
    shown = [p for p in points if p.change is not None and math.isfinite(p.change)]
    shown = [p for p in shown if any(_value(p, rule) is not None for rule in titles)]
    if not shown:
        return None
    series = {edit: looks(index) for index, edit in enumerate(sorted({p.edit for p in shown}))}
    pairs, named = by_pair(shown), pair_names(shown)
    size = (3.2 * len(titles) + 1.0, 3.4 * len(pairs))
    drawn, grid = panels(len(pairs), len(titles), *size)
    handles: dict[str, Any] = {}
    for own, line in zip(pairs, grid, strict=True):
        values = [v for p in own for v in (p.change, *(_value(p, r) for r in titles)) if v]
        errors = [p.error or 0.0 for p in own]
        unit = short(own[0].unit or "nats")
        for axes, (rule, title) in zip(line, titles.items(), strict=True):
            if len(own) > MANY:
                title = f"{title} ({len(own)} points, no bars)"
                _cloud(axes, own, rule, series, handles)
            for point in own if len(own) <= MANY else ():
                _point(axes, point, rule, series, handles)
            title = f"{short(named[own[0].of])}, {short(title)}"
            axes.set(title=title, xlabel=f"measured change ({unit})")
            _scale(axes, values, errors)
        line[0].set_ylabel(f"term ({unit})")
    edits = sorted(handles)
    drawn.legend([handles[e] for e in edits], [short(e) for e in edits], loc="outside right center")
    return drawn


def _value(point: Outcome, rule: str) -> float | None:
    found = point.terms.get(rule)
    value = None if found is None else found.value
    return value if value is not None and math.isfinite(value) else None


def _point(
    axes: Any, point: Outcome, rule: str, series: dict[str, Any], handles: dict[str, Any]
) -> None:
    value = _value(point, rule)
    if value is None or point.change is None:
        return
    colour, marker = series[point.edit]
    reach = 2 * (point.error or 0.0)
    ends = (point.change - reach, point.change + reach)
    axes.plot(ends, (value, value), color=colour, lw=0.8, alpha=0.45, zorder=1.5)
    look = {"ls": "none", "marker": marker, "color": colour, "mec": "white", "mew": 0.5}
    (handles[point.edit],) = axes.plot(point.change, value, **look)
    if value * point.change < 0:
        side, away = ("right", -6) if point.change > 0 else ("left", 6)
        beside = {"xytext": (away, -4), "textcoords": "offset points", "va": "top", "ha": side}
        axes.annotate(short(point.label), (point.change, value), fontsize=7, **beside)


def _cloud(
    axes: Any, points: Sequence[Outcome], rule: str, series: dict[str, Any], handles: dict[str, Any]
) -> None:
    for edit, (colour, marker) in series.items():
        pairs = [(p.change, _value(p, rule)) for p in points if p.edit == edit]
        found = [pair for pair in pairs if pair[1] is not None]
        if found:
            look = {"ls": "none", "marker": marker, "color": colour, "mec": "none", "alpha": 0.5}
            (handles[edit],) = axes.plot(*zip(*found, strict=True), rasterized=True, **look)


def _scale(axes: Any, values: Sequence[float], errors: Sequence[float]) -> None:
    """Make both axes alike: linear where the values are of one size, else symmetric-logarithmic.

    The span that is drawn linearly ends at a power of ten near the smaller values, or near the
    standard error where that is larger, since a logarithm would stretch what is noise.
    """
    sizes = sorted(abs(value) for value in values) or [1.0]
    small, large = max(sizes[len(sizes) // 5], statistics.median(errors)), sizes[-1]
    low, high = min([*values, 0.0]), max([*values, 0.0])
    if large / small < 20:
        room = max(0.08 * ((high - low) or 1.0), 2.2 * max(errors))
        limits = (low - room, high + room)
    else:
        power = math.floor(math.log10(small))
        for name in ("x", "y"):
            getattr(axes, f"set_{name}scale")("symlog", linthresh=10.0**power, linscale=0.8)
            _decades(getattr(axes, f"{name}axis"), low, high, power)
        limits = (_beyond(low, 10.0**power), _beyond(high, 10.0**power))
    axes.set(xlim=limits, ylim=limits)
    axes.set_box_aspect(1)
    axes.axline((0, 0), (1, 1), color="black", lw=0.8, zorder=1)
    axes.axhline(0, color="#999999", lw=0.6, zorder=1)
    axes.axvline(0, color="#999999", lw=0.6, zorder=1)


def _decades(axis: Any, low: float, high: float, first: int) -> None:
    """Put ticks at zero and at powers of ten on both sides, few enough for their labels to fit."""
    ends = {sign: math.floor(math.log10(end)) for sign, end in (("-", -low), ("", high)) if end > 0}
    step = math.ceil(sum(max(0, last - first + 1) for last in ends.values()) / MOST_TICKS)
    ticks = {0.0: "0"}
    for sign, last in ends.items():
        for power in range(first, last + 1, step):
            ticks[float(f"{sign}1e{power}")] = f"${sign}10^{{{power}}}$" if power else f"${sign}1$"
    axis.set_ticks(list(ticks), list(ticks.values()), parse_math=True)
    axis.set_ticks([], minor=True)


def _beyond(end: float, threshold: float) -> float:
    """Return where an axis stops so that its last point has room."""
    if not end:
        return -0.5 * threshold
    return math.copysign(max(1.8 * abs(end), abs(end) + 0.5 * threshold), end)
