"""The scatter of term against measured change, as a specification in Vega-Lite."""

import math
from collections.abc import Sequence
from typing import Any

from deltalab.report.page.points import TERM, Points

# Okabe and Ito's palette without its yellow, as in the figures.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
SHAPES = (
    *("circle", "square", "triangle-up", "diamond", "triangle-down", "cross"),
    *("triangle-right", "triangle-left"),
)
"""Eight, and seven colours: 56 groups look different."""
GREY = "#888888"
EVERY = ""
MOST_TICKS = 9
GROUPS = {"kind of edit": "family", "model": "pair", "experiment": "experiment", "class": "classed"}


def chart(points: Points) -> dict[str, Any] | None:
    """Specify the scatter; the page adds the rows as the data `points`. None without any term.

    Both axes are alike. Where the values are of many sizes they are symmetric-logarithmic: linear
    near zero, where a logarithm would stretch noise, and by powers of ten beyond.
    """
    changes = points.values("change")
    pairs = {
        rule: [
            (x, y)
            for x, y in zip(changes, points.values(rule), strict=True)
            if x is not None and y is not None
        ]
        for rule in points.terms
    }
    shown = [rule for rule, found in pairs.items() if found]
    if not shown:
        return None
    axis = _axis([value for found in pairs.values() for pair in found for value in pair])
    low, high = axis["scale"]["domain"]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": "Scatter of the term against the measured change of every point",
        "width": "container",
        "height": 480,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": "white",
        "data": {"name": "points"},
        "params": _choices(points, shown),
        "transform": _transforms(points, shown),
        "layer": [
            _line((low, low), (high, high), width=1.2),
            _line((low, 0), (high, 0), dash=[4, 3]),
            _line((0, low), (0, high), dash=[4, 3]),
            _marks(points, axis),
        ],
        "config": {
            "font": "system-ui, sans-serif",
            "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": 500},
            "legend": {"labelFontSize": 12, "titleFontSize": 12, "labelLimit": 260},
        },
    }


def is_symlog(chart: dict[str, Any]) -> bool:
    """Tell whether a scatter's axes are logarithmic beyond their middle."""
    return bool(chart["layer"][-1]["encoding"]["x"]["scale"]["type"] == "symlog")


def _choices(points: Points, shown: Sequence[str]) -> list[dict[str, Any]]:
    """What a reader may choose: the rule, the colours, one model and one experiment alone."""

    def choice(
        name: str, title: str, values: Sequence[str], labels: Sequence[str]
    ) -> dict[str, Any]:
        bind: dict[str, Any] = {"input": "select", "element": "#choices", "name": title}
        bind |= {"options": [*values], "labels": [*labels]}
        return {"name": name, "value": values[0], "bind": bind}

    every = [name for names in points.values("experiment") for name in names.split(", ")]
    models, experiments = sorted(set(points.values("pair"))), sorted({*every})
    titles = [points.terms[rule] for rule in shown]
    groups = {name: sorted(set(points.values(name))) for name in GROUPS.values()}
    return [
        {"name": "groups", "value": groups},
        choice("rule", "show ", shown, titles),
        choice("colour_by", "colour by ", list(GROUPS.values()), list(GROUPS)),
        choice("one_model", "model ", [EVERY, *models], ["all", *models]),
        choice("one_experiment", "experiment ", [EVERY, *experiments], ["all", *experiments]),
    ]


def _transforms(points: Points, shown: Sequence[str]) -> list[dict[str, Any]]:
    """Name the cells of a row, and take the chosen term and group from them."""
    places = {name: index for index, name in enumerate(points.fields)}
    asked = "', ' + datum.experiment + ', ', ', ' + one_experiment + ', '"
    named = [{"calculate": f"datum[{places[name]}]", "as": name} for name in places]
    return [
        *named,
        {"calculate": "datum[rule]", "as": "term"},
        {"calculate": "datum[colour_by]", "as": "group"},
        {"filter": "isValid(datum.term) && isValid(datum.change)"},
        {"filter": f"one_model == '{EVERY}' || datum.pair == one_model"},
        {"filter": f"one_experiment == '{EVERY}' || indexof({asked}) >= 0"},
    ]


