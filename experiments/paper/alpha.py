"""Figs. 6, 7 and 13: interpolation and extrapolation along the delta."""

from collections.abc import Sequence
from typing import Any

from deltalab.report.figures.style import HATCHES, looks, panels
from deltalab.report.tables import signed
from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome
from experiments.paper.drawing import curve, zero
from experiments.paper.found import (
    Found,
    Table,
    check,
    end,
    is_loss,
    losses,
    metrics,
    one_pair,
    pairs,
    scored,
)

PAPER_END = 0.6
"""Where the paper's Fig. 6 ends."""

DIRECTIONS = {"interpolation": -1, "extrapolation": 1}


def _by_alpha(points: Sequence[Outcome]) -> dict[float, Outcome]:
    return {number(p.settings["alpha"]) or 0.0: p for p in points}


def expo_term(points: Sequence[Outcome]) -> Found:
    """Check that ExPO's term falls and then rises above 0 (Fig. 6)."""
    by = _by_alpha(one_pair(points))
    alphas = sorted(by)
    value = {r: [by[a].terms[r].value or 0.0 for a in alphas] for r in ("left", "gauss")}
    value["measured"] = [by[a].change or 0.0 for a in alphas]
    inside = [i for i, a in enumerate(alphas) if a <= PAPER_END + 1e-9]
    low = {name: min(range(len(alphas)), key=v.__getitem__) for name, v in value.items()}
    checks = [
        check("the term falls below 0 at first", [value["left"][i] < 0 for i in inside[1:2]]),
        check(f"its minimum lies inside the paper's range, before {PAPER_END}",
              [0 < low["left"] < inside[-1]]),
        check(f"it is above 0 at alpha = {PAPER_END}", [value["left"][inside[-1]] > 0]),
        check("further out it rises above 0", [value["left"][-1] > 0]),
    ]  # fmt: skip
    crossing = {
        n: next((a for a, x in zip(alphas, v, strict=True) if x > 0), None)
        for n, v in value.items()
    }
    told = ", ".join(
        f"{name} lowest {signed(v[low[name]])} at alpha = {plain(alphas[low[name]])}, first above 0"
        f" at {plain(crossing[name])}"
        for name, v in value.items()
    )
    drawn, ((axes,),) = panels(1, 1, 5.6, 3.4)
    titles = {"left": "paper's term (left, 5)", "gauss": "gauss, 3", "measured": "measured change"}
    for index, (name, v) in enumerate(value.items()):
        curve(axes, alphas, [[x] for x in v], index, titles[name])
    zero(axes)
    axes.axvline(PAPER_END, color="#666666", lw=0.8, ls=":")
    axes.text(PAPER_END, 0.97, " paper's range", fontsize=8, va="top",
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(xlabel="alpha", ylabel="DPO loss change, nats")
    axes.legend()
    rows = [[plain(a), *(signed(v[i]) for v in value.values())] for i, a in enumerate(alphas)]
    return Found(
        sentence=f"DPO loss over alpha: {told}.",
        checks=checks,
        tables=[Table("Change of the DPO loss, nats", ["alpha", *titles.values()], rows)],
        figures=[
            ("", drawn, "ExPO's term on the DPO loss of held-out preferences, against alpha.")
        ],
    )


Best = dict[tuple[str, str], dict[str, tuple[float, float]]]
"""Of every model and metric the best gain in each direction, and the alpha it is at."""


def gains(points: Sequence[Outcome]) -> Found:
    """Check that the better direction differs between tasks (Fig. 7), or models (Fig. 13)."""
    best: Best = {}
    rows = []
    for model, same in pairs(points).items():
        by = _by_alpha(same)
        own = list(by.values())
        for metric in [*scored(own), *losses(own)]:
            found = best[model, metric] = _best(by, metric)
            error = metrics([by[0.0]], f"{metric}_error") or [float("nan")]
            rows.append([
                model, metric, _value(end(own, "post", metric), metric), _value(error[0], metric),
                *(f"{_gain(gain, metric)} at {plain(at)}" for gain, at in found.values()),
            ])  # fmt: skip
    better = {
        at: _better({n: gain for n, (gain, _) in found.items()}) for at, found in best.items()
    }
    both = set(DIRECTIONS) <= set(better.values())
    checks = [
        check("some task gains in one direction", [any(b != "neither" for b in better.values())]),
        check("interpolation is better for one task or model, extrapolation for another", [both]),
    ]
    told = "; ".join(
        f"{model} {metric}: {better[model, metric]} ("
        + ", ".join(f"{name} {_gain(gain, metric)}" for name, (gain, _) in found.items())
        + ")"
        for (model, metric), found in best.items()
    )
    return Found(
        sentence=f"Better direction, by the gain at its best alpha: {told}.",
        checks=checks,
        notes=[
            "The best alpha is chosen on the documents that are reported, as in the paper: gains"
            " within two standard errors of post's score may be luck. Scores gain in points; a loss"
            " gains what it falls, in nats."
        ],
        tables=[Table("Best gain over post in each direction", [
            "model", "metric", "post", "its standard error", *DIRECTIONS], rows)],
        figures=[
            ("", _bars(best), "Best gain of each score over the post-trained one, by direction."),
            ("_alpha", _lines(points), (
                "Change of the scores (above) and of the answers' loss (below, where there is one)"
                " against alpha: -1 is the pre-trained model, 0 the post-trained one."
            )),
        ],
    )  # fmt: skip


def _best(by: dict[float, Outcome], metric: str) -> dict[str, tuple[float, float]]:
    """Return the largest gain in each direction, and the smallest alpha that has it."""
    post = end(list(by.values()), "post", metric)
    worth = -1 if is_loss(metric) else 1
    found = {}
    for name, sign in DIRECTIONS.items():
        side = [
            (worth * (p.metrics[metric] - post), -abs(a), a) for a, p in by.items() if a * sign > 0
        ]
        gain, _, at = max(side)
        found[name] = gain, at
    return found


def _value(value: float, metric: str) -> str:
    return f"{value:.3f}" if is_loss(metric) else f"{100 * value:.1f}"


def _gain(gain: float, metric: str) -> str:
    return f"{gain:+.3f} nats" if is_loss(metric) else f"{100 * gain:+.1f}"


def _better(gain: dict[str, float]) -> str:
    """Name the direction that gains more, or neither where none gains."""
    top = max(gain.values())
    if top <= 0:
        return "neither"
    names = [name for name, value in gain.items() if value == top]
    return names[0] if len(names) == 1 else "both alike"


def _bars(best: Best) -> Any:
    shown = {at: found for at, found in best.items() if not is_loss(at[1])}
    drawn, ((axes,),) = panels(1, 1, max(4.6, 1.5 * len(shown)), 3.2)
    for index, name in enumerate(DIRECTIONS):
        heights = [100 * found[name][0] for found in shown.values()]
        places = [i + (index - 0.5) * 0.4 for i in range(len(shown))]
        look = {"color": looks(index)[0], "hatch": HATCHES[index], "edgecolor": "white"}
        bars = axes.bar(places, heights, 0.38, label=name, **look)
        labels = [f"at {plain(found[name][1])}" for found in shown.values()]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    zero(axes)
    axes.set_xticks(range(len(shown)), [f"{model}\n{m.split('/')[0]}" for model, m in shown])
    axes.set(ylabel="best gain, points")
    axes.margins(y=0.18)
    axes.legend()
    return drawn


def _lines(points: Sequence[Outcome]) -> Any:
    found = pairs(points)
    kinds = [scored, losses] if losses(points) else [scored]
    drawn, grid = panels(len(kinds), len(found), max(4.6, 3.8 * len(found)), 2.8 * len(kinds))
    for column, (model, own) in enumerate(found.items()):
        by = _by_alpha(own)
        for row, kind in enumerate(kinds):
            axes = grid[row][column]
            for index, metric in enumerate(kind(list(by.values())), 2 * row):
                post = end(list(by.values()), "post", metric)
                factor = 1 if is_loss(metric) else 100
                values = [[factor * (by[a].metrics[metric] - post)] for a in sorted(by)]
                curve(axes, sorted(by), values, index, metric)
            zero(axes)
            axes.set(title=model, xlabel="alpha")
            axes.set_ylabel("change, nats (lower is better)" if row else "change, points")
            if row:
                axes.set_yscale("symlog", linthresh=1)
            axes.legend()
    return drawn
