"""One point of a family: every expert edited, all merged, and the merged model judged for each.

A family is its experts' pairs: every expert has a pair's point, and what a pair's record holds is
held for each of them in the record's field `experts`. The path of an expert goes from its own
weights to the merged ones, under its own objective.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from deltalab.apply import merging
from deltalab.apply.audit import summed
from deltalab.data import splits
from deltalab.edits import Edit
from deltalab.edits.keep import Keep
from deltalab.linear.delta import difference
from deltalab.models import families
from deltalab.run import streams
from deltalab.run.opening import Reference, family
from deltalab.run.overlap import overlap
from deltalab.run.point import (
    Clock,
    Point,
    calibration,
    judged,
    opening,
    provide,
    providers,
    spent,
    stamp,
)
from deltalab.store.effects import classify
from deltalab.store.record import written
from deltalab.weights import finite
from deltalab.weights.mapping import Weights

AVERAGED = ("prediction", "losses", "change", "gap", "reference")
"""Fields of experts whose averages are the family's."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say of a mistake within which expert it is."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "model.experts" in str(error):
            raise
        raise type(error)(f"model.experts.{name}: {error}") from None


def salt(common: str, name: str) -> str:
    """Return what sets an expert's random numbers apart: no two experts share a mask.

    >>> salt("", "math"), salt("family", "math")
    ('expert math', 'family expert math')
    """
    return f"{common} expert {name}".strip()


def drawing(edit: Edit, common: str, name: str, names: Sequence[str]) -> tuple[Edit, str]:
    """Return the edit as it is for one expert, and what its random numbers are salted with.

    Experts have random numbers of their own, but for an edit that divides common ones among them.

    >>> from deltalab.edits.drop_only import DropOnly
    >>> drawing(DropOnly(p=0.5, masks="disjoint"), "", "b", ["a", "b"])
    (Part(p=0.5, masks='disjoint', place=1, count=2), '')
    """
    own = edit.among([*names].index(name), len(names))
    return (edit, salt(common, name)) if own is None else (own, common)


