"""The card of `experiment=atlas`: which edit keeps the model, at which price."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from deltalab.drawing import looks, panels
from deltalab.report.outcomes import spearman
from deltalab.statistics.means import Mean
from deltalab.store.record import Outcome, label
from experiments.compression.study import Code, front
from experiments.paper.drawing import tiles
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    Cell,
    Check,
    Found,
    Table,
    above,
    every,
    fisher,
    mean,
    pairs,
    scored,
)

CLOSE, LEAST, MODERATE = 0.02, 1e-4, 0.5
"""A term is close within so much of the change, or so many nats, of changes up to the last."""

SHARE = 0.9
"""Of how many points the term must be close."""

RANK = 0.8
"""The rank correlation above which the one-pass prediction is said to order edits."""

KINDS = ("competitive", "improved", "decreased", "undecided")
VARIED = ("p", "k", "keep", "beta", "axis", "bits", "rate", "alpha", "sigma", "fraction", "total")
KEEPS = 0.05
"""A code keeps the model that costs at most this share of the pre-to-post gap."""

ZOO = Path(__file__).parents[2] / "results" / "zoo"
NOTE = (
    "Bits are true ones of the whole model: codes as files hold them, what is not edited as it is."
    f" A code keeps the model where it costs at most {100 * KEEPS:g} % of what post-training"
    " gained; the cheapest is chosen by its mean change on half A of the objective's examples, and"
    " judged on half B. |delta|/|W| is of all weights together, from the recipe's own outputs"
    " (results/zoo). One training, one draw: what differs by less than a few errors is no order."
    " Edits that need more than a pair (safety data, several experts) have cards of their own."
)


def atlas(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Put every edit of every pair side by side: class, term, prediction, change, score, bits."""
    evidence = Evidence(points, {} if documents is None else documents)
    by = dict(sorted(pairs(points).items(), key=lambda each: sizes().get(each[0], math.inf)))
    chosen = {name: cheapest(own, evidence) for name, own in by.items()}
    return Found(
        sentence=_sentence(by, chosen, evidence),
        checks=[
            every(
                "term",
                f"the term is within {100 * CLOSE:g} % of the measured change, or {LEAST:g} nats,"
                f" on more than {100 * SHARE:g} % of a pair's edits of up to {MODERATE:g} nats",
                map(close, by.values()),
            ),
            every(
                "prediction",
                "one pass at the post-trained model orders a pair's edits: a rank correlation above"
                f" {RANK:g} of second order with the measured change",
                map(ordered, by.values()),
            ),
            _keeps(chosen, evidence),
        ],
        notes=[NOTE],
        show=lambda: (
            [
                _prices(by, chosen, evidence),
                _methods(by),
                *(_all(name, own, evidence) for name, own in by.items()),
            ],
            [
                ("", _prices_drawn(by, evidence), CAPTIONS[0]),
                ("_term", _term_drawn(by), CAPTIONS[1]),
            ],
        ),
    )


CAPTIONS = (
    "Loss change as a share of the pre-to-post gap against true bits of the whole model a weight,"
    " every edit that has a code, pairs by the size of their delta; the black line joins the Pareto"
    " front, the dotted one is what still counts as kept.",
    "The term against the measured loss change, all edits of all pairs: on the diagonal it tells"
    " the change exactly.",
)


@cache
def sizes() -> dict[str, float]:
    """Return |delta|/|W| of the embedded pairs, of all weights, by name."""
    vit = json.loads((ZOO / "run.json").read_text(encoding="utf-8"))["deltas"]
    llm = json.loads((ZOO / "llm.json").read_text(encoding="utf-8"))["deltas"]
    named = {name.replace("_early", "") + "_vit" + name[5:] * ("_early" in name): parts
             for name, parts in vit.items()}  # fmt: skip
    return {name: parts["all"] for name, parts in (named | llm).items()}


def brief(point: Outcome) -> str:
    """Name an edit by the settings that the atlas varies.

    >>> brief(Outcome("m", "delta_mix", {"total": 0.98, "widths": 3, "scale": "best"}))
    'delta_mix total=0.98'
    """
    return label(point.edit, {n: v for n, v in point.settings.items() if n in VARIED})


def codes(own: Sequence[Outcome], evidence: Evidence, half: Any = None) -> list[Code]:
    """Return the edits of a pair that have a code: bits of the whole model, change, points.

    An edit that was calibrated on half A is measured on half B alone, and is none of half A's.
    """
    coded = [p for p in own if p.bits_per_weight and (half is None or p.half in (None, half))]
    found = [
        (p.bits_per_weight["model"], evidence.change((1.0, [p]), half=half), [p]) for p in coded
    ]
    return sorted(found, key=lambda each: each[0])


