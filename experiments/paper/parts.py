"""Fig. 3: the paper's term of every method, in total and by part of the model."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from deltalab.drawing import HATCHES, looks, panels
from deltalab.report.tables import signed
from deltalab.statistics.means import Mean
from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome
from experiments.paper.drawing import curve, zero
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import LEVEL, Cell, Found, Table, above, every, mean, one_pair

RATES = {"dare": "DARE", "drop_only": "drop only", "ties": "TIES"}
ALONE = {"bitdelta": "BitDelta", "twin": "Twin, rate .9"}
MIDDLE = 0.5
"""The drop rate whose terms are split by part."""

SMALL = 0.1
"""DARE's term is small where it is below this share of drop-only's."""

ERRORS = (
    "A term is an account of the change on the same examples: its error is the measured change's,"
    " and of random edits the draws' too."
)
CAPTION = (
    "Left: the term against the drop rate, by the paper's rule (solid) and by Gauss's with three"
    " nodes (dashed), mean and standard deviation over the seeds. Right: the paper's term by part"
    f" of the model, at drop rate {MIDDLE:g} where there is one."
)
LINEAR = 1e-4
"""Below this the figure's axis is linear, in nats."""

By = dict[str, dict[float, list[Outcome]]]


def terms(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check the order of the methods' terms, by the paper's own rule."""
    by, evidence = _by_rate(one_pair(points)), Evidence(points, documents or {})
    rates = sorted(by["dare"])
    value = {edit: [mean(_values(by[edit][p], "left")) for p in rates] for edit in RATES}
    alone = {e: [p for p in points if p.edit == e] for e in ALONE}

    def term(*sides: tuple[float, Sequence[Outcome]]) -> Mean:
        return evidence.change(*sides, rule="left")

    dare, drop, ties = ([by[edit][p] for p in rates] for edit in ("dare", "drop_only", "ties"))
    both = list(zip(dare, drop, strict=True))
    checks = [
        every("small", "DARE's term is below a tenth of drop-only's", [
            _within(term((SMALL, o), (-1, d)), term((SMALL, o), (1, d))) for d, o in both]),
        every("positive", "BitDelta's and Twin's terms are above 0",
              [above(term((1, same))) for same in alone.values()]),
        every("grows", "the term of TIES grows with the drop rate", [_grows(term, ties)]),
        every("above", "drop-only's term is above DARE's",
              [above(term((1, o), (-1, d))) for d, o in both]),
    ]  # fmt: skip
    ends = ", ".join(f"{RATES[e]} {signed(v[0])} to {signed(v[-1])}" for e, v in value.items())
    single = {ALONE[e]: mean(_values(same, "left")) for e, same in alone.items()}
    sentence = (
        f"Paper's term from p = {rates[0]:g} to {rates[-1]:g}: {ends}; "
        + ", ".join(f"{title} {signed(v)}" for title, v in single.items())
        + " nats a token."
    )
    over = [
        f"DARE's {signed(v)} at p = {p:g} is not below {title}'s {signed(other)}"
        for p, v in zip(rates, value["dare"], strict=True)
        for title, other in single.items()
        if v >= other
    ]
    order = "; ".join(over) or "DARE's term is below BitDelta's and Twin's at every p"
    return Found(
        sentence=sentence,
        checks=checks,
        notes=[f"Not checked, and not claimed: {order}.", _rules(points), ERRORS],
        show=lambda: (
            [_table(by, rates, points), _parts_table(by, points)],
            [("", _figure(by, rates, points), CAPTION)],
        ),
    )


def _within(*sides: Mean) -> Cell:
    """Return the case that a value lies within bounds, both distances being above 0."""
    cells = [above(side) for side in sides]
    return Cell(max(c.holds for c in cells), min(1.0, len(cells) * min(c.fails for c in cells)))


def _grows(term: Callable[..., Mean], series: Sequence[Sequence[Outcome]]) -> Cell:
    """Return the case that a series grows: from its first to its last, and never shown to fall."""
    steps = [term((1, b), (-1, a)).below() for a, b in pairwise(series)]
    fall = min(1.0, len(steps) * min(steps))
    rise = above(term((1, series[-1]), (-1, series[0])))
    return Cell(1.0 if fall <= LEVEL else rise.holds, min(1.0, 2 * min(fall, rise.fails)))


def _by_rate(points: Sequence[Outcome]) -> By:
    """Group points by edit and drop rate; TIES gives what it keeps."""
    by: By = {edit: {} for edit in RATES}
    for point in points:
        if point.edit in RATES:
            kept = number(point.settings.get("keep"))
            rate = number(point.settings.get("p")) if kept is None else round(1 - kept, 6)
            by[point.edit].setdefault(rate or 0.0, []).append(point)
    return by


def _values(points: Sequence[Outcome], rule: str) -> list[float]:
    return [v for p in points if rule in p.terms and (v := p.terms[rule].value) is not None]


def _rules(points: Sequence[Outcome]) -> str:
    """Say how far both rules are from the measured change."""
    told = []
    for rule, title in (("left", "the paper's rule"), ("gauss", "Gauss's")):
        pairs = [(p.terms[rule].value, p.change) for p in points if rule in p.terms and p.change]
        signs = sum(v * c > 0 for v, c in pairs if v is not None)
        gaps = sorted(abs(v - c) / abs(c) for v, c in pairs if v is not None)
        middle = f"{100 * gaps[len(gaps) // 2]:.2g} %"
        told.append(
            f"{title} is off by {middle} (median), its sign right on {signs} of {len(pairs)}"
        )
    return "Against the measured change " + "; ".join(told) + "."


def _table(by: By, rates: Sequence[float], points: Sequence[Outcome]) -> Table:
    rows: list[list[Any]] = []
    for edit, title in RATES.items():
        rows += [[f"{title}, p = {plain(p)}", *_accounts(by[edit][p])] for p in rates]
    for edit, title in ALONE.items():
        rows.append([title, *_accounts([p for p in points if p.edit == edit])])
    return Table("Term and change, nats a token", ["edit", "left, 5", "gauss, 3", "measured"], rows)


def _accounts(same: Sequence[Outcome]) -> list[str]:
    change = [p.change for p in same if p.change is not None]
    return [signed(mean(_values(same, rule))) for rule in ("left", "gauss")] + [
        signed(mean(change))
    ]


def _split(by: By, points: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Return the paper's term of every method by part, means over the seeds."""
    shown = {f"{RATES[e]}, p = {MIDDLE:g}": by[e].get(MIDDLE, []) for e in RATES}
    shown |= {title: [p for p in points if p.edit == edit] for edit, title in ALONE.items()}
    split: dict[str, dict[str, float]] = {}
    for title, same in shown.items():
        names = dict.fromkeys(n for p in same for n, v in p.terms["left"].by_part.items() if v)
        split[title] = {n: mean([p.terms["left"].by_part.get(n, 0.0) for p in same]) for n in names}
    return split


def _parts_table(by: By, points: Sequence[Outcome]) -> Table:
    split = _split(by, points)
    names = list(dict.fromkeys(name for parts in split.values() for name in parts))
    rows = [[title, *(signed(parts.get(n)) for n in names)] for title, parts in split.items()]
    return Table("The paper's term by part of the model", ["edit", *names], rows)


def _figure(by: By, rates: Sequence[float], points: Sequence[Outcome]) -> Any:
    drawn, ((left, right),) = panels(1, 2, 9.6, 3.6)
    for index, (edit, title) in enumerate(RATES.items()):
        for rule, style in (("left", "-"), ("gauss", "--")):
            values = [_values(by[edit][p], rule) for p in rates]
            name = title if rule == "left" else f"_{title}"
            curve(left, rates, values, index, name, ls=style)
    for index, (edit, title) in enumerate(ALONE.items(), len(RATES)):
        height = mean(_values([p for p in points if p.edit == edit], "left"))
        left.axhline(height, color=looks(index)[0], lw=1.3, ls="-.", label=title)
    zero(left)
    left.set_yscale("symlog", linthresh=LINEAR)
    left.set(xlabel="drop rate", ylabel="term, nats a token")
    left.legend()
    split = _split(by, points)
    names = list(dict.fromkeys(name for parts in split.values() for name in parts))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        heights = [parts.get(name, 0.0) for parts in split.values()]
        places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(split))]
        right.bar(places, heights, width, color=looks(index)[0], label=name,
                  hatch=HATCHES[index % len(HATCHES)], edgecolor="white", lw=0.4)  # fmt: skip
    zero(right)
    right.set_yscale("symlog", linthresh=LINEAR)
    right.set_xticks(range(len(split)), [title.replace(", ", "\n") for title in split])
    right.set(ylabel="term, nats a token")
    right.legend()
    return drawn
