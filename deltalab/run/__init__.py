"""The story of one point: open the pair, edit the delta, approximate, measure, record.

This module is importable and holds the only caches, so that consecutive jobs of a sweep, also in
the workers of a launcher, share the open pair and everything that only depends on it.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from deltalab import options
from deltalab import settings as checks
from deltalab.apply import editing
from deltalab.apply.audit import audit
from deltalab.apply.extras import check_needs
from deltalab.apply.merging import check_merge
from deltalab.calibration import providing
from deltalab.console import one_line
from deltalab.data import splits
from deltalab.keys import BESIDE, Choices, determinants, pair_id, salt_of
from deltalab.models.hub import Absent
from deltalab.provenance import commit, device_name, versions
from deltalab.reference import Unopened
from deltalab.run import experts
from deltalab.run.point import (
    PROVIDED,
    Clock,
    Point,
    calibration,
    judged,
    provide,
    reference,
    spent,
)
from deltalab.store import eviction, locks, records
from deltalab.store.digests import key_of
from deltalab.store.effects import check_margin
from deltalab.store.record import SCHEMA, completed, written
from deltalab.weights import finite, select

log = logging.getLogger(__name__)
BUILT = ("objective", "evaluator", "riemann", "prediction")


def run(
    settings: Mapping[str, Any],
    choices: Choices,
    group: str = "",
    begun: Callable[[str], None] = lambda key: None,
) -> tuple[records.Record, bool]:
    """Run one point and write its record, or return the finished record.

    Args:
        settings: the composed config as plain containers.
        choices: the names of the chosen options.
        group: the sweep that the point belongs to, for the tracker.
        begun: told the point's key as soon as it is known.

    Returns:
        The record, and whether it had been there before.

    Raises:
        ValueError: a setting is out of range or the inputs do not fit together. Where the point
            was valid so far, an error record is written first.
        locks.Busy: another process is running this very point.
    """
    point = prepare(settings, choices)
    begun(point.key)
    tracker = build(settings["tracker"], "tracker")
    results = settings["results"]
    if (
        done := records.finished(results, point.key, settings["force"], choices.experiment)
    ) is not None:
        return done, True
    records.check_writable(results)
    if point.artifacts:
        with suppress(OSError):  # a store that cannot be written costs time and no point
            eviction.claim(Path(point.artifacts))
    with locks.held(records.lock_of(results, point.key)) as lock:
        done = records.finished(results, point.key, settings["force"], choices.experiment)
        if done is not None:
            return done, True  # another process has just finished it
        record = records.redacted(completed(header(point, settings, choices)))
        try:
            found, documents = evaluate(point)
            if lock.lost():  # this process was stopped for so long that another took over
                raise locks.Busy(lock.path, locks.owner(lock.path) or locks.UNKNOWN)
            records.write_documents(results, point.key, documents)
            record = completed(record | {"status": "ok", "error": None, **found})
        except Exception as error:
            failed = written(
                status="error", kind_of_failure=type(error).__name__, message=str(error)
            )
            if not isinstance(error, locks.Busy):
                with suppress(OSError):  # what went wrong first is what the user must hear
                    records.write(results, record | failed)
            raise
        records.write(results, record)
    if tracker is not None:
        tracker.log(records.redacted(record), group=group)
    return record, False


def prepare(settings: Mapping[str, Any], choices: Choices) -> Point:
    """Build and validate the parts of a point; cheap, opens no model."""
    chosen, parts = validated(settings, choices)
    margin = check_margin(settings["margin"])
    salt, own = salt_of(settings, choices), {}
    for name in options.experts_of(settings):
        with experts.named(name):
            pair = prepare(options.member(settings, name), choices)
        own[name] = replace(pair, salt=experts.salt(salt, name))
    found = _determined(settings, choices, parts["model"])
    experts.check(own)
    return Point(
        **parts,
        select=chosen,
        seed=settings["seed"],
        nonfinite=settings["nonfinite"],
        artifacts=settings["artifacts"],
        artifacts_gb=settings["artifacts_gb"],
        margin=margin,
        objective_name=choices.objective,
        salt=salt,
        key=key_of(found) if found else "",
        parts=found,
        experts=own,
    )


def validated(settings: Mapping[str, Any], choices: Choices) -> tuple[Any, dict[str, Any]]:
    """Return the tensors to edit and the parts of a point by name, each built; touches no file.

    The model, objective and evaluator of a family are those of its first expert.

    Raises:
        ValueError: a setting of the wrong type, out of range, or unknown.
    """
    checks.check_top(settings)
    salt_of(settings, choices)
    finite.check(settings["nonfinite"])
    check_margin(settings["margin"])
    names = options.experts_of(settings)
    first = options.member(settings, names[0]) if names else settings
    edit, chosen = _selecting(settings["edit"], "edit")
    chosen = settings["select"] or chosen
    select.check(chosen)
    check_needs(edit, PROVIDED)
    merge, merged = merging(settings.get("merge"), names)
    layers = dict(first.get("calibration") or {})
    providing.check(layers)
    layers["objective"] = build(layers.get("objective"), "calibration.objective")
    layers.pop("data", None)
    with experts.named(names[0]) if names else nullcontext():
        parts = {name: build(first[name], name) for name in ("model", *BUILT)}
    made = {"edit": edit, "merge": merge, "merged": merged, "calibration": layers, **parts}
    return chosen, made


def _selecting(node: Mapping[str, Any], setting: str) -> tuple[Any, Any]:
    """Build a node that says which tensors it is for; return it and them."""
    own = dict(node)
    chosen = own.pop("select")
    return build(own, setting), chosen


def merging(
    node: Any, names: tuple[str, ...], provided: tuple[str, ...] = PROVIDED
) -> tuple[Any, Any]:
    """Build a merge and return it with the tensors that it is for; of a pair there is none.

    Args:
        node: its config; None where there is none.
        names: the experts.
        provided: what it may ask for of every expert.

    Raises:
        ValueError: a merge of a pair, none of a family, or one that is not for these experts.
    """
    if not node:
        if names:
            raise ValueError(
                f"merge=: model.experts names {len(names)}, say how they are merged, as merge=ties"
            )
        return None, "all"
    name = str(node.get("_target_", "")).rpartition(".")[2].lower()
    if not names:
        raise ValueError(
            f"merge={name}: a pair has nothing to merge; name experts, as model.experts={{a: DIR,"
            " b: DIR}"
        )
    merge, merged = _selecting({"select": "all", **node}, "merge")
    select.check(merged)
    check_merge(merge, provided, names)
    return merge, merged


def _determined(settings: Mapping[str, Any], choices: Choices, model: Any) -> dict[str, Any]:
    """Return what decides a point; empty in a plan where the models cannot be asked for.

    Raises:
        Unopened: the model's files are missing or damaged.
    """
    try:
        if hasattr(model, "ready"):
            model.ready()
        return determinants(settings, choices, settings.get("verify") == "full")
    except (ValueError, OSError) as error:
        if settings["plan"] and isinstance(error, Absent):
            return {}
        raise Unopened(one_line(error)) from error


def evaluate(point: Point) -> tuple[records.Record, dict[str, list[float]]]:
    """Open the pair, edit, approximate and measure; of a family, merge and do so for each expert.

    Returns:
        The fields of the record that were computed, and what every document scored, by metric.
    """
    if point.experts:
        return experts.evaluate(point)
    clock = Clock()
    with clock("open"):
        known = reference(point)
        pair = known.pair
        # What was fitted to half A of the objective's examples is judged on half B.
        judge = known.judge("B" if splits.tunes(point.edit.needs) else None)
    with clock("edit"):
        calibrated = calibration(known, point)
        extras = provide(known, point.edit, point.seed, point.salt, calibrated)
        post = {name: pair.post[name] for name in editing.chosen(pair.post, point.select)}
        device = next(pair.module.parameters()).device
        lazy = editing.edited(pair.pre, post, point.edit, point.select, extras, device=device)
        edited = calibrated.in_order(lazy)
        finite.check_edited(edited)
        touched = audit(pair, post, point.edit, extras, edited)
    found, documents = judged(point, known, judge, edited, post, clock)
    return written(**touched, **found, **spent(clock)), documents


def header(point: Point, settings: Mapping[str, Any], choices: Choices) -> records.Record:
    """Return the fields of a record that are known before anything is computed."""
    hyper = {k: v for k, v in settings["edit"].items() if k not in ("_target_", "select")}
    kept = ("data", "draws", "label")
    config = {k: v for k, v in settings.items() if k not in BESIDE or k in kept}
    return written(
        schema=SCHEMA,
        key=point.key,
        status="error",
        experiment=choices.experiment,
        model=choices.model,
        pair=settings.get("label"),
        setup=pair_id(point.parts),
        objective=choices.objective,
        edit=choices.edit,
        settings=hyper,
        **experts.header(settings),
        seed=point.seed,
        salt=point.salt,
        select=point.select,
        versions=versions(),
        git=commit(),
        device=device_name(getattr(point.model, "device", "cpu")),
        config=config,
    )


def build(node: Any, setting: str) -> Any:
    """Instantiate a config node of this package; a mistake in it becomes a `ValueError`."""
    if not node or "_target_" not in node:
        return None
    checks.check_node(node, setting)
    try:
        built = instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError):
            raise ValueError(f"{setting}: {cause}") from None
        raise (cause if isinstance(cause, ValueError | OSError) else error) from None
    if hasattr(built, "data") and not hasattr(built.data, "open"):
        raise ValueError(f"{setting}.data={built.data}: must be a source of data")
    return built