def cheapest(own: Sequence[Outcome], evidence: Evidence) -> Outcome | None:
    """Return the code of fewest bits that keeps the model by its mean change on half A."""
    for _, change, group in codes(own, evidence, "A"):
        if change.value <= KEEPS * (group[0].gap or 0.0):
            return group[0]
    return None


def close(own: Sequence[Outcome]) -> Cell:
    """Return the case that the term is close on more than `SHARE` of a pair's edits, exactly."""
    both = [
        (p.terms["adaptive"].value, p.change)
        for p in own
        if "adaptive" in p.terms and p.change is not None and abs(p.change) <= MODERATE
    ]
    near = [t is not None and abs(t - c) <= max(CLOSE * abs(c), LEAST) for t, c in both]
    return Cell(*_tails(sum(near), len(near)))


def _tails(hits: int, count: int) -> tuple[float, float]:
    """Return how likely so many hits or more are at a rate of `SHARE`, and so many or fewer."""
    weights = [
        math.comb(count, k) * SHARE**k * (1 - SHARE) ** (count - k) for k in range(count + 1)
    ]
    return sum(weights[hits:]), sum(weights[: hits + 1])


def ordered(own: Sequence[Outcome]) -> Cell:
    """Return the case that the prediction's rank correlation lies above `RANK`."""
    rank, count = _rank(own)
    return Cell(1.0, 1.0) if rank is None else above(fisher(rank, count), math.atanh(RANK))


def _rank(own: Sequence[Outcome]) -> tuple[float | None, int]:
    both = [
        (p.prediction["second_order"], p.change)
        for p in own
        if "second_order" in p.prediction and p.change is not None
    ]
    return spearman([a for a, _ in both], [b for _, b in both]), len(both)


def _keeps(chosen: Mapping[str, Outcome | None], evidence: Evidence) -> Check:
    cells = []
    for point in chosen.values():
        if point is not None:
            change = evidence.change((-1.0, [point]), half="B")
            cells.append(above(change, -KEEPS * (point.gap or 0.0)))
    return every(
        "price",
        f"the cheapest code that keeps a pair's model on half A, within {100 * KEEPS:g} % of the"
        " gap, keeps it on half B",
        cells,
    )


def _sentence(
    by: Mapping[str, Sequence[Outcome]], chosen: Mapping[str, Outcome | None], evidence: Evidence
) -> str:
    told = []
    for name in by:
        point = chosen[name]
        size = f"{name} (|delta|/|W| {sizes()[name]:.3f})" if name in sizes() else name
        if point is None:
            told.append(f"{size}: none")
            continue
        change = evidence.change((1.0, [point]), half="B")
        told.append(
            f"{size}: {brief(point)} at {point.bits_per_weight['model']:.2f} bits,"
            f" {100 * change.value / (point.gap or math.nan):+.1f} % of the gap"
        )
    return f"The cheapest code that keeps the model: {'; '.join(told)}."


def _prices(
    by: Mapping[str, Sequence[Outcome]],
    chosen: Mapping[str, Outcome | None],
    evidence: Evidence,
) -> Table:
    rows = []
    for name, own in by.items():
        classes = Counter(p.classed for p in own)
        point, best = chosen[name], min(own, key=lambda p: p.change or 0.0)
        row = [name, f"{sizes().get(name, math.nan):.3f}", f"{own[0].gap or 0.0:.3f}"]
        if point is None:
            row += ["none", "-", "-"]
        else:
            row += [
                brief(point),
                f"{point.bits_per_weight['model']:.2f}",
                _share(evidence.change((1.0, [point]), half="B"), point.gap),
            ]
        row += [
            f"{brief(best)}: {best.change or 0.0:+.4f} ± {best.error or 0.0:.4f}",
            ", ".join(f"{count} {kind}" for kind, count in classes.most_common()),
        ]
        rows.append(row)
    columns = ["pair", "|delta|/|W|", "gap, nats", "cheapest code that keeps it", "bits a weight",
               "loss on half B, of the gap", "least change of all edits", "classes"]  # fmt: skip
    return Table("Which edit keeps the model, at which price", columns, rows)


def _share(change: Mean, gap: float | None) -> str:
    unit = 100 / gap if gap else math.nan
    return f"{unit * change.value:+.1f} ± {abs(unit) * change.error:.1f} %"


