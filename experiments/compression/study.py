"""The card of `experiment=compression`: loss change over true bits, and a verdict per claim."""

from collections.abc import Sequence
from typing import Any

from deltalab.drawing import looks
from deltalab.statistics.means import Mean
from deltalab.store.record import Outcome
from experiments.compression.checks import Case, bits, cases, checks, spread
from experiments.compression.claims import BUDGETS, CLAIMS, SEEN, WITHIN
from experiments.paper.drawing import tiles
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import Found, Table, pairs

NOTE = (
    "Bits are those of the file, by weight that is edited: numbers in half precision, scales,"
    f" places, and the description of every tensor. A code is of a budget up to {WITHIN} times it."
    " Losses are of half B of the objective's examples; the amount of DBMS was chosen on half A,"
    " all other settings by their bits alone. Scores were not taken."
)
SEEN_NOTE = (
    f"Budgets were compared on half B of {', '.join(SEEN)} while they were made: it is no pair of"
    " the claims about them."
)
CAPTION = (
    "Mean loss change on half B against true bits a weight; the black line joins the Pareto front,"
    " codes that lose less than all that take no more bits. The dotted line is discarding."
)
VARIANTS = {
    ("bitdelta", "axis", "row"): "bitdelta row",
    ("bitdelta", "axis", "column"): "bitdelta column",
    ("bitdelta", "axis", "best"): "bitdelta best axis",
    ("impart", "importance", False): "impart, same rate",
    ("impart", "rescale", False): "impart, not rescaled",
    ("dqrelo", "order", "svd_sign"): "dqrelo, rank first",
    ("delta_dct", "transform", "identity"): "delta_dct, no transform",
}
"""Settings that make another code of an edit."""


