"""The points that `experiment=sotu` would leave, drawn: what is claimed, or one of its nulls."""

from collections.abc import Mapping
from typing import Any

from deltalab.store.record import Outcome
from experiments.paper.found import NEAR
from experiments.paper.patterns import Draw
from experiments.paper.simulate import World
from experiments.sotu.study import CLOSE, DROPPED, LEARNED, SCORE

SEEDS = 5
ERROR = 0.001
"""Standard error of a cosine and of the share of collisions, of one draw."""


def stream(
    masked: float = 0.6,
    sum_: float = 0.5,
    frozen: float = 0.53,
    sequence: float = 0.53,
    forgotten: tuple[float, float] = (0.05, 0.25),
    off: float = 0.0,
    touching: float = 0.0,
) -> Draw:
    """Return a stream under one head.

    Args:
        masked: accuracy at the end of masked deltas, in expectation.
        sum_: of the unmasked sum.
        frozen: of the frozen base.
        sequence: of sequential fine-tuning.
        forgotten: what masks forget, and what sequential fine-tuning does.
        off: how far one cosine is from its closed form, in expectation.
        touching: a cosine of deltas whose masks are disjoint.
    """

    def draw(world: World) -> None:
        kept = {"edit": "keep"}
        drop = {"edit": "drop_only", "settings": {"p": DROPPED}}
        apart = {"edit": "drop_only", "settings": {"p": DROPPED, "masks": "disjoint"}}
        hard = world.rng.random(world.count)
        for seed in range(SEEDS):
            _add(world, hard, seed, masked, forgotten[0], _overlap(world, off), **drop)
            _add(world, hard, seed, masked, forgotten[0], _apart(touching), **apart)
        for weight, score in ((1.0, sum_), (0.0, frozen)):
            _add(world, hard, 0, score, 0.1, {}, merging={"weight": weight}, **kept)
        _add(world, hard, 0, sequence, forgotten[1], {}, backbone="own", **kept)

    return draw


def _add(
    world: World,
    hard: Any,
    seed: int,
    score: float,
    forgotten: float,
    overlap: Mapping[str, Any],
    backbone: str = "merged",
    edit: str = "keep",
    **more: Any,
) -> None:
    """Add a point: half of what decides an image is how hard it is, half is the draw's."""
    key = f"{len(world.points)}"
    own = world.rng.random(world.count)
    of_image = world.rng.random(world.count) < 0.5
    right = (hard * of_image + own * ~of_image < score).astype(float)
    gone = (world.rng.random(world.count) < forgotten / (1 - score)) * (1 - right)
    world.documents[key] = {SCORE: right, LEARNED: right + gone}
    about = {"head": "ncm", "prototypes": "refreshed", "backbone": backbone}
    world.points.append(
        Outcome("m", edit, key=key, seed=seed, stream={**about, "accuracy": {}}, overlap=overlap,
                metrics={SCORE: float(right.mean())}, **more)
    )  # fmt: skip


def _overlap(world: World, off: float) -> dict[str, Any]:
    one, other, share = ERROR * world.rng.standard_normal(3)
    return {
        "cosine": {"a b": 0.02 + off + one, "a c": 0.02 + other},
        "collisions": 0.26 + share,
        "expected": {"cosine": {"a b": 0.02, "a c": 0.02}, "collisions": 0.26},
        "expected_error": {"cosine": {"a b": ERROR, "a c": ERROR}, "collisions": ERROR},
    }


def _apart(touching: float) -> dict[str, Any]:
    return {"cosine": {"a b": touching, "a c": 0.0}, "collisions": 0.0}


NULLS: Mapping[str, tuple[str, Draw]] = {
    "kept": ("masks lose exactly two points", stream(masked=0.5, sum_=0.5 + NEAR)),
    "collides": ("masks score as the sum does", stream(masked=0.5)),
    "frozen": ("masks score as the base does", stream(masked=0.53)),
    "sequence": ("masks score as sequential fine-tuning does", stream(masked=0.53)),
    "forgets": ("masks forget exactly half", stream(forgotten=(0.125, 0.25))),
    "closed": ("one cosine is off by the margin", stream(off=CLOSE)),
    "exact": ("one cosine is a little above 0", stream(touching=1e-9)),
}
