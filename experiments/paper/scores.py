"""Study: does the loss change, or the term that tells it beforehand, order the scores?

The paper reads scores off losses. Here every pair and task is asked by itself, over all its points:
how well are the scores of edits ordered by their measured change and by the term, is there an order
among edits that hardly change the score, and how much of the score is a function of the loss.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltalab.drawing import looks, panels
from deltalab.report.outcomes import spearman
from deltalab.statistics.means import Mean
from deltalab.store.record import Outcome
from experiments.paper.drawing import one_legend
from experiments.paper.evidence import Documents
from experiments.paper.found import (
    Check,
    Found,
    Table,
    above,
    end,
    every,
    fisher,
    mean,
    pairs,
    scored,
)

LEAST = 0.5
"""The rank correlation above which a loss is said to order scores."""

ROOM = 0.01
"""A score this near to the highest possible, or to the lowest of its task, has no room."""

FEWEST = 12
"""Settings below which no rank correlation is judged."""

NEARBY = 0.05
"""Settings that lose or gain at most so much are asked for an order among themselves, too."""

ACCOUNTS = {"change": "measured change", "adaptive": "term"}


@dataclass(frozen=True)
class Place:
    """The points of one setting of an edit, means over its draws: accounts of the loss, score."""

    edit: str
    accounts: Mapping[str, float]
    score: float
    lost: float


def scores(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Rank scores by the loss change and by what approximates it, for every pair and task."""
    found: dict[tuple[str, str], list[Place]] = {}
    for pair, own in pairs(points).items():
        for metric in scored(own):
            if len(places := _places(own, metric)) >= FEWEST:
                found[pair, metric] = places
    tasks = {where: roomy(places) for where, places in found.items()}
    tasks = {where: places for where, places in tasks.items() if len(places) >= FEWEST}
    rows = [_row(where, found[where], places) for where, places in tasks.items()]
    told = "; ".join(f"{r[0]}, {r[1]} {r[5]} ({r[3]} settings)" for r in rows)
    caption = (
        "Score lost against measured loss change, one mark a setting (mean over draws), for every"
        " pair and task. Grey: settings whose scores have no room."
    )
    return Found(
        sentence=f"Rank correlation of the measured loss change with the score lost: {told}.",
        checks=[
            _check("loss", "the measured loss change", "change", tasks.values()),
            _check("term", "the term", "adaptive", tasks.values()),
        ],
        notes=[
            f"A setting has no room where its score lies within {ROOM:g} of 1 or of the task's"
            f" lowest; tasks with fewer than {FEWEST} that have some are left out. The last two"
            " columns count all settings: what share of the score's variance an increasing function"
            " of the loss explains (isotonic regression, fitted to the same points), and how far"
            " scores lie from it. Where much is explained and the rank correlation is low, the"
            " loss tells what a destructive edit costs, and not which of the harmless ones is"
            " better: the differences of those are of the size of the documents' chance. Points are"
            " those committed for the paper's artefacts, each once."
        ],
        show=lambda: (
            [Table("Does the loss order the scores?", [
                "pair", "task", "settings", "with room", "most lost",
                *(f"Spearman of the {title}" for title in ACCOUNTS.values()),
                f"within {100 * NEARBY:.0f} points of post", "variance explained", "off by, points",
            ], rows)],
            [("", _figure(found), caption)],
        ),
    )  # fmt: skip


def _places(points: Sequence[Outcome], metric: str) -> list[Place]:
    """Return a pair's settings that have this score, means over the draws."""
    groups: dict[Any, list[Outcome]] = {}
    for p in points:
        if p.change is not None and metric in p.metrics:
            groups.setdefault((p.edit, repr(sorted(p.settings.items())), p.select), []).append(p)
    post = end(points, "post", metric)
    return [
        Place(
            own[0].edit,
            {name: value for name in ACCOUNTS if (value := _account(own, name)) is not None},
            mean([p.metrics[metric] for p in own]),
            post - mean([p.metrics[metric] for p in own]),
        )
        for own in groups.values()
    ]


