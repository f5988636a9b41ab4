"""The points that `experiment=merging` would leave, drawn: what is claimed, or one of its nulls."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deltalab.store.record import Outcome
from experiments.merging.checks import FOUR, RANK
from experiments.paper.evidence import CHANGE
from experiments.paper.patterns import Draw
from experiments.paper.simulate import World

EXPERTS = ("a", "b", "c")
SCORE = "t/accuracy"
EXAMPLES = 100
WEIGHTS = (0.3, 1 / 3, 1.0)
NOISE = 0.05
"""Of the loss change of an example, where its mean is measured: .005 nats."""


def merges(
    gains: Sequence[float] = (0.0, 0.04, -0.1, -0.1),
    svc: float = -0.3,
    emr: float = 0.1,
    off: int = 0,
    marked: bool = True,
    prediction: float = 0.99,
    shift: float = 0.6,
    grid: int = 40,
) -> Draw:
    """Return a family of three experts.

    Args:
        gains: of the four methods' scores over task arithmetic's, in expectation.
        svc: how much more the first expert loses by SVC of the sum than by the sum, in nats.
        emr: what the first expert loses by EMR, as a share of what it loses by the mean.
        off: ways whose term is off by a tenth.
        marked: whether all of those are marked.
        prediction: rank correlation of the first expert's prediction with its change.
        shift: of the size of its shift.
        grid: merges beside those that are named.
    """

    def draw(world: World) -> None:
        rng = world.rng
        own = {expert: rng.random(world.count) < world.right for expert in EXPERTS}
        usual = [_edited(world, own, -0.02) for _ in WEIGHTS]
        named: list[tuple[str, Mapping[str, Any], Any, Sequence[float]]] = [
            ("sum", {"weight": w}, s, (c,) * 3) for w, s, c in zip(WEIGHTS, usual, (0.1, 0.12, 0.8),
                                                                   strict=True)
        ]  # fmt: skip
        lost = (0.8 + svc, 0.5, 0.5)
        changes = {"svc": lost, "tsv": (0.3,) * 3, "iso": (0.2,) * 3, "regmean delta": (0.15,) * 3}
        for name, gain in zip(FOUR, gains, strict=True):
            merge, _, gram = name.partition(" ")
            about = {"gram": gram} if gram else {"weight": 1.0}
            named.append((merge, about, _edited(world, own, gain - 0.02), changes[name]))
        named.append(("average", {}, usual[1], (0.4,) * 3))
        named.append(("emr", {}, usual[1], (0.4 * emr, 0.04, 0.04)))
        spread = rng.uniform(0.02, 0.45, (grid, len(EXPERTS)))
        named += [("ties", {"keep": i}, usual[0], tuple(row)) for i, row in enumerate(spread)]
        _add(world, named, off, marked, (prediction, shift))

    return draw


def _edited(world: World, own: Mapping[str, Any], gain: float) -> dict[str, Any]:
    """Return the scores of a merged model's documents: those of the experts, some lost or won."""
    found = {}
    for expert, right in own.items():
        won, lost = max(gain, 0.0) + world.churn, max(-gain, 0.0) + world.churn
        chance = right * (lost / world.right) + ~right * (won / (1 - world.right))
        found[expert] = (right ^ (world.rng.random(world.count) < chance)).astype(float)
    return found


def _add(
    world: World,
    named: Sequence[tuple[str, Mapping[str, Any], Any, Sequence[float]]],
    off: int,
    marked: bool,
    orders: tuple[float, float],
) -> None:
    """Add the points: measured changes with errors, terms, predictions."""
    rng, count = world.rng, len(named)
    examples = [rng.standard_normal(EXAMPLES) * NOISE for _ in EXPERTS]
    means = [[c[e] for *_, c in named] for e in range(len(EXPERTS))]
    said = [_like(rng, row, orders[0] if e == 0 else 0.99) for e, row in enumerate(means)]
    far = [_like(rng, row, orders[1] if e == 0 else 0.6) for e, row in enumerate(means)]
    wrong = set(rng.choice(count, off, replace=False).tolist()) if off else set()
    for index, (merge, settings, scores, changes) in enumerate(named):
        key, experts, documents = f"{len(world.points)}", {}, {}
        for e, name in enumerate(EXPERTS):
            kept = changes[e] + examples[e] + NOISE * rng.standard_normal(EXAMPLES)
            change = float(kept.mean())
            amiss = e == 0 and index in wrong
            term = {"rule": "adaptive", "value": change * (1.1 if amiss else 1.001),
                    "converged": not (amiss and marked)}  # fmt: skip
            experts[name] = {
                "loss": {"change": change, "error": NOISE / math.sqrt(EXAMPLES)},
                "terms": {"adaptive": term},
                "prediction": {"second_order": float(said[e][index])},
                "touched": {"relative_shift": float(far[e][index])},
                "metrics": {SCORE: float(scores[name].mean())},
                "reference": {"post": {SCORE: world.right}},
            }
            documents |= {f"{name}/{CHANGE}": kept, f"{name}/{SCORE}": scores[name]}
        world.documents[key] = documents
        world.points.append(
            Outcome("m", "keep", key=key, merge=merge, merging=settings, experts=experts)
        )


def _like(rng: Any, values: Sequence[float], rank: float) -> Any:
    """Return numbers whose rank correlation with some values is this one in expectation.

    Of two normal numbers of correlation 2 sin(pi rank / 6) it is `rank`; the values take the
    places of the first.
    """
    together = 2 * math.sin(math.pi * rank / 6)
    order = sorted(range(len(values)), key=values.__getitem__)
    normal = sorted(rng.standard_normal(len(values)))
    first = [0.0] * len(values)
    for place, index in enumerate(order):
        first[index] = normal[place]
    other = rng.standard_normal(len(values))
    return [
        together * a + math.sqrt(1 - together**2) * b for a, b in zip(first, other, strict=True)
    ]


NULLS: Mapping[str, tuple[str, Draw]] = {
    "two": ("one of the four is better, the others are exactly two points below",
            merges(gains=(0.04, -0.02, -0.02, -0.02))),
    "better": ("none of the four differs from task arithmetic", merges(gains=(0.0,) * 4)),
    "svc": ("one expert loses as much by SVC of the sum as by the sum", merges(svc=0.0)),
    "emr": ("one expert loses exactly half by EMR", merges(emr=0.5)),
    "term": ("one term is off without a mark", merges(off=1, marked=False)),
    "ranks": ("one expert's prediction has the rank correlation claimed",
              merges(prediction=RANK)),
    "beats": ("one expert's shift ranks as its prediction does",
              merges(prediction=0.97, shift=0.97)),
}  # fmt: skip