def header(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that say how a family is merged; none for a pair."""
    node = settings.get("merge")
    if not node:
        return {}
    own = {k: v for k, v in node.items() if k not in ("_target_", "select")}
    return {"merge": str(node["_target_"]).rpartition(".")[2].lower(), "merging": own}


def check(points: Mapping[str, Point]) -> None:
    """Check that experts are of one base and that no two are the same.

    What a checkpoint says it was made from counts.

    Raises:
        ValueError: which they are.
    """
    bases: dict[str, str] = {}
    found: dict[str, str] = {}
    for name, point in points.items():
        model = point.parts.get("model") or {}
        bases.setdefault(str(getattr(point.model, "pre", None)), name)
        other = found.setdefault(repr(model.get("post")), name)
        if model and other != name:
            raise ValueError(f"model.experts: {other} and {name} are the same model")
    if len(bases) > 1:
        (base, one), (another, two), *_ = bases.items()
        raise ValueError(f"model.experts: {one} is of base {base}, {two} of {another}")
    if not all(point.parts for point in points.values()):
        return  # a plan of what is not here yet
    known = {n: p.model.checkpoints for n, p in points.items() if hasattr(p.model, "checkpoints")}
    if known:
        families.check_base(next(iter(known.values()))[0], {n: c[1] for n, c in known.items()})


def evaluate(point: Point) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Open a family, edit and merge its experts, and judge the outcome for each of them.

    Returns:
        The fields of the record that were computed, averages over the experts where a pair has
        one number; and what every document scored, by expert and metric.
    """
    clock = Clock()
    with clock("open"):
        knowns = opened(point)
        pairs = {name: known.pair for name, known in knowns.items()}
    fitted = point.fitted or splits.tunes(point.merge.needs)
    judges = {name: known.judge("B" if fitted else None) for name, known in knowns.items()}
    device = next(next(iter(pairs.values())).module.parameters()).device
    whole = merging.Family(
        {name: _expert(point, name, known) for name, known in knowns.items()},
        point.merge,
        point.merged,
        device,
    )
    with clock("edit"):
        made = whole.held()
    merged: Weights = {}
    each: dict[str, dict[str, Any]] = {}
    documents: dict[str, list[float]] = {}
    for name, own in point.experts.items():
        with clock("edit"):
            if model := made.pop(name if point.merge.each else "", None):
                merged = model
                finite.check_edited(merged)
            post = {tensor: pairs[name].post[tensor] for tensor in merged}
        told, scored = judged(own, knowns[name], judges[name], merged, post, clock, Keep())
        each[name] = {**told, **_moved(pairs[name].pre, post, merged)}
        documents |= {f"{name}/{metric}": values for metric, values in scored.items()}
    entries = sum(tensor.numel() for tensor in merged.values())
    found = averages([*each.values()])
    stream: dict[str, Any] = {}
    if tasks := streams.of(point.experts):
        with clock("stream"):
            metrics, stream, right = streams.streamed(tasks, pairs, whole)
        found["metrics"] |= metrics
        documents |= {name: values.tolist() for name, values in right.items()}
    return written(
        **found,
        tensors=len(merged),
        parameters=entries,
        kept=whole.kept(),
        learned=whole.learned,
        overlap=overlap(whole),
        stream=stream,
        of_parameters=sum(t.numel() for t in next(iter(pairs.values())).module.parameters()),
        experts={name: _record(own) for name, own in each.items()},
        **spent(clock),
    ), documents


def opened(point: Point) -> dict[str, Reference]:
    """Open every expert of a family, once for all points of a sweep.

    Raises:
        ValueError: experts that cannot be opened, or do not fit each other.
    """
    stamp([*point.experts.values()])
    return family({name: opening(own) for name, own in point.experts.items()})


def _expert(point: Point, name: str, known: Reference) -> merging.Expert:
    own = point.experts[name]
    calibrated, pair = calibration(known, own), known.pair
    extras = provide(known, own.edit, point.seed, own.salt, calibrated)
    given = providers(known, calibrated)
    return merging.Expert(pair.pre, pair.post, own.edit, point.select, extras, given)


def _moved(pre: Weights, post: Weights, merged: Weights) -> dict[str, Any]:
    """Say how far merged weights are from an expert's, and what share is the base's."""
    shift = delta = zeros = entries = 0.0
    for name, tensor in merged.items():
        own, before = post[name], pre[name]
        each = tensor == before, difference(own, tensor), difference(before, own)
        same, moved, edited = summed(each)
        zeros, shift, delta = zeros + same, shift + moved, delta + edited
        entries += tensor.numel()
    share = (shift / delta) ** 0.5 if delta else 0.0
    return {"relative_shift": share, "sparsity": zeros / entries if entries else 0.0}


def _record(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return one expert's fields as its pair's record has them."""
    record: dict[str, Any] = written(**own)
    told = own["change"], own["error"], own["gap"], own["gap_error"], own["margin"], 2.0
    return {**record, "class": classify(*told)}


def averages(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the averages over experts of what they all have.

    The error of a mean of T changes of different examples is sqrt(sum e_t^2) / T. Scores are
    averaged as they are, and as shares of the score of the expert itself: `normalised/...`.
    """
    first, count = each[0], len(each)
    found = {name: _mean([own[name] for own in each]) for name in AVERAGED}
    found["terms"] = _terms([own["terms"] for own in each])
    for name in ("error", "gap_error", "relative_shift", "sparsity"):
        values = [own[name] for own in each]
        squares = sum(value**2 for value in values) ** 0.5
        found[name] = squares / count if name.endswith("error") else sum(values) / count
    found["main"] = next(iter(found["terms"].values()), None)
    units = {own["unit"] for own in each}
    found["unit"] = first["unit"] if len(units) == 1 else "nats, each expert's own"
    found["gradient_evaluations"] = sum(own["gradient_evaluations"] for own in each)
    found |= {name: first[name] for name in ("loss_name", "half", "margin")}
    found["metrics"] = _scores(each)
    return found


def _terms(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean term of every rule, with its parts; where it was taken is each expert's."""
    found = {}
    for rule in each[0]:
        own = [terms[rule] for terms in each]
        kept = ("rule", "value", "error", "by_part", "by_layer", "by_tensor")
        mean = _mean([{k: v for k, v in term.items() if k in kept} for term in own])
        settled = [term.get("converged") for term in own]
        found[rule] = {
            **mean,
            "converged": None if None in settled else all(settled),
            "gradient_evaluations": sum(term["gradient_evaluations"] for term in own),
        }
    return found


def _scores(each: list[dict[str, Any]]) -> dict[str, float]:
    """Return every score's mean over experts, and the mean of its share of the expert's own.

    Experts have tasks of their own, so that a score goes by its last name: `mean/accuracy`,
    `normalised/accuracy`.
    """
    found: dict[str, list[float]] = {}
    for own in each:
        for name, value in own["metrics"].items():
            if (before := own["reference"]["post"].get(name)) is None:
                continue
            last = name.rpartition("/")[2]
            found.setdefault(f"mean/{last}", []).append(value)
            if before and last != "loss":
                found.setdefault(f"normalised/{last}", []).append(value / before)
    return {name: sum(v) / len(v) for name, v in found.items() if len(v) == len(each)}


def _mean(values: list[Any]) -> Any:
    """Return the mean of numbers, entry by entry of mappings; what they do not share is left out.

    >>> _mean([{"a": 1.0, "b": "x"}, {"a": 2.0, "b": "x"}]), _mean([None, None]), _mean([1, None])
    ({'a': 1.5, 'b': 'x'}, None, None)
    """
    first = values[0]
    if all(isinstance(value, Mapping) for value in values):
        names = [name for name in first if all(name in value for value in values)]
        return {name: _mean([value[name] for value in values]) for name in names}
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return sum(values) / len(values)
    return first if all(value == first for value in values) else None
