"""The points that `experiment=regime` would leave, drawn: its pattern, or a null of one check."""

from collections.abc import Mapping

from deltalab.store.record import Outcome
from experiments.paper.evidence import CHANGE
from experiments.paper.patterns import Draw
from experiments.paper.simulate import World
from experiments.regime.study import LARGE, RATE, SMALL, TESTED_ON, sizes

EXAMPLES = 128


def deltas(small: float = 0.05, large: float = 0.05, better: bool = True) -> Draw:
    """Return all pairs with DARE at one rate, BitDelta, and ten edits more.

    Args:
        small: by how much BitDelta loses more on the smallest of the small deltas; .05 on others.
        large: by how much DARE loses more on the largest delta; .05 on others.
        better: whether changes follow |E|/|W|; else each run follows it or |E|/|D| by chance.
    """

    def draw(world: World) -> None:
        known = sizes()
        least, most = min(known, key=lambda n: known[n]), max(known, key=lambda n: known[n])
        runs = list(dict.fromkeys(name.rpartition("/")[0] for name in known))
        follows = {r: better or bool(world.rng.integers(2)) for r in runs}
        for name, size in known.items():
            run = name.rpartition("/")[0]
            for place in range(10):
                shift = 0.1 + 0.9 * world.rng.random()
                told = shift * size if follows[run] or not run.startswith(TESTED_ON) else shift
                _add(world, name, "noise", {"sigma": place}, told, shift)
            gap = 0.05
            if size < SMALL:
                gap = small if name == least else 0.05
            elif size > LARGE:
                gap = -(large if name == most else 0.05)
            change = 0.5 * size if follows[run] or not run.startswith(TESTED_ON) else 0.5
            _add(world, name, "dare", {"p": RATE}, change, 0.5)
            _add(world, name, "bitdelta", {}, change + gap, 0.5)

    return draw


def _add(
    world: World, name: str, edit: str, settings: dict[str, float], mean: float, shift: float
) -> None:
    seen = mean + 0.05 * world.rng.standard_normal(EXAMPLES)
    key = f"{len(world.points)}"
    world.documents[key] = {CHANGE: seen}
    world.points.append(
        Outcome("m", edit, settings, pair=name, key=key, change=float(seen.mean()), gap=1.0,
                relative_shift=shift)
    )  # fmt: skip


NULLS: Mapping[str, tuple[str, Draw]] = {
    "small": ("on the smallest delta BitDelta loses as much as DARE", deltas(small=0.0)),
    "large": ("on the largest delta DARE loses as much as BitDelta", deltas(large=0.0)),
    "abscissa": ("chance says of each run which of the two it follows", deltas(better=False)),
}
