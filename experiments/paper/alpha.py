"""Figs. 7 and 13: interpolation or extrapolation along the delta, by task and model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltalab.drawing import HATCHES, looks, panels
from deltalab.statistics.means import Mean
from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome
from experiments.paper.drawing import curve, zero
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    NEAR,
    Cell,
    Figure,
    Found,
    Table,
    end,
    every,
    is_loss,
    losses,
    metrics,
    pairs,
    scored,
    some,
)

DIRECTIONS = {"interpolation": -1, "extrapolation": 1}


def by_alpha(points: Sequence[Outcome]) -> dict[float, Outcome]:
    """Return the points of one model by their alpha."""
    return {number(p.settings["alpha"]) or 0.0: p for p in points}


@dataclass(frozen=True)
class Side:
    """One direction of one metric of one model.

    Attributes:
        at: the alpha that is best by the documents to choose on.
        gain: the gain there over post, by all documents.
        cell: the case that there is a gain.
        better: how likely so large a gain is, and so far beyond the other direction's, by chance.
    """

    at: float
    gain: float
    cell: Cell
    better: float


Best = dict[tuple[str, str], dict[str, Side]]
"""Of every model and metric the best alpha in each direction."""


def gains(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check that the better direction differs between tasks (Fig. 7), or models (Fig. 13).

    The best alpha of a direction is chosen on one half of the documents, and its gain is that on
    the other half. Where the documents were not kept every alpha is a candidate, and corrected for.
    """
    evidence, best = Evidence(points, documents or {}), Best()
    for model, own in pairs(points).items():
        by = by_alpha(own)
        best |= {(model, metric): _sides(evidence, by, metric) for metric in scored(by.values())}
    checks = [
        some("gains", "some score gains in one direction",
             [side.cell for found in best.values() for side in found.values()]),
        every("depends", "interpolation is better for one task or model, extrapolation for another",
              [_depends(best)]),
    ]  # fmt: skip
    told = "; ".join(
        f"{model} {metric}: "
        + ", ".join(f"{n} {_gain(s.gain, metric)} at {plain(s.at)}" for n, s in found.items())
        for (model, metric), found in best.items()
    )
    halved = "documents" in evidence.used
    return Found(
        sentence=f"Gain over post at the best alpha of each direction: {told}.",
        checks=checks,
        notes=[HALVED if halved else WHOLE, *evidence.notes],
        show=lambda: _shown(points, best),
    )


HALVED = (
    "The best alpha is chosen on half A of the documents and judged on half B; the gains shown are"
    " of all documents. Losses are shown and not checked."
)
WHOLE = (
    "The documents cannot be parted, so that the gains shown are of the best of all alphas, by the"
    " documents that are reported; the checks correct for that. Losses are shown and not checked."
)


def _sides(evidence: Evidence, by: Mapping[float, Outcome], metric: str) -> dict[str, Side]:
    """Return both directions of one metric."""
    alphas = {n: [a for a in by if a * sign > 0] for n, sign in DIRECTIONS.items()}
    post = end(list(by.values()), "post", metric)
    split = evidence.has(metric, list(by.values()))

    def gain(*sides: tuple[float, float | None], half: Any = None) -> Mean:
        found = [(w, None if a is None else [by[a]]) for w, a in sides]
        return evidence.score(metric, *found, half=half)

    def chosen(name: str) -> float:
        score = {a: by[a].metrics[metric] for a in alphas[name]}
        if split:
            score = {a: gain((1, a), (-1, None), half="A").value for a in alphas[name]}
        return max(score, key=lambda a: (score[a], -abs(a)))

    at = {name: chosen(name) for name in DIRECTIONS}
    sides = {}
    for name, other in (tuple(DIRECTIONS), tuple(DIRECTIONS)[::-1]):
        mine, theirs = ([at[name]], [at[other]]) if split else (alphas[name], alphas[other])
        half = "B" if split else None
        own = {a: gain((1, a), (-1, None), half=half) for a in mine}
        cell = Cell(
            min(1.0, len(mine) * min(g.above() for g in own.values())),
            max(g.below(NEAR) for g in own.values()),
        )
        further = [
            max(own[a].above(), *(gain((1, a), (-1, b), half=half).above() for b in theirs))
            for a in mine
        ]
        score = by[at[name]].metrics[metric] - post
        sides[name] = Side(at[name], score, cell, min(1.0, len(mine) * min(further)))
    return sides


