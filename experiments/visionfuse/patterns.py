"""The points of `experiment=visionfuse`, drawn: what is claimed, or one of its nulls."""

from collections.abc import Mapping
from typing import Any

from deltalab.store.record import Outcome
from experiments.paper.patterns import Draw
from experiments.paper.simulate import World
from experiments.visionfuse.study import FIXED, SINGLE
from experiments.visionfuse.world import BOTH

SEEDS = 5


def models(
    fused: Mapping[str, float] | None = None, single: float = 0.3, alone: float = 0.4
) -> Draw:
    """Return the points of five seeds of training.

    Args:
        fused: accuracy of the merge with all tokens, by question, in expectation.
        single: of every model with its own tokens.
        alone: of every language model with all tokens.
    """
    of = {q: (fused or {}).get(q, 0.6) for q in BOTH}

    def draw(world: World) -> None:
        for seed in range(SEEDS):
            for q in BOTH:
                right = _drawn(world, of[q])
                post = {e: _drawn(world, alone) for e in SINGLE}
                _add(world, seed, f"{q}_both", dict.fromkeys(SINGLE, right), post)
                for e in SINGLE:
                    own = {other: _drawn(world, single) for other in SINGLE}
                    _add(world, seed, f"{q}_{e}", own, own)

    return draw


def _drawn(world: World, score: float) -> Any:
    """Draw one model's scores; its accuracy differs by two points between seeds of training."""
    own = score + 0.02 * world.rng.standard_normal()
    return (world.rng.random(world.count) < own).astype(float)


def _add(
    world: World, seed: int, name: str, scores: Mapping[str, Any], post: Mapping[str, Any]
) -> None:
    key, metric = f"{len(world.points)}", f"{name}/accuracy"
    world.documents[key] = {f"{e}/{metric}": s for e, s in scores.items()}
    world.documents[key] |= {f"{e}/{metric}@post": s for e, s in post.items()}
    experts = {
        e: {
            "metrics": {metric: float(scores[e].mean())},
            "reference": {"post": {metric: float(post[e].mean())}, "pre": {metric: 0.0}},
        }
        for e in SINGLE
    }
    overlap = {
        "cosine": {"digits clothes": 0.1 + 0.001 * seed},
        "size": dict.fromkeys(SINGLE, 0.1),
    }
    world.points.append(
        Outcome("m", "keep", key=key, merge="sum", merging={"weight": FIXED}, experts=experts,
                overlap=overlap)
    )  # fmt: skip


NULLS: Mapping[str, tuple[str, Draw]] = {
    "fused": ("on one question the fused model is right as often as a single one",
              models({"match": 0.3}, alone=0.2)),
    "merged": ("on one question the merge is right as often as a language model alone",
               models({"match": 0.4})),
}  # fmt: skip
