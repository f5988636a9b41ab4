"""Fig. 6: ExPO's term along the delta."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltalab.drawing import panels
from deltalab.report.tables import signed
from deltalab.statistics.means import Mean
from deltalab.store.fields import plain
from deltalab.store.record import Outcome
from experiments.paper.alpha import by_alpha
from experiments.paper.drawing import curve, zero
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import Cell, Found, Table, above, every, one_pair

PAPER_END = 0.6
"""Where the paper's Fig. 6 ends."""

TITLES = {"left": "paper's term (left, 5)", "gauss": "gauss, 3", "measured": "measured change"}


def expo_term(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check that ExPO's term falls and then rises above 0 (Fig. 6)."""
    by, evidence = by_alpha(one_pair(points)), Evidence(points, documents or {})
    alphas = sorted(by)

    def term(*sides: tuple[float, float]) -> Mean:
        return evidence.change(*((w, [by[a]]) for w, a in sides), rule="left")

    inside = [a for a in alphas if 0 < a <= PAPER_END + 1e-9]
    first, last, between = inside[0], inside[-1], inside[:-1]
    # A minimum inside: some alpha before the end is shown to lie below both ends of the range.
    lower = [max(term((1, last), (-1, a)).above(), term((1, a)).below()) for a in between]
    higher = [term((1, a), (-1, last)).above() for a in between]
    dip = Cell(min(1.0, len(lower) * min(lower)), max(higher))
    checks = [
        every("falls", "the term falls below 0 at first", [above(term((-1, first)))]),
        every("inside", f"its minimum lies inside the paper's range, before {PAPER_END}", [dip]),
        every("rises", f"it is above 0 at alpha = {PAPER_END}", [above(term((1, last)))]),
        every("far", "further out it rises above 0", [above(term((1, alphas[-1])))]),
    ]
    value = {r: [by[a].terms[r].value or 0.0 for a in alphas] for r in ("left", "gauss")}
    value["measured"] = [by[a].change or 0.0 for a in alphas]
    errors = [by[a].error or 0.0 for a in alphas]
    return Found(
        sentence=f"DPO loss over alpha: {_extremes(alphas, value)}.",
        checks=checks,
        notes=["A term's error is the measured change's, which is of the same examples."],
        show=lambda: (
            [_expo_table(alphas, value, errors)],
            [("", _expo_figure(alphas, value), (
                "ExPO's term on the DPO loss of held-out preferences, against alpha."
            ))],
        ),
    )  # fmt: skip


def _extremes(alphas: Sequence[float], value: Mapping[str, Sequence[float]]) -> str:
    """Say of every account where it is lowest and where it rises above 0."""
    low = {name: min(range(len(alphas)), key=v.__getitem__) for name, v in value.items()}
    crossing = {
        n: next((a for a, x in zip(alphas, v, strict=True) if x > 0), None)
        for n, v in value.items()
    }
    return ", ".join(
        f"{name} lowest {signed(v[low[name]])} at alpha = {plain(alphas[low[name]])}, first above 0"
        f" at {plain(crossing[name])}"
        for name, v in value.items()
    )


def _expo_table(
    alphas: Sequence[float], value: Mapping[str, Sequence[float]], errors: Sequence[float]
) -> Table:
    rows = [
        [plain(a), *(signed(v[i]) for v in value.values()), f"{errors[i]:.2g}"]
        for i, a in enumerate(alphas)
    ]
    columns = ["alpha", *TITLES.values(), "its standard error"]
    return Table("Change of the DPO loss, nats", columns, rows)


def _expo_figure(alphas: Sequence[float], value: Mapping[str, Sequence[float]]) -> Any:
    drawn, ((axes,),) = panels(1, 1, 5.6, 3.4)
    for index, (name, v) in enumerate(value.items()):
        curve(axes, alphas, [[x] for x in v], index, TITLES[name])
    zero(axes)
    axes.axvline(PAPER_END, color="#666666", lw=0.8, ls=":")
    axes.text(PAPER_END, 0.97, " paper's range", fontsize=8, va="top",
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(xlabel="alpha", ylabel="DPO loss change, nats")
    axes.legend()
    return drawn
