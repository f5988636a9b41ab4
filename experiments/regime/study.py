"""The card of `experiment=regime`: what edits cost by the size of the delta, |delta|/|W|."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from deltalab.drawing import looks, panels
from deltalab.report.outcomes import spearman
from deltalab.store.fields import number
from deltalab.store.record import Outcome
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import Cell, Found, Table, above, every, nearer, pairs

SIZES = Path(__file__).parents[2] / "results" / "zoo" / "regime.json"
SMALL, LARGE = 0.05, 0.3
"""Deltas below the first are small, above the second large."""

RATE = 0.9
KINDS = ("images", "text")
CHOSEN_ON, TESTED_ON = KINDS
ABSCISSAE = {
    "relative": "|E|/|D|",
    "absolute": "|E|/|W|",
    "rate": "size of the delta alone",
}
CAPTIONS = (
    "DARE by drop rate and size of the delta: the colour is the loss change in nats, on a"
    " logarithmic scale; white crosses gained.",
    "Loss change against |E|/|D| (left) and against |E|/|W| (right): every edit, every pair.",
    "Loss change of one method each of every family against the size of the delta, mean over the"
    " pairs of a run's step.",
)


def regime(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Compare DARE with BitDelta by the delta's size, and what orders the loss changes of a run."""
    evidence = Evidence(points, {} if documents is None else documents)
    known = sizes()
    by = {name: own for name, own in pairs(points).items() if name in known}
    ends = {name: _two(own) for name, own in by.items()}
    small = [ends[n] for n in by if known[n] < SMALL and all(ends[n])]
    large = [ends[n] for n in by if known[n] > LARGE and all(ends[n])]
    ranks = {run: ordered(own, known) for run, own in runs(by).items()}
    tested = {run: r for run, r in ranks.items() if run.startswith(TESTED_ON)}
    told = "; ".join(
        f"{kind} {_mean(ranks, kind, 'relative'):.2f} by |E|/|D|,"
        f" {_mean(ranks, kind, 'absolute'):.2f} by |E|/|W|"
        for kind in KINDS
    )
    return Found(
        sentence=f"Rank correlation of a run's loss changes, mean over runs: {told}.",
        checks=[
            every(
                "small",
                f"on deltas below {SMALL:g} of the weights DARE at p = {RATE:g} loses less than"
                " BitDelta",
                [above(evidence.change((1.0, [bit]), (-1.0, [dare]))) for dare, bit in small],
            ),
            every(
                "large",
                f"on deltas above {LARGE:g} of the weights DARE at p = {RATE:g} loses more than"
                " BitDelta",
                [above(evidence.change((1.0, [dare]), (-1.0, [bit]))) for dare, bit in large],
            ),
            every(
                "abscissa",
                "the shift relative to the weights, |E|/|W|, orders the loss changes of a run of"
                " checkpoints better than that relative to the delta: chosen on images, tested on"
                " the runs of text",
                [_better(tested.values())],
            ),
        ],
        notes=[
            "Pairs are checkpoints along runs of six learning rates from one base: sizes were set"
            " by |delta|/|W| alone, no edit was looked at (results/zoo/regime.json has recipe,"
            " sizes, losses, digests). Pairs of a run share its data and its direction, so that"
            " their number is not one of independent trainings; the last check counts runs.",
        ],
        show=lambda: (
            [_table(by, known, evidence), _orders(ranks)],
            [
                ("", _plane(by, known), CAPTIONS[0]),
                ("_collapse", _collapse(by, known), CAPTIONS[1]),
                ("_methods", _methods(by, known), CAPTIONS[2]),
            ],
        ),
    )


@cache
def sizes() -> dict[str, float]:
    """Return |delta|/|W| of every pair, by its label."""
    found = json.loads(SIZES.read_text(encoding="utf-8"))["pairs"]
    return {f"{row['run']}/{row['step']}": row["size"] for row in found}


def runs(by: Mapping[str, Sequence[Outcome]]) -> dict[str, dict[str, Sequence[Outcome]]]:
    """Return the pairs of every run."""
    found: dict[str, dict[str, Sequence[Outcome]]] = {}
    for name, own in by.items():
        found.setdefault(name.rpartition("/")[0], {})[name] = own
    return found


def ordered(
    own: Mapping[str, Sequence[Outcome]], known: Mapping[str, float]
) -> dict[str, float | None]:
    """Return how each abscissa orders the loss changes of a run's edits, rank correlations.

    Shifts count as equal that are so to five figures: +.3 and -.3 of the delta move it as far.
    """
    rows = [
        (shift := float(f"{p.relative_shift:.5g}"), shift * known[name], known[name], p.change)
        for name, points in own.items()
        for p in points
        if p.relative_shift is not None and p.change is not None
    ]
    changes = [row[3] for row in rows]
    return {each: spearman([r[i] for r in rows], changes) for i, each in enumerate(ABSCISSAE)}


def _better(ranks: Any) -> Cell:
    """Return the case that |E|/|W| has the greater rank correlation, by the exact sign test."""
    both = [(r["absolute"], r["relative"]) for r in ranks]
    return nearer([(-a, -b) for a, b in both if a is not None and b is not None])


