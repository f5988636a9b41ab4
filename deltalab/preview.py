"""`plan=true`: what a point or a sweep would cost, from shapes alone, before anything is opened."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from deltalab import planning, records
from deltalab.models.timm_vit import device_of
from deltalab.run import Point
from deltalab.select import selected


def preview(points: Sequence[Point], results: str) -> str:
    """Return the cost of every pair's points as lines of text.

    Args:
        points: the points of a sweep, in the order in which they would run.
        results: the results directory, whose finished points cost nothing.

    Raises:
        ValueError: a pair's points need more memory than its device has.
    """
    left = [p for p in points if records.read(results, p.key) is None]
    lines = [f"points       {len(points)}, of which {len(points) - len(left)} are finished"]
    for _, group in groupby(left, key=lambda p: repr((p.model, p.riemann, p.prediction))):
        lines += ["", *_pair(list(group))]
    return "\n".join(lines)


def _pair(points: Sequence[Point]) -> list[str]:
    """Return the plan of points that share a pair and its rules."""
    first = points[0]
    module = first.model.skeleton()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    touched = [n for n in shapes if any(selected(s, n, shapes[n]) for s in _selections(points))]
    plan = planning.plan(
        module,
        touched,
        [point.edit for point in points],
        first.riemann,
        predicted=first.prediction.enabled,
    )
    device = device_of(first.model.device)
    plan.check(first.riemann.engine, planning.available(device), device)
    return [f"pair         {first.model}, {len(points)} points on {device}", plan.table()]


def _selections(points: Sequence[Point]) -> list[Any]:
    """Return the different selections of the points."""
    return list({repr(p.select): p.select for p in points}.values())
