"""The points that `experiment=compression` would leave, drawn: what is claimed, or a null."""

from collections.abc import Mapping
from typing import Any

from deltalab.store.record import Outcome
from experiments.compression.claims import CLAIMS, PAIRS, Way
from experiments.paper.evidence import CHANGE
from experiments.paper.patterns import Draw
from experiments.paper.simulate import World

MODELS = ("a", "b", "c", "d", "e")
EXAMPLES = 100
WIDE, OWN = 0.5, 0.1
"""Spread of the loss change over examples: of what all codes share, and of each, by its mean."""
CHANGES = {
    "bitdelta": 0.2, "come": 0.02, "rank": 0.3, "qrelo": 0.04, "order": 0.08, "ultra": 0.05,
    "dare": 0.2, "impart": 0.1, "importance": 0.9, "rescale": 0.3, "cosines": 0.1,
    "plain": 0.15, "axis": 0.12, "come_half": 0.06, "mix_half": 0.04, "mix": 0.015,
    "shift": 0.08, "base": 0.2, "knapsack_come": 0.012, "uniform_come": 0.02,
    "knapsack_qrelo": 0.025, "uniform_qrelo": 0.04,
}  # fmt: skip
"""Mean loss changes of the pattern; discarding changes it by 1."""
WAYS = {
    "come": ("come", "bitdelta"), "rank": ("come", "rank"), "qrelo": ("qrelo", "bitdelta"),
    "order": ("qrelo", "order"), "ultra": ("ultra", "dare"),
    "importance": ("impart", "importance"), "rescale": ("impart", "rescale"),
    "cosines": ("cosines", "plain"), "axis": ("axis", "bitdelta"),
    "mix_half": ("mix_half", "come_half"), "mix_one": ("mix", "come"), "shift": ("shift", "base"),
    "spread_come": ("knapsack_come", "uniform_come"),
    "spread_qrelo": ("knapsack_qrelo", "uniform_qrelo"),
}  # fmt: skip
"""The names in `CHANGES` of the two ways of every claim."""
RANDOM = ("ultra", "dare", "impart", "importance", "rescale")


def codes(at: str | None = None) -> Draw:
    """Return five pairs as claimed; with the name of a claim all but two of them are its null.

    There the first way loses exactly so many times what the second does. Of a claim about every
    pair, one pair is its null.
    """

    def draw(world: World) -> None:
        for index, model in enumerate(MODELS):
            changes = dict(CHANGES)
            if at is not None and index >= (1 if CLAIMS[at].all else PAIRS - 1):
                one, other = WAYS[at]
                changes[other] = changes[one] / CLAIMS[at].times
                if changes[other] > 0.7:  # both beyond what counts
                    changes[one], changes[other] = 0.7 * CLAIMS[at].times, 0.7
            _pair(world, model, changes)

    return draw


def _pair(world: World, model: str, changes: Mapping[str, float]) -> None:
    common = 1 + WIDE * world.rng.standard_normal(EXAMPLES)
    done: set[str] = set()
    for name, claim in CLAIMS.items():
        for title, way in zip(WAYS[name], (claim.one, claim.other), strict=True):
            if title not in done:
                done.add(title)
                for seed in range(5 if title in RANDOM else 1):
                    _add(world, model, way, changes[title], common, seed)


def _add(world: World, model: str, way: Way, mean: float, common: Any, seed: int) -> None:
    own = OWN * mean * world.rng.standard_normal(EXAMPLES)
    kept = mean * common + own
    key = f"{len(world.points)}"
    settings = dict(way.settings)
    if way.budget:
        settings["total"] = way.budget
    if way.spread:
        settings["budget"] = f"{way.spread.lower()} unit=bits"
    if way.chosen:
        settings["amount"] = "fit"
    size = (way.budget or 1.0) - 0.01 * (way.edit == "ultradelta")
    world.documents[key] = {CHANGE: kept}
    world.points.append(
        Outcome(model, way.edit, settings, key=key, seed=seed, change=float(kept.mean()), gap=1.0,
                bits_per_weight={"payload": size, "metadata": 0.0})
    )  # fmt: skip


NULLS: Mapping[str, tuple[str, Draw]] = {
    name: (
        f"on {'one pair' if claim.all else 'all but two pairs'} the first loses exactly"
        f" {claim.times:g} times what the second does",
        codes(name),
    )
    for name, claim in CLAIMS.items()
}
