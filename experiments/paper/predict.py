"""Study: what one pass at the post-trained model predicts, for all edits of all pairs."""

from collections.abc import Sequence
from typing import Any

from deltalab.drawing import looks, panels
from deltalab.report.outcomes import spearman
from deltalab.store.record import Outcome
from experiments.paper.evidence import Documents
from experiments.paper.found import Check, Found, Table, every, nearer, pairs

ACCOUNTS = {
    "first_order": "first order",
    "second_order": "second order",
    "closed_form": "closed form (random edits)",
    "adaptive": "Riemann term (adaptive)",
}
FIRST, SECOND = ("second_order", "first_order"), ("adaptive", "second_order")
"""What the checks compare: an account and a cheaper one."""

LEAST, MODERATE = 1e-3, 0.5


def predict(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Compare first order, second order, closed form and the term with the measured change."""
    rows = [_row("all", points, name) for name in ACCOUNTS]
    for model, own in pairs(points).items():
        rows += [_row(model, own, name) for name in ACCOUNTS]
    told = "; ".join(f"{row[1]} Spearman {row[3]}, sign right on {row[4]}, median error {row[5]}"
                     for row in rows[: len(ACCOUNTS)])  # fmt: skip
    heads = ["pair", "account", "points", "Spearman", "right sign", "median error", "9 of 10 below"]
    caption = (
        "Predicted against measured loss change of every edit of every pair, in nats. On the"
        " diagonal they agree."
    )
    return Found(
        sentence=f"{len(points)} edits of {len(pairs(points))} pairs: {told}.",
        checks=[_check(points, *pair) for pair in (FIRST, SECOND)],
        notes=[
            f"Errors are relative, of changes of {LEAST} to {MODERATE} nats; ranks and signs are of"
            " all points that move the loss. First and second order come from the gradient and one"
            " Hessian product at the post-trained model; the closed form needs no edit at all and"
            " predicts the mean over all random draws, here set beside one draw."
        ],
        show=lambda: (
            [Table("Predictions against the measured change", heads, rows)],
            [("", _figure(points), caption)],
        ),
    )


def _check(points: Sequence[Outcome], better: str, worse: str) -> Check:
    """Check that one account is nearer to the measured change than another, in every pair."""
    cells = []
    for own in pairs(points).values():
        both = [p for p in own if {better, worse} <= p.terms.keys()]
        known = [
            (a, b, p.change)
            for p in both
            if (a := p.terms[better].value) is not None and (b := p.terms[worse].value) is not None
        ]
        cells.append(nearer([(abs(a - c), abs(b - c)) for a, b, c in known if c]))
    claim = (
        f"{ACCOUNTS[better]} is nearer to the measured change than {ACCOUNTS[worse]}, pair by pair"
    )
    return every(better, claim, cells)


def _both(points: Sequence[Outcome], name: str) -> list[tuple[float, float]]:
    found = [(p.terms[name].value, p.change) for p in points if name in p.terms]
    return [(v, c) for v, c in found if v is not None and c is not None and c != 0]


def _row(title: str, points: Sequence[Outcome], name: str) -> list[str]:
    both = _both(points, name)
    ranks = spearman([v for v, _ in both], [c for _, c in both])
    errors = sorted(abs(v - c) / abs(c) for v, c in both if LEAST <= abs(c) < MODERATE)
    at = [
        f"{100 * errors[round(q * (len(errors) - 1))]:.2g} %" if errors else "-" for q in (0.5, 0.9)
    ]
    right = sum(v * c > 0 for v, c in both)
    order = "-" if ranks is None else f"{ranks:.3f}"
    return [title, ACCOUNTS[name], str(len(both)), order, f"{right} of {len(both)}", *at]


def _figure(points: Sequence[Outcome]) -> Any:
    drawn, grid = panels(1, len(ACCOUNTS), 3.1 * len(ACCOUNTS), 3.4)
    for axes, (name, title) in zip(grid.flat, ACCOUNTS.items(), strict=True):
        for index, (model, own) in enumerate(pairs(points).items()):
            both = _both(own, name)
            colour, marker = looks(index)
            look = {"ls": "", "color": colour, "marker": marker, "ms": 3.5, "alpha": 0.75}
            axes.plot([c for _, c in both], [v for v, _ in both], label=model, **look)
        axes.axline((0, 0), slope=1, color="black", lw=0.8)
        for set_scale in (axes.set_xscale, axes.set_yscale):
            set_scale("symlog", linthresh=1e-3)
        axes.set(title=title, xlabel="measured change")
    grid.flat[0].set_ylabel("prediction")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)))
    return drawn
