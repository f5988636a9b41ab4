"""`plan=true`: what a point or a sweep would cost, from shapes alone, before anything is opened."""

import re
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from deltalab.models import facts
from deltalab.models.live import device_of
from deltalab.plan import hours, planning
from deltalab.run.point import Point
from deltalab.store import records
from deltalab.weights.select import selected

SOURCES = ("pre", "post", "text", "tokenizer")
"""What of a pair may be named by a hub id."""


def preview(points: Sequence[Point], results: str, device: hours.Device) -> str:
    """Return the cost of every pair's points as lines of text.

    Args:
        points: the points of a sweep, in the order in which they would run.
        results: the results directory, whose finished points cost nothing.
        device: how fast a GPU the hours are worked out for.

    Raises:
        ValueError: a pair's points need more memory than the device has that its settings name.
    """
    left = [p for p in points if not p.key or records.read(results, p.key) is None]
    lines = [f"points       {len(points)}, of which {len(points) - len(left)} are finished"]
    pairs = _grouped(left, lambda p: repr([p.model, *(e.model for e in p.experts.values())]))
    total, fetched = hours.Hours(), dict[str, int | None]()
    for group in pairs:
        text, spent = _pair(group, device)
        lines += ["", *text]
        total = total.plus(spent)
        fetched |= _downloads(group[0])
    if len(pairs) > 1:
        lines += ["", *_sizes("total", fetched), *_spent(total, device)]
    return "\n".join(lines)


def _pair(points: Sequence[Point], device: hours.Device) -> tuple[list[str], hours.Hours]:
    """Return the plan of points that share a pair or a family, and their hours."""
    first = points[0]
    selections = [p.merged if p.experts else p.select for p in points]
    each = [[p.experts[name] for p in points] for name in first.experts] or [[*points]]
    costs = [_cost(own, selections, device, bool(first.experts)) for own in each]
    plan = reduce(planning.Plan.beside, [plan for plan, _ in costs])
    where = device_of(first.model.device)
    names = f"family       {', '.join(first.experts)}, first" if first.experts else "pair        "
    lines = [f"{names} {first.model}, {len(points)} points on {where}"]
    lines += _sizes("download", _downloads(first))
    lines.append(plan.table())
    lines += _room(plan, {p.riemann.engine for p in points}, first.model.device, where)
    if where == "cpu" and first.model.device == "cpu":
        return lines, hours.Hours()
    spent = reduce(hours.Hours.plus, [spent for _, spent in costs])
    return lines + _spent(spent, device), spent


def _cost(
    points: Sequence[Point], selections: Sequence[Any], device: hours.Device, compared: bool
) -> tuple[planning.Plan, hours.Hours]:
    """Return the plan and the hours of points of one pair, or of one expert.

    Args:
        points: they share a model.
        selections: what is edited, or merged.
        device: how fast a GPU the hours are worked out for.
        compared: whether they are of an expert.
    """
    module = points[0].model.skeleton()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    different = {repr(s): s for s in selections}.values()
    touched = [n for n in shapes if any(selected(s, n, shapes[n]) for s in different)]
    plans, taken = [], dict[Any, tuple[int, int]]()
    for group in _grouped(points, lambda p: repr((p.riemann, p.prediction, p.objective))):
        one = group[0]
        edits, predicted = [point.edit for point in group], one.prediction.enabled
        how = {"predicted": predicted, "compared": compared}
        plans.append(planning.plan(module, touched, edits, one.riemann, **how))
        products = (len(group) + one.prediction.probes) * predicted
        before = taken.get(one.objective, (0, 0))
        taken[one.objective] = (before[0] + plans[-1].evaluations, before[1] + products)
    measured = [(point.objective, point.evaluator) for point in points]
    wide = any(point.riemann.dtype for point in points)
    spent = hours.of_points(measured, taken, hours.Model.of(module), device, wide)
    return reduce(planning.Plan.joined, plans), spent


def _room(plan: planning.Plan, engines: set[str], asked: str, where: str) -> list[str]:
    """Return a line where a run would not fit here; on a device that was named, refuse it.

    Raises:
        ValueError: the device that the settings name has too little memory.
    """
    try:
        for engine in sorted(engines):
            plan.check(engine, planning.available(where), where)
    except ValueError as error:
        if asked != "auto":
            raise
        return [f"room         not on this machine: {error}"]
    return []


def _downloads(point: Point) -> dict[str, int | None]:
    """Return what is to be fetched of a pair, or of all experts."""
    found: dict[str, int | None] = {}
    for own in point.experts.values() or [point]:
        found |= downloads(own.model)
    return found


def downloads(model: Any) -> dict[str, int | None]:
    """Return the hub ids of a pair with the bytes of their weights; None where not known.

    >>> from deltalab.models.hf_llm import HfPair
    >>> downloads(HfPair("mistralai/Mistral-7B-v0.3", "org/mine"))
    {'mistralai/Mistral-7B-v0.3': 14496047104, 'org/mine': None}
    """
    found: dict[str, int | None] = {}
    for name in SOURCES:
        source = getattr(model, name, None)
        if not isinstance(source, str) or Path(source).expanduser().exists():
            continue
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
            known = facts.known(source)
            found[source] = known.bytes if known else None
    return found


def _sizes(title: str, sizes: dict[str, int | None]) -> list[str]:
    """Return the line of what is to be fetched from the hub, unless it is in its cache."""
    if not sizes:
        return []
    known = [size for size in sizes.values() if size is not None]
    unknown = len(sizes) - len(known)
    if title == "total":
        more = f" and {unknown} of unknown size" * bool(unknown)
        return [f"in all       {sum(known) / 1e9:.1f} GB of {len(sizes)} repositories{more}"]
    gigabytes = {n: "size unknown" if s is None else f"{s / 1e9:.1f} GB" for n, s in sizes.items()}
    return ["download     " + ", ".join(f"{name} ({size})" for name, size in gigabytes.items())]


def _spent(spent: hours.Hours, device: hours.Device) -> list[str]:
    """Return the lines that tell the hours."""
    parts = ", ".join(f"{name} {_hours(value)}" for name, value in spent.parts.items() if value)
    lines = [
        f"hours        about {_hours(spent.total)} on one GPU at device_tflops={device.tflops:g}"
        f" ({parts or 'nothing'}), without loading and editing weights"
    ]
    if spent.unknown:
        names = ", ".join(spent.unknown)
        lines.append(f"             and what these take, whose size is not known: {names}")
    return lines


def _grouped(points: Iterable[Point], key: Any) -> list[list[Point]]:
    found: dict[Any, list[Point]] = {}
    for point in points:
        found.setdefault(key(point), []).append(point)
    return list(found.values())


def _hours(value: float) -> str:
    """Write hours to two figures.

    >>> _hours(0.0123), _hours(160.4)
    ('0.012', '160')
    """
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