def _depends(best: Best) -> Cell:
    """Return the case that either direction is the better one of some task or model."""
    better = {n: [found[n].better for found in best.values()] for n in DIRECTIONS}
    holds = max(min(1.0, len(each) * min(each)) for each in better.values())
    return Cell(holds, min(1.0, 2 * min(max(each) for each in better.values())))


def _value(value: float, metric: str) -> str:
    return f"{value:.3f}" if is_loss(metric) else f"{100 * value:.1f}"


def _gain(gain: float, metric: str) -> str:
    return f"{gain:+.3f} nats" if is_loss(metric) else f"{100 * gain:+.1f}"


def _shown(points: Sequence[Outcome], best: Best) -> tuple[list[Table], list[Figure]]:
    rows = []
    for model, own in pairs(points).items():
        by = by_alpha(own)
        for metric in [*scored(own), *losses(own)]:
            error = metrics([by[0.0]], f"{metric}_error") or [float("nan")]
            post = end(own, "post", metric)
            tops = [_top(by, metric, sign, post) for sign in DIRECTIONS.values()]
            rows.append([
                model, metric, _value(post, metric), _value(error[0], metric),
                *(f"{_gain(gain, metric)} at {plain(at)}" for gain, at in tops),
            ])  # fmt: skip
    title = "Largest gain over post in each direction, of all alphas and all documents"
    columns = ["model", "metric", "post", "its standard error", *DIRECTIONS]
    captions = (
        "Gain of each score over the post-trained one at the best alpha of each direction.",
        "Change of the scores (above) and of the answers' loss (below, where there is one) against"
        " alpha: -1 is the pre-trained model, 0 the post-trained one.",
    )
    return [Table(title, columns, rows)], [
        ("", _bars(best), captions[0]), ("_alpha", _lines(points), captions[1])
    ]  # fmt: skip


def _top(by: Mapping[float, Outcome], metric: str, sign: int, post: float) -> tuple[float, float]:
    """Return the largest gain in one direction, and the smallest alpha that has it."""
    worth = -1 if is_loss(metric) else 1
    side = [(worth * (p.metrics[metric] - post), -abs(a), a) for a, p in by.items() if a * sign > 0]
    gain, _, at = max(side)
    return gain, at


def _bars(best: Best) -> Any:
    drawn, ((axes,),) = panels(1, 1, max(4.6, 1.5 * len(best)), 3.2)
    for index, name in enumerate(DIRECTIONS):
        heights = [100 * found[name].gain for found in best.values()]
        places = [i + (index - 0.5) * 0.4 for i in range(len(best))]
        look = {"color": looks(index)[0], "hatch": HATCHES[index], "edgecolor": "white"}
        bars = axes.bar(places, heights, 0.38, label=name, **look)
        labels = [f"at {plain(found[name].at)}" for found in best.values()]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    zero(axes)
    axes.set_xticks(range(len(best)), [f"{model}\n{m.split('/')[0]}" for model, m in best])
    axes.set(ylabel="gain, points")
    axes.margins(y=0.18)
    axes.legend()
    return drawn


def _lines(points: Sequence[Outcome]) -> Any:
    found = pairs(points)
    kinds = [scored, losses] if losses(points) else [scored]
    drawn, grid = panels(len(kinds), len(found), max(4.6, 3.8 * len(found)), 2.8 * len(kinds))
    for column, (model, own) in enumerate(found.items()):
        by = by_alpha(own)
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