def _two(own: Sequence[Outcome]) -> tuple[Outcome | None, Outcome | None]:
    """Return DARE at `RATE` and BitDelta."""
    dare = next((p for p in own if p.edit == "dare" and number(p.settings["p"]) == RATE), None)
    return dare, next((p for p in own if p.edit == "bitdelta"), None)


def _mean(ranks: Mapping[str, Mapping[str, float | None]], kind: str, name: str) -> float:
    values = [r[name] or 0.0 for run, r in ranks.items() if run.startswith(kind)]
    return sum(values) / len(values) if values else math.nan


def _table(
    by: Mapping[str, Sequence[Outcome]], known: Mapping[str, float], evidence: Evidence
) -> Table:
    labels = list(
        dict.fromkeys(p.label.partition(" values")[0] for own in by.values() for p in own)
    )
    rows = []
    for name in sorted(by, key=lambda n: (n.startswith(TESTED_ON), known[n])):
        own = {p.label.partition(" values")[0]: p for p in by[name]}
        gap = by[name][0].gap or math.nan
        rows.append([
            name, f"{known[name]:.3f}", f"{gap:.3f}",
            *(f"{own[at].change or 0.0:+.4f}" if at in own else "-" for at in labels),
        ])  # fmt: skip
    heads = ["pair", "|delta|/|W|", "gap", *labels]
    return Table("Loss change in nats by size of the delta", heads, rows)


def _orders(ranks: Mapping[str, Mapping[str, float | None]]) -> Table:
    rows = [
        [run, *("-" if r[name] is None else f"{r[name]:.3f}" for name in ABSCISSAE)]
        for run, r in ranks.items()
    ]
    return Table("What orders the loss changes of a run, rank correlation",
                 ["run", *ABSCISSAE.values()], rows)  # fmt: skip


def _dares(by: Mapping[str, Sequence[Outcome]], kind: str) -> list[tuple[str, float, float]]:
    return [
        (name, number(p.settings["p"]) or 0.0, p.change or 0.0)
        for name, own in by.items()
        if name.startswith(kind)
        for p in own
        if p.edit == "dare"
    ]


def _plane(by: Mapping[str, Sequence[Outcome]], known: Mapping[str, float]) -> Any:
    from matplotlib.colors import LogNorm

    drawn, grid = panels(1, 2, 9.2, 3.8)
    for axes, kind in zip(grid[0], KINDS, strict=True):
        rows = _dares(by, kind)
        seen = axes.scatter(
            [known[n] for n, _, _ in rows], [p for _, p, _ in rows],
            c=[max(c, 1e-4) for *_, c in rows], norm=LogNorm(1e-4, 10), cmap="viridis", s=90,
        )  # fmt: skip
        gained = [(known[n], p) for n, p, c in rows if c < 0]
        axes.plot([x for x, _ in gained], [y for _, y in gained], "wx", ms=5)
        axes.set(title=kind, xlabel="|delta|/|W|", ylabel="drop rate p", xscale="log")
    bar = drawn.colorbar(seen, ax=list(grid[0]), label="loss change, nats")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return drawn


def _collapse(by: Mapping[str, Sequence[Outcome]], known: Mapping[str, float]) -> Any:
    drawn, grid = panels(2, 2, 9.2, 6.6)
    edits = list(dict.fromkeys(p.edit for own in by.values() for p in own))
    for row, kind in zip(grid, KINDS, strict=True):
        for index, edit in enumerate(edits):
            mine = [
                (p.relative_shift, known[name], p.change)
                for name, own in by.items()
                if name.startswith(kind)
                for p in own
                if p.edit == edit and p.relative_shift is not None
            ]
            colour, marker = looks(index)
            look = {"c": colour, "marker": marker, "s": 12, "alpha": 0.75, "label": edit}
            row[0].scatter([s for s, _, _ in mine], [c for *_, c in mine], **look)
            row[1].scatter([s * w for s, w, _ in mine], [c for *_, c in mine], **look)
        for axes, name in zip(row, ("relative", "absolute"), strict=True):
            axes.set(xscale="log", xlabel=ABSCISSAE[name], ylabel="loss change, nats", title=kind)
            axes.set_yscale("symlog", linthresh=1e-2)
    handles, labels = grid[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=8)
    return drawn


def _methods(by: Mapping[str, Sequence[Outcome]], known: Mapping[str, float]) -> Any:
    drawn, grid = panels(1, 2, 9.2, 3.8)
    chosen = ("dare p=0.9 k=0", "drop_only p=0.5", "ties keep=0.2", "bitdelta", "twin",
              "expo alpha=0.3", "delta_come", "dqrelo")  # fmt: skip
    for axes, kind in zip(grid[0], KINDS, strict=True):
        for index, start in enumerate(chosen):
            mine = sorted(
                (known[name], p.change or 0.0)
                for name, own in by.items()
                if name.startswith(kind)
                for p in own
                if p.label.startswith(start)
            )
            colour, marker = looks(index)
            look = {"color": colour, "marker": marker, "ms": 3.5, "lw": 0.9, "label": start}
            axes.plot([w for w, _ in mine], [c for _, c in mine], **look)
        axes.set(title=kind, xlabel="|delta|/|W|", ylabel="loss change, nats", xscale="log")
        axes.set_yscale("symlog", linthresh=1e-2)
    handles, labels = grid[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4)
    return drawn