def _account(points: Sequence[Outcome], name: str) -> float | None:
    """Return the mean of one account of the loss change, None where a draw lacks it."""
    known = [
        p.change if name == "change" else p.terms[name].value if name in p.terms else None
        for p in points
    ]
    values = [v for v in known if v is not None]
    return mean(values) if values and len(values) == len(known) else None


def roomy(places: Sequence[Place]) -> list[Place]:
    """Leave out settings whose scores lie at either end."""
    lowest = min(p.score for p in places)
    return [p for p in places if lowest + ROOM < p.score < 1 - ROOM]


def ordered(places: Sequence[Place], account: str) -> Mean | None:
    """Return the rank correlation of an account with the score lost, through Fisher's transform.

    None: too few settings have the account.
    """
    both = [(p.accounts[account], p.lost) for p in places if account in p.accounts]
    rank = spearman([a for a, _ in both], [b for _, b in both])
    if rank is None or len(both) < FEWEST:
        return None
    return fisher(rank, len(both))


def _check(name: str, what: str, account: str, tasks: Iterable[Sequence[Place]]) -> Check:
    ranks = [ordered(places, account) for places in tasks]
    cells = [above(rank, math.atanh(LEAST)) for rank in ranks if rank is not None]
    return every(
        name,
        f"{what} orders the scores, task by task: a rank correlation above {LEAST:g} with the score"
        " lost",
        cells,
    )


def explained(places: Sequence[Place]) -> tuple[float, float]:
    """Return which share of the lost scores' variance an increasing function of the change explains.

    Returns:
        the share; and the residuals' standard deviation.

    >>> line = [Place("dare", {"change": x}, 1 - x, x) for x in (0.0, 0.1, 0.2, 0.4)]
    >>> explained(line)
    (1.0, 0.0)
    """  # noqa: E501
    from scipy.optimize import isotonic_regression

    by_change = sorted(places, key=lambda p: p.accounts["change"])
    lost = np.array([p.lost for p in by_change])
    off = lost - isotonic_regression(lost).x
    total = float(lost.var())
    return (1 - float(off.var()) / total if total else math.nan), float(off.std())


def _row(where: tuple[str, str], all_places: Sequence[Place], places: Sequence[Place]) -> list[str]:
    ranks = [ordered(places, name) for name in ACCOUNTS]
    share, off = explained(all_places)
    return [
        *where,
        str(len(all_places)),
        str(len(places)),
        f"{100 * max(abs(p.lost) for p in all_places):.0f} points",
        *map(_told, ranks),
        _told(ordered([p for p in places if abs(p.lost) <= NEARBY], "change")),
        f"{100 * share:.0f} %",
        f"{100 * off:.1f}",
    ]


def _told(rank: Mean | None) -> str:
    return "-" if rank is None else f"{math.tanh(rank.value):.2f}"


def _figure(found: Mapping[tuple[str, str], Sequence[Place]]) -> Any:
    columns = 3
    rows = -(-len(found) // columns)
    drawn, grid = panels(rows, columns, 3.1 * columns, 2.6 * rows + 0.4)
    edits = list(dict.fromkeys(p.edit for places in found.values() for p in places))
    for axes, (where, places) in zip(grid.flat, found.items(), strict=False):
        inside = set(map(id, roomy(places)))
        for index, edit in enumerate(edits):
            colour, marker = looks(index)
            own = [p for p in places if p.edit == edit]
            colours = [colour if id(p) in inside else "#bbbbbb" for p in own]
            at = [p.accounts["change"] for p in own], [100 * p.lost for p in own]
            axes.scatter(*at, c=colours, marker=marker, s=10, alpha=0.8)
            axes.scatter([], [], c=colour, marker=marker, s=14, label=edit)
        axes.set_xscale("symlog", linthresh=1e-2)
        axes.set(title="\n".join(where), xlabel="measured loss change, nats")
    for axes in grid[:, 0]:
        axes.set_ylabel("score lost, points")
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    one_legend(drawn, grid[0][0], 7)
    return drawn