def _marks(points: Points, axis: dict[str, Any]) -> dict[str, Any]:
    tips = {
        name: each.title
        for name, each in points.fields.items()
        if not each.hidden and not name.startswith(TERM)
    } | {"term": "term"}
    legend = {
        "title": None,
        "orient": "bottom",
        "columns": {"expr": "max(1, floor(width / 120))"},
        "symbolOpacity": 1,
        "symbolLimit": 56,
    }
    # A group keeps its colour whatever else is shown; a legend of nothing would be an error.
    every = {"domain": {"expr": "groups[colour_by]"}}
    sized = {"field": "group", "type": "nominal", "legend": legend}
    return {
        "mark": {"type": "point", "filled": True, "size": 44, "strokeWidth": 0.5},
        "params": [
            {
                "name": "chosen",
                "select": {"type": "point", "fields": ["group"]},
                "bind": "legend",
            },
            {
                "name": "view",
                "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"},
                "bind": "scales",
            },
        ],
        "encoding": {
            "x": {"field": "change", "type": "quantitative", "title": "measured change", **axis},
            "y": {"field": "term", "type": "quantitative", "title": "term", **axis},
            "color": {**sized, "scale": {"range": [*COLOURS], **every}},
            "shape": {**sized, "scale": {"range": [*SHAPES], **every}},
            "opacity": {"condition": {"param": "chosen", "value": 0.75}, "value": 0.06},
            "tooltip": [{"field": name, "title": title} for name, title in tips.items()],
        },
    }


def _line(
    start: Sequence[float], end: Sequence[float], *, width: float = 1, dash: Sequence[int] = ()
) -> dict[str, Any]:
    ends = [{"x": start[0], "y": start[1]}, {"x": end[0], "y": end[1]}]
    mark = {"type": "line", "color": GREY, "strokeWidth": width, "strokeDash": [*dash]}
    places = {name: {"field": name, "type": "quantitative"} for name in ("x", "y")}
    return {"data": {"values": ends}, "mark": {**mark, "clip": True}, "encoding": places}


def _axis(values: Sequence[float]) -> dict[str, Any]:
    """Scale and ticks of both axes: the linear part ends near the smaller values.

    >>> axis = _axis([1e-4, -1e-4, 0.5, 1.0])
    >>> axis["scale"]["constant"], axis["axis"]["values"]
    (0.0001, [0.0, 0.001, 0.01, 0.1, 1.0])
    >>> _axis([-0.5, 1.0])["scale"]["type"]
    'linear'
    """
    sizes = sorted(abs(value) for value in values if value) or [1.0]
    small, large = sizes[len(sizes) // 5], sizes[-1]
    low, high = min([*values, 0.0]), max([*values, 0.0])
    look: dict[str, Any] = {"grid": True, "gridColor": "#eeeeee", "domain": False}
    if large <= 20 * small:
        room = 0.08 * ((high - low) or 1.0)
        scale = {"type": "linear", "domain": [low - room, high + room], "nice": False}
        return {"scale": scale, "axis": {**look, "tickCount": MOST_TICKS}}
    power = max(math.floor(math.log10(small)), math.floor(math.log10(large)) - 6)
    room = 10.0**power / 2
    domain = [1.4 * low - room, 1.4 * high + room]
    scale = {"type": "symlog", "constant": 10.0**power, "domain": domain, "nice": False}
    return {"scale": scale, "axis": {**look, "values": _ticks(low, high, power), "format": "~r"}}


def _ticks(low: float, high: float, first: int) -> list[float]:
    """Zero and powers of ten on both sides, few enough for their labels to fit."""
    ends = [(-1.0, -low), (1.0, high)]
    lasts = [(sign, math.floor(math.log10(end))) for sign, end in ends if end >= 10.0**first]
    step = math.ceil(sum(last - first + 1 for _, last in lasts) / MOST_TICKS) or 1
    # From above, so that labels are left out where they stand close: beside zero.
    powers = [sign * float(f"1e{p}") for sign, last in lasts for p in range(last, first, -step)]
    return sorted([0.0, *powers])