def _methods(by: Mapping[str, Sequence[Outcome]]) -> Table:
    """Show every method over all pairs."""
    grouped: dict[str, list[Outcome]] = {}
    for own in by.values():
        for point in own:
            grouped.setdefault(point.edit, []).append(point)
    rows = []
    for edit, own in sorted(grouped.items()):
        classes = Counter(p.classed for p in own)
        off = sorted(
            abs(t - p.change) / max(abs(p.change), LEAST)
            for p in own
            if p.change is not None
            and "adaptive" in p.terms
            and (t := p.terms["adaptive"].value) is not None
        )
        rank, _ = _rank(own)
        bits = [p.bits_per_weight["model"] for p in own if p.bits_per_weight]
        rows.append([
            edit, str(len(own)),
            *(str(classes.get(kind, 0)) for kind in KINDS),
            f"{100 * off[len(off) // 2]:.1g} %" if off else "-",
            "-" if rank is None else f"{rank:.2f}",
            f"{min(bits):.2f} to {max(bits):.2f}" if bits else "-",
            f"{mean([p.seconds or 0.0 for p in own]):.1f}",
        ])  # fmt: skip
    columns = ["edit", "points", *KINDS,
               "term off by (median)", "prediction's Spearman", "bits a weight",
               "seconds"]  # fmt: skip
    return Table("Every method over all pairs", columns, rows)


def _all(name: str, own: Sequence[Outcome], evidence: Evidence) -> Table:
    """Show the edits of a pair, those that cost least first."""
    metric = next(iter(scored(own)), None)
    best = {id(group[0]) for *_, group in front(codes(own, evidence))}
    rows = []
    for p in sorted(own, key=lambda p: p.change or 0.0):
        term = p.terms["adaptive"].value if "adaptive" in p.terms else None
        second = p.prediction.get("second_order")
        rows.append([
            brief(p), p.classed or "-",
            "-" if second is None else f"{second:+.4f}",
            "-" if term is None else f"{term:+.4f}",
            f"{p.change or 0.0:+.4f} ± {p.error or 0.0:.4f}",
            f"{100 * p.metrics[metric]:.1f}" if metric and metric in p.metrics else "-",
            (f"{p.bits_per_weight['model']:.2f}" + " (front)" * (id(p) in best))
            if p.bits_per_weight else "-",
            f"{p.seconds or 0.0:.1f}",
        ])  # fmt: skip
    columns = ["edit", "class", "second order", "term", "measured change", metric or "score",
               "bits a weight", "seconds"]  # fmt: skip
    return Table(f"{name}: every edit", columns, rows)


def _prices_drawn(by: Mapping[str, Sequence[Outcome]], evidence: Evidence) -> Any:
    names = sorted({p.edit for own in by.values() for p in own if p.bits_per_weight})
    drawn, axes = tiles(len(by))
    shown: dict[str, Any] = {}
    for panel, (name, own) in zip(axes, by.items(), strict=True):
        gap = own[0].gap or math.nan
        found = codes(own, evidence)
        for index, edit in enumerate(names):
            mine = [(b, c.value / gap) for b, c, group in found if group[0].edit == edit]
            if mine:
                colour, marker = looks(index)
                look = {"color": colour, "marker": marker, "ms": 4, "ls": "", "alpha": 0.85}
                (line,) = panel.plot([b for b, _ in mine], [c for _, c in mine], **look)
                shown.setdefault(edit, line)
        best = front(found)
        at = [b for b, *_ in best], [c.value / gap for _, c, _ in best]
        panel.step(*at, where="post", color="black", lw=1.1, zorder=1)
        panel.axhline(KEEPS, color="black", lw=0.8, ls=":")
        panel.set_xscale("log", base=2)
        panel.set_yscale("symlog", linthresh=0.01)
        size = f", |delta|/|W| {sizes()[name]:.3f}" if name in sizes() else ""
        panel.set(title=f"{name}{size}", xlabel="true bits a weight", ylabel="loss, of the gap")
    drawn.legend([*shown.values()], [*shown], loc="outside lower center", ncols=5)
    return drawn


def _term_drawn(by: Mapping[str, Sequence[Outcome]]) -> Any:
    edits = sorted({p.edit for own in by.values() for p in own})
    drawn, grid = panels(1, 1, 6.4, 6.0)
    axes = grid[0][0]
    for index, edit in enumerate(edits):
        both = [
            (p.change, p.terms["adaptive"].value)
            for own in by.values()
            for p in own
            if p.edit == edit and p.change is not None and "adaptive" in p.terms
        ]
        colour, marker = looks(index)
        look = {"color": colour, "marker": marker, "ms": 4, "ls": "", "alpha": 0.75, "label": edit}
        axes.plot([c for c, _ in both], [t for _, t in both], **look)
    axes.axline((0, 0), slope=1, color="black", lw=0.8)
    for set_scale in (axes.set_xscale, axes.set_yscale):
        set_scale("symlog", linthresh=1e-3)
    axes.set(xlabel="measured loss change, nats", ylabel="term, nats")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawn
