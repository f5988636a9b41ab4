"""Study: how many magnitude bits does BitDelta take until nothing is left to gain?

In theory 2^b levels of equal width leave an error of a uniform distribution over a step, so that
every bit halves it: |E| ~ 2^-b. Levels of equal count leave the largest magnitudes coarse, so that
the error falls more slowly. The loss, to second order, falls with the square.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from deltalab.drawing import looks
from deltalab.statistics.means import Mean
from deltalab.store.record import Outcome
from experiments.paper.drawing import tiles
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    Found,
    Table,
    above,
    every,
    grouped,
    mean,
    pairs,
    scored,
    spread,
)

FOUR, MOST, FIRST = 4, 8, 2
HALVED = 0.8
"""The least fall of log2 |E| per bit that still counts as halving."""

MARGIN = 0.02
"""What counts as no loss, a share of the pre-to-post gap."""

BLOCKS = {"equal_width": "equal width", "equal_count": "equal count"}
Ladder = Mapping[int, Outcome]
"""The points of one pair and one kind of blocks by their bits."""


def saturation(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Ask for the error by theory, for the loss at four bits, and for what further bits gain."""
    evidence = Evidence(points, {} if documents is None else documents)
    by = {name: ladders(own) for name, own in pairs(points).items()}
    wide = {name: kinds["equal_width"] for name, kinds in by.items() if "equal_width" in kinds}
    gaps = {name: own[FOUR].gap or math.nan for name, own in wide.items()}
    checks = [
        every(
            "rate",
            f"every bit beyond {FIRST} halves the error of blocks of equal width, pair by pair:"
            f" log2 of it falls by more than {HALVED:g}",
            [above(falls(own), HALVED) for own in wide.values()],
        ),
        every(
            "enough",
            f"four bits in blocks of equal width lose less than {100 * MARGIN:g} % of the gap",
            [
                above(evidence.change((-1.0, [own[FOUR]])), -MARGIN * gaps[name])
                for name, own in wide.items()
            ],
        ),
        every(
            "saturated",
            f"eight bits gain less than {100 * MARGIN:g} % of the gap over four",
            [
                above(
                    evidence.change((1.0, [own[MOST]]), (-1.0, [own[FOUR]])), -MARGIN * gaps[name]
                )
                for name, own in wide.items()
            ],
        ),
    ]
    rows = [
        _row(name, kind, own) for name, kinds in by.items() for kind, own in sorted(kinds.items())
    ]
    told = "; ".join(f"{r[0]}, {r[1]}: {r[2]} bits" for r in rows)
    return Found(
        sentence="Bits from which on the loss stays within two per cent of the gap of post's:"
        f" {told}.",
        checks=checks,
        notes=[
            "The error is |shift| / |delta| as stored: in half precision it has a floor, at which"
            " further bits change nothing. A step counts as up where one bit more loses more, by"
            " the mean alone: on the flat part that is chance.",
        ],
        show=lambda: ([_table(rows)], [("", _figure(by), CAPTION)]),
    )


CAPTION = (
    "Relative error |E|/|D| (solid) and loss change as a share of the pre-to-post gap (dashed, by"
    " magnitude) against magnitude bits; the grey line halves per bit."
)


def ladders(own: Sequence[Outcome]) -> dict[str, dict[int, Outcome]]:
    """Return the points of a pair by kind of blocks and bits."""
    found: dict[str, dict[int, Outcome]] = {}
    for (kind, bits), same in grouped(own, "blocks", "bits").items():
        found.setdefault(str(kind), {})[int(bits)] = same[0]
    return found


def falls(own: Ladder) -> Mean:
    """Return by how much log2 of the error falls per bit, from `FIRST` to `MOST` bits.

    Its error is that of the steps' mean: they differ as the largest magnitudes do.
    """
    errors = [own[b].relative_shift or math.nan for b in range(FIRST, MOST + 1)]
    steps = [math.log2(one / next_) for one, next_ in pairwise(errors)]
    return Mean(mean(steps), spread(steps) / math.sqrt(len(steps)), len(steps) - 1)


def _row(name: str, kind: str, own: Ladder) -> list[str]:
    bits, gap = sorted(own), own[FOUR].gap or math.nan
    lost = {b: (own[b].change or 0.0) / gap for b in bits}
    flat = next((b for b in bits if all(lost[c] <= MARGIN for c in bits if c >= b)), None)
    ups = sum(lost[b] > lost[a] for a, b in pairwise(bits))
    fall = falls(own)
    metric = next(iter(scored([*own.values()])), None)
    score = [f"{100 * own[b].metrics[metric]:.1f}" if metric else "-" for b in (0, FOUR, MOST)]
    return [
        name, BLOCKS[kind], "more" if flat is None else str(flat),
        f"{fall.value:.2f} ± {fall.error:.2f}",
        *(f"{own[b].relative_shift or 0.0:.4f}" for b in (0, 1, 2, FOUR, 6, MOST)),
        *(f"{100 * lost[b]:+.2f}" for b in (0, 1, 2, FOUR, 6, MOST)),
        f"{ups} of {len(bits) - 1}", " / ".join(score),
    ]  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> Table:
    shown = (0, 1, 2, FOUR, 6, MOST)
    columns = ["pair", "blocks", "bits until flat", "log2 of the error falls per bit",
               *(f"|E|/|D|, b = {b}" for b in shown),
               *(f"loss, % of the gap, b = {b}" for b in shown),
               "steps up", "score, %, b = 0 / 4 / 8"]  # fmt: skip
    return Table("Error and loss by magnitude bits", columns, rows)


def _figure(by: Mapping[str, Mapping[str, Ladder]]) -> Any:
    drawn, grid = tiles(len(by))
    for axes, (name, kinds) in zip(grid, by.items(), strict=True):
        for index, kind in enumerate(BLOCKS):
            own = kinds.get(kind, {})
            bits, (colour, marker) = sorted(own), looks(index)
            look = {"color": colour, "marker": marker, "ms": 3.5, "lw": 1.0}
            errors = [own[b].relative_shift for b in bits]
            lost = [abs(own[b].change or 0.0) / (own[b].gap or math.nan) for b in bits]
            axes.plot(bits, errors, label=f"error, {BLOCKS[kind]}", **look)
            axes.plot(bits, lost, label=f"loss, {BLOCKS[kind]}", ls="--", **look)
        axes.plot([0, MOST], [0.6, 0.6 * 2.0**-MOST], color="#999999", lw=0.8)
        axes.axhline(MARGIN, color="black", lw=0.8, ls=":")
        axes.set(title=name, xlabel="magnitude bits", yscale="log")
        axes.set_ylim(1e-5, 2)
    handles, labels = grid[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4)
    return drawn
