"""The claims, judged pair by pair on half B of the objective's examples."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltalab.statistics.means import Mean, holm
from deltalab.store.record import Outcome
from experiments.compression.claims import CLAIMS, LEAST, MOST, PAIRS, WITHIN, Claim, Way
from experiments.paper.evidence import Evidence
from experiments.paper.found import LEVEL, Cell, Check, above, every, mean, pairs


@dataclass(frozen=True)
class Case:
    """One claim on one pair.

    Attributes:
        name: of the claim.
        pair: its name.
        one: the points of the first way, one a seed.
        other: of the second.
        changes: mean loss changes of both on half B.
        margin: how much less than so many times the second loses, the first does.
        counted: why it is not counted; empty where it is.
    """

    name: str
    pair: str
    one: Sequence[Outcome]
    other: Sequence[Outcome]
    changes: tuple[Mean, Mean]
    margin: Mean
    counted: str = ""


def bits(points: Sequence[Outcome]) -> float:
    """Return the true bits a weight, payload and metadata, as a mean over seeds.

    >>> bits([Outcome("m", "dare", bits_per_weight={"payload": 1.0, "metadata": 0.5, "model": 9})])
    1.5
    """
    return mean([p.bits_per_weight["payload"] + p.bits_per_weight["metadata"] for p in points])


def spread(point: Outcome) -> str | None:
    """Return by which budget a point's bits are spread over the tensors, None by none."""
    told = point.settings.get("budget")
    return str(told).split()[0] if told else None


def found(own: Sequence[Outcome], way: Way, evidence: Evidence) -> list[Outcome]:
    """Return the points of a way, one a seed; none where a pair lacks it."""
    wanted = way.spread.lower() if way.spread else None
    fitting = [
        p
        for p in own
        if p.edit == way.edit
        and spread(p) == wanted
        and all(p.settings.get(k) == v for k, v in way.settings.items())
        and (way.budget is None or bits([p]) <= WITHIN * way.budget)
    ]
    groups: dict[str, list[Outcome]] = {}
    for point in fitting:
        groups.setdefault(point.label, []).append(point)
    if not groups:
        return []
    if way.chosen:
        return min(groups.values(), key=lambda each: evidence.change((1.0, each), half="A").value)
    return max(groups.values(), key=bits)


def cases(points: Sequence[Outcome], evidence: Evidence) -> list[Case]:
    """Return every claim on every pair that has both ways."""
    return [
        case
        for name, claim in CLAIMS.items()
        for pair, own in pairs(points).items()
        if (case := _case(name, claim, pair, own, evidence)) is not None
    ]


def _case(
    name: str, claim: Claim, pair: str, own: Sequence[Outcome], evidence: Evidence
) -> Case | None:
    one, other = (found(own, way, evidence) for way in (claim.one, claim.other))
    if not one or not other:
        return None
    changes = tuple(evidence.change((1.0, each), half="B") for each in (one, other))
    margin = evidence.change((claim.times, other), (-1.0, one), half="B")
    gap = own[0].gap or 0.0
    counted = ""
    if pair in claim.without:
        counted = "seen before"
    elif claim.fewer and bits(one) > bits(other):
        counted = "more bits"
    elif all(c.value > MOST * gap for c in changes):
        counted = f"both above {MOST:.0%} of discarding"
    elif all(c.value < LEAST * gap for c in changes):
        counted = f"both below {LEAST:.0%} of discarding"
    return Case(name, pair, one, other, (changes[0], changes[1]), margin, counted)


def checks(every_case: Sequence[Case]) -> list[Check]:
    """Return the check of every claim, informative pairs counted alone."""
    return [
        judged(name, claim, [above(c.margin) for c in every_case if c.name == name
                             and not c.counted])
        for name, claim in CLAIMS.items()
    ]  # fmt: skip


def judged(name: str, claim: Claim, cells: Sequence[Cell]) -> Check:
    """Judge one claim by its informative pairs.

    It agrees where `PAIRS` of them are shown to hold, and disagrees where so many are shown not to
    that they cannot be reached, by Holm's correction for their number. With fewer informative pairs
    it is undecided.

    >>> judged("a", CLAIMS["come"], [Cell(0.001, 0.9)] * 3 + [Cell(0.9, 0.001)]).verdict
    'agrees'
    >>> judged("a", CLAIMS["come"], [Cell(0.001, 0.9)] * 2).verdict
    'undecided'
    >>> judged("a", CLAIMS["spread_come"], [Cell(0.001, 0.9)] * 3 + [Cell(0.9, 0.01)]).verdict
    'disagrees'
    """
    if claim.all:
        return every(name, f"{claim.words}, on every informative pair", cells)
    held = sum(p <= LEVEL for p in holm([c.holds for c in cells]))
    failed = sum(p <= LEVEL / 2 for p in holm([c.fails for c in cells]))
    worse = claim.none_worse and any(c.fails <= LEVEL / 2 for c in cells)
    kind = "undecided"
    if len(cells) >= PAIRS:
        if worse or len(cells) - failed < PAIRS:
            kind = "disagrees"
        elif held >= PAIRS:
            kind = "agrees"
    words = f"{claim.words}, on {PAIRS} pairs" + " and more on none" * claim.none_worse
    return Check(name, words, kind, held, failed, len(cells))
