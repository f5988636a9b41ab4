"""The card of `experiment=merging`: scores of all merges, terms and predictions against changes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltalab.drawing import looks, panels
from deltalab.report.outcomes import spearman
from deltalab.report.tables import signed
from deltalab.store.record import Outcome
from experiments.merging.checks import (
    FOUR,
    apart,
    arithmetic,
    by_prediction,
    by_shift,
    checks,
    moderate,
    near,
    ranks,
)
from experiments.merging.families import Family, OfExperts, families, setting
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import Found, Table

PUBLISHED = {
    "average": 66.5, "fisher none": 70.6, "regmean inputs": 82.4, "sum": 68.0, "ties": 72.2,
    "adamerging model": 68.7, "adamerging tensor": 82.6, "regmean delta": 84.5, "iso": 82.8,
}  # fmt: skip
"""Mean accuracy of CLIP ViT-B/32 on eight tasks, %, one zoo of checkpoints (fusion_bench's pages);
regmean delta is WUDI there. Zero-shot it is 48.2, that of the experts themselves 90.3."""

KEPT = ("loss", "terms", "prediction", "touched", "metrics", "reference")
"""What is committed of an expert."""

ACCOUNTS = {
    "first_order": "first order",
    "second_order": "second order",
    "shift": "size of the shift",
}
CAPTION = (
    "Above: of every method, at the setting chosen on half A, the experts' scores on test images as"
    " shares of their own (dots), and their mean (bar). Below: the accurate term (left) and the"
    " second-order prediction (right) against the measured loss change, every expert's way to every"
    " merge; on the diagonal they agree."
)


def merging(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Judge merges of families: scores against task arithmetic, terms and predictions by expert."""
    kept = {} if documents is None else documents  # read when asked for: none has been yet
    found = families(points, kept)
    evidence = Evidence([], OfExperts(kept))
    return Found(
        sentence=" ".join([*(_told(f, evidence) for f in found), _terms_told(found)]),
        checks=checks(found, evidence),
        notes=[NOTE],
        show=lambda: (
            [
                *(_scores(family, evidence) for family in found),
                _terms(found),
                _ranks(found),
            ],
            [("", _figure(found), CAPTION)],
        ),
    )


NOTE = (
    "The setting of a method is the one whose experts lose least on half A of the objective's"
    " examples; scores are of test images, losses of half B. Of task arithmetic the best of three"
    " weights by the score itself is taken to compare with. Fisher, RegMean of inputs and"
    " AdaMerging are fitted to half A: of each there is one setting, and its ways are left out of"
    " ranks."
)


def lighter(point: Outcome) -> Outcome:
    """Return a point without what of its experts no check and no table needs."""
    experts = {name: _light(own) for name, own in point.experts.items()}
    return replace(point, experts=experts)


def _light(own: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: own[name] for name in KEPT if name in own}
    about = ("rule", "points", "value", "error", "converged", "gradient_evaluations", "by_part")
    terms = found.get("terms", {})
    found["terms"] = {r: {k: t[k] for k in about if k in t} for r, t in terms.items()}
    return found


def _told(family: Family, evidence: Evidence) -> str:
    """Say what the methods keep of the experts' scores."""
    rows = {name: family.chosen(name) for name in family.methods}
    best = max(rows, key=lambda name: family.score(rows[name], own=True))
    usual = arithmetic(family)
    told = (
        f"{family.name}: task arithmetic keeps {_percent(family.score(usual, own=True))} of the"
        f" experts' scores ({setting(usual)})"
    )
    others = [n for n in FOUR if n in rows]
    gains = ", ".join(_gain(family, evidence, n, rows[n], usual) for n in others)
    return f"{told}; {gains} points; most is kept by {best}, {_kept(family, rows[best])}."


def _gain(family: Family, evidence: Evidence, name: str, one: Outcome, other: Outcome) -> str:
    gain = apart(family, evidence, one, other)
    return f"{name} {100 * gain.value:+.1f} ± {100 * gain.error:.1f}"


def _kept(family: Family, point: Outcome) -> str:
    return _percent(family.score(point, own=True))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _terms_told(found: Sequence[Family]) -> str:
    """Say how many terms are accurate, and how prediction and shift rank."""
    ways = moderate(found)
    off = [w for w in ways if not near(w)]
    marked = sum(w.terms["adaptive"].converged is False for w in off)
    least = [
        min(_order(f, e, of) for f in found for e in f.experts) for of in (by_prediction, by_shift)
    ]
    return (
        f"The term is accurate on {len(ways) - len(off)} of {len(ways)} ways below half a nat, and"
        f" {marked} of the other {len(off)} carry the mark; the least Spearman correlation of an"
        f" expert is {least[0]:.3f} of the prediction and {least[1]:.3f} of the size of the shift."
    )


def _order(family: Family, expert: str, of: Any) -> float:
    return spearman(*ranks(family, expert, of)) or 0.0


def _scores(family: Family, evidence: Evidence) -> Table:
    """Show every method at its chosen setting, the best first."""
    usual = arithmetic(family)
    rows = []
    for name in family.methods:
        point = family.chosen(name)
        fitted = next(iter(family.ways([point]))).half is not None
        shares = [
            family.of(point, e).metrics[m] / family.of(point, e).reference["post"][m]
            for e, m in family.metric.items()
        ]
        gain = apart(family, evidence, point, usual)
        rows.append([
            name, setting(point), "fitted" if fitted else str(len(family.methods[name])),
            _percent(sum(shares) / len(shares)), _percent(min(shares)),
            f"{100 * gain.value:+.1f} ± {100 * gain.error:.1f}",
            signed(family.change(point, "B")),
            "-" if point.kept is None else f"{point.kept:.2f}",
            f"{PUBLISHED[name]:.1f}" if name in PUBLISHED else "-",
        ])  # fmt: skip
    rows.sort(key=lambda row: -float(row[3].split()[0]))
    columns = ["method", "chosen setting", "of settings", "score, of the experts' own",
               "worst expert", "points above task arithmetic", "loss change, half B",
               "numbers kept", "published, CLIP B/32"]  # fmt: skip
    return Table(f"{family.name}: {len(family.experts)} experts", columns, rows)


def _terms(found: Sequence[Family]) -> Table:
    rows = []
    for family in found:
        for expert in family.experts:
            ways = [family.of(p, expert) for p in family.points]
            under = [w for w in moderate([family]) if w in ways]
            off = [w for w in under if not near(w)]
            errors = sorted(
                abs((w.terms["adaptive"].value or 0.0) - w.change) / abs(w.change)
                for w in under
                if w.change
            )
            marked = sum(w.terms["adaptive"].converged is False for w in off)
            middle = f"{100 * errors[len(errors) // 2]:.2g} %" if errors else "-"
            rows.append([
                family.name, expert, len(ways), len(under), len(under) - len(off), marked, middle,
                f"{max(w.change or 0.0 for w in ways):.3f}",
            ])  # fmt: skip
    columns = ["family", "expert", "ways", "below half a nat", "of them accurate",
               "of the others marked", "median error", "largest change"]  # fmt: skip
    return Table("The term against the measured change of every expert", columns, rows)


def _ranks(found: Sequence[Family]) -> Table:
    rows = []
    for family in found:
        for expert in family.experts:
            orders = {
                "first_order": _order(family, expert, lambda w: w.prediction.get("first_order")),
                "second_order": _order(family, expert, by_prediction),
                "shift": _order(family, expert, by_shift),
            }
            count = len(ranks(family, expert, by_shift)[0])
            rows.append([family.name, expert, count, *(f"{orders[n]:.3f}" for n in ACCOUNTS)])
    title = "Rank correlation with the measured change over all merges that are not fitted"
    return Table(title, ["family", "expert", "merges", *ACCOUNTS.values()], rows)


def _figure(found: Sequence[Family]) -> Any:
    drawn, grid = panels(len(found) + 1, 2, 8.8, 3.2 * len(found) + 3.4)
    for row, family in enumerate(found):
        gs = grid[row][0].get_gridspec()
        for axes in grid[row]:
            axes.remove()
        _bars(drawn.add_subplot(gs[row, :]), family)
    ways = [w for f in found for w in f.ways()]
    for axes, title in zip(grid[-1], ("accurate term", "second-order prediction"), strict=True):
        for index, pair in enumerate(dict.fromkeys(w.pair for w in ways)):
            own = [w for w in ways if w.pair == pair]
            said = [
                w.terms["adaptive"].value if title == "accurate term" else by_prediction(w)
                for w in own
            ]
            colour, marker = looks(index)
            look = {"ls": "", "color": colour, "marker": marker, "ms": 3.5, "alpha": 0.75}
            axes.plot([w.change for w in own], said, label=pair, **look)
        axes.axline((0, 0), slope=1, color="black", lw=0.8)
        for set_scale in (axes.set_xscale, axes.set_yscale):
            set_scale("symlog", linthresh=1e-2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([-1, -0.1, -0.01, 0, 0.01, 0.1, 1], minor=False)
        axes.set(title=title, xlabel="measured change, nats")
    handles, labels = grid[-1][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)))
    return drawn


def _bars(axes: Any, family: Family) -> None:
    """Draw the scores of every method, the best on the left."""
    points = {name: family.chosen(name) for name in family.methods}
    order = sorted(points, key=lambda n: -family.score(points[n], own=True))
    heights = [100 * family.score(points[n], own=True) for n in order]
    axes.bar(range(len(order)), heights, 0.7, color=looks(4)[0], alpha=0.6)
    for index, (expert, metric) in enumerate(family.metric.items()):
        ways = [family.of(points[n], expert) for n in order]
        shares = [100 * w.metrics[metric] / w.reference["post"][metric] for w in ways]
        colour, marker = looks(index)
        axes.plot(range(len(order)), shares, ls="", color=colour, marker=marker, ms=3.5,
                  label=expert)  # fmt: skip
    axes.axhline(100, color="black", lw=0.8)
    axes.set_xticks(range(len(order)), order, rotation=40, ha="right")
    lowest = min(heights)
    axes.set(
        title=family.name, ylabel="score, % of the experts' own", ylim=(max(0, lowest - 25), 118)
    )
    axes.legend(ncols=len(family.experts))