def compression(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Judge codes at equal true bits, pair by pair."""
    evidence = Evidence(points, {} if documents is None else documents)
    every = cases(points, evidence)
    return Found(
        sentence=_sentence(points, evidence),
        checks=checks(every),
        notes=[NOTE, SEEN_NOTE],
        show=lambda: (
            [
                _claims(every),
                *(_budgets(name, own, evidence) for name, own in pairs(points).items()),
                _fronts(points, evidence),
            ],
            [("", _figure(points, evidence), CAPTION)],
        ),
    )


def code(point: Outcome) -> str:
    """Name the code of a point: its edit, the ablation, what spreads its bits.

    >>> code(Outcome("m", "bitdelta", {"axis": "row"})), code(Outcome("m", "dare", {"p": 0.5}))
    ('bitdelta row', 'dare')
    """
    name = point.edit
    for (edit, setting, value), told in VARIANTS.items():
        if point.edit == edit and point.settings.get(setting) == value:
            name = told
    return f"{name}, {by}" if (by := spread(point)) else name


Code = tuple[float, Mean, list[Outcome]]
"""True bits, the loss change on half B, and the points, one a seed."""


def codes(own: Sequence[Outcome], evidence: Evidence) -> list[Code]:
    """Return all codes of a pair, those of fewest bits first."""
    groups: dict[str, list[Outcome]] = {}
    for point in own:
        groups.setdefault(point.label, []).append(point)
    found = [(bits(g), evidence.change((1.0, g), half="B"), g) for g in groups.values()]
    return sorted(found, key=lambda each: each[0])


def front(found: Sequence[Code]) -> list[Code]:
    """Return the Pareto front: those that lose less than all that take no more bits."""
    best: list[Code] = []
    for each in sorted(found, key=lambda c: (c[0], c[1].value)):
        if not best or each[1].value < best[-1][1].value:
            best.append(each)
    return best


def _within(found: Sequence[Code], budget: float) -> dict[str, Code]:
    """Return of every code the one of most bits within a budget, and above half of it."""
    most: dict[str, Code] = {}
    for each in found:
        if budget / 2 * WITHIN < each[0] <= budget * WITHIN:
            most[code(each[2][0])] = each
    return most


def _sentence(points: Sequence[Outcome], evidence: Evidence) -> str:
    told = []
    for name, own in pairs(points).items():
        best = []
        for budget in (0.5, 1.0, 2.0):
            if at := _within(codes(own, evidence), budget):
                title, (_, change, _) = min(at.items(), key=lambda each: each[1][1].value)
                best.append(f"{budget:g} {title} {change.value:+.4f}")
        told.append(f"{name} (discarding {own[0].gap or 0.0:+.3f}): {', '.join(best)}")
    return f"Least loss change at a budget of so many bits: {'; '.join(told)}."


def _told(change: Mean) -> str:
    return f"{change.value:+.4f} ± {change.error:.4f}"


def _claims(every: Sequence[Case]) -> Table:
    rows = []
    for case in every:
        claim, (one, other) = CLAIMS[case.name], case.changes
        ratio = f"{one.value / other.value:.2f}" if other.value > 0 else "-"
        shown = case.margin.value / case.margin.error if case.margin.error else 0.0
        rows.append([
            claim.words, case.pair, f"{bits(case.one):.3f}", f"{bits(case.other):.3f}",
            _told(one), _told(other), ratio, f"{claim.times:g}", f"{shown:+.1f}",
            len(case.one), case.counted or "yes",
        ])  # fmt: skip
    columns = ["claim", "pair", "bits, first", "bits, second", "loss change, first",
               "loss change, second", "ratio", "claimed at most", "distance from it in errors",
               "seeds", "counts"]  # fmt: skip
    return Table("Every claim on every pair, half B", columns, rows)


def _budgets(name: str, own: Sequence[Outcome], evidence: Evidence) -> Table:
    """Show what every code loses at every budget, and the bits it takes."""
    found = codes(own, evidence)
    at = {budget: _within(found, budget) for budget in BUDGETS}
    rows = []
    for title in dict.fromkeys(code(each[2][0]) for each in found):
        cells = [
            f"{_told(at[b][title][1])} ({at[b][title][0]:.2f})" if title in at[b] else "-"
            for b in BUDGETS
        ]
        rows.append([title, *cells])
    rows.sort(key=lambda row: str(row[0]))
    title = f"{name}: loss change and true bits by budget; discarding {own[0].gap or 0.0:+.4f}"
    return Table(title, ["code", *(f"{b:g} bits" for b in BUDGETS)], rows)


def _fronts(points: Sequence[Outcome], evidence: Evidence) -> Table:
    rows = [
        [name, f"{size:.3f}", group[0].label, _told(change)]
        for name, own in pairs(points).items()
        for size, change, group in front(codes(own, evidence))
    ]
    return Table("The Pareto front", ["pair", "true bits", "code", "loss change"], rows)


def _figure(points: Sequence[Outcome], evidence: Evidence) -> Any:
    names = sorted({code(p) for p in points})
    by = pairs(points)
    drawn, axes = tiles(len(by))
    shown: dict[str, Any] = {}
    for panel, (name, own) in zip(axes, by.items(), strict=True):
        found, gap = codes(own, evidence), own[0].gap or 0.0
        for index, title in enumerate(names):
            mine = [each for each in found if code(each[2][0]) == title]
            if not mine:
                continue
            colour, marker = looks(index)
            look = {"color": colour, "marker": marker, "ms": 3.5, "lw": 0.8, "alpha": 0.8}
            (line,) = panel.plot([e[0] for e in mine], [e[1].value for e in mine], **look)
            shown.setdefault(title, line)
        best = front(found)
        panel.step(
            [e[0] for e in best], [e[1].value for e in best],
            where="post", color="black", lw=1.2, zorder=1,
        )  # fmt: skip
        panel.axhline(gap, color="black", lw=0.8, ls=":")
        panel.set_xscale("log", base=2)
        panel.set_yscale("symlog", linthresh=1e-3)
        panel.yaxis.set_ticks([-0.1, -0.01, 0, 0.01, 0.1, 1], minor=False)
        panel.set(title=name, xlabel="true bits a weight", ylabel="loss change, nats")
    drawn.legend([*shown.values()], [*shown], loc="outside lower center", ncols=4)
    return drawn
