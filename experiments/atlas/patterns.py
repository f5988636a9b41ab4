"""The points that `experiment=atlas` would leave, drawn: its pattern, or a null of one check."""

import math
from collections.abc import Mapping

from deltalab.store.record import Outcome
from deltalab.store.terms import Term
from experiments.atlas.study import KEEPS, RANK, SHARE
from experiments.paper.evidence import CHANGE
from experiments.paper.patterns import Draw
from experiments.paper.simulate import World

EDITS, CODES, EXAMPLES = 60, 12, 256
SPREAD = 1 / 7
"""Of the loss change over examples, beside a gap of 1."""


def edits(near: float = 0.995, rank: float = 0.97, cost: float = 0.0) -> Draw:
    """Return three pairs of 60 edits, of which the arguments are the first's.

    Args:
        near: the share of its edits whose term is close.
        rank: the rank correlation of the prediction with the change.
        cost: what its 12 codes cost, a share of the gap.
    """

    def draw(world: World) -> None:
        for model in ("m", "n", "o"):
            own = (near, rank, cost) if model == "m" else (0.995, 0.97, 0.0)
            _pair(world, model, *own)

    return draw


def _pair(world: World, model: str, near: float, rank: float, cost: float) -> None:
    slope = 2 * math.sin(math.pi * rank / 6)
    for place in range(EDITS + CODES):
        coded = place >= EDITS
        seen = SPREAD * world.rng.standard_normal(EXAMPLES)
        change = 0.1 * world.rng.standard_normal()
        key = f"{len(world.points)}"
        if coded:
            seen += cost
            change = float(seen.mean())
            world.documents[key] = {CHANGE: seen}
        off = 0.0 if world.rng.random() < near else 1.0
        told = slope * change + math.sqrt(1 - slope**2) * 0.1 * world.rng.standard_normal()
        world.points.append(
            Outcome(
                model,
                "bitdelta" if coded else "dare",
                {"place": place},
                key=key,
                change=change,
                gap=1.0,
                terms={} if coded else {"adaptive": Term("adaptive", None, change + off)},
                prediction={} if coded else {"second_order": told},
                bits_per_weight={"model": 1.0 + 0.1 * place} if coded else {},
            )
        )


NULLS: Mapping[str, tuple[str, Draw]] = {
    "term": (f"in one pair the term is close on exactly {SHARE:g} of the edits", edits(near=SHARE)),
    "prediction": ("in one pair the rank correlation is exactly the bound", edits(rank=RANK)),
    "price": (f"every code of one pair costs exactly {KEEPS:g} of the gap", edits(cost=KEEPS)),
}
