"""The story of one point: open the pair, edit the delta, approximate, measure, record.

This module is importable and holds the only caches, so that consecutive jobs of a sweep, also in
the workers of a launcher, share the open pair and everything that only depends on it.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltalab.apply import editing
from deltalab.apply.audit import Audit
from deltalab.keys import BESIDE, Choices, pair_id
from deltalab.provenance import commit, device_name, versions
from deltalab.run import experts
from deltalab.run.building import build, prepare
from deltalab.run.point import (
    Clock,
    Point,
    calibration,
    judged,
    provide,
    reference,
    spent,
)
from deltalab.store import eviction, locks, records, unfinished
from deltalab.store.record import SCHEMA, completed, label, written
from deltalab.weights import finite


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
    with (
        locks.held(records.lock_of(results, point.key)) as lock,
        unfinished.point(results, point.key),
    ):
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
        judge = known.judge("B" if point.fitted else None)
    with clock("edit"):
        calibrated = calibration(known, point)
        extras = provide(known, point.edit, point.seed, point.salt, calibrated)
        post = {name: pair.post[name] for name in editing.chosen(pair.post, point.select)}
        device = next(pair.module.parameters()).device
        audit, how = Audit(), (point.edit, point.select, extras)
        lazy = editing.edited(pair.pre, post, *how, device=device, audit=audit)
        edited = calibrated.in_order(lazy)
        finite.check_edited(edited)
    found, documents = judged(point, known, judge, edited, post, clock)
    return written(**audit.said(pair), **found, **spent(clock)), documents


def described(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an edit as records tell them: with `values`, and its budget.

    >>> spread = {"_target_": "deltalab.budgets.thirds.Thirds", "step": 0.1}
    >>> described({"edit": {"_target_": "deltalab.edits.dare.Dare", "p": 0.5}, "budget": spread})
    {'p': 0.5, 'budget': 'thirds step=0.1'}
    """
    found = {k: v for k, v in settings["edit"].items() if k not in ("_target_", "select")}
    if settings.get("values", "exact") != "exact":
        found["values"] = settings["values"]
    if budget := settings.get("budget"):
        own = {k: v for k, v in budget.items() if k != "_target_"}
        found["budget"] = label(budget["_target_"].rpartition(".")[2].lower(), own)
    return found


def header(point: Point, settings: Mapping[str, Any], choices: Choices) -> records.Record:
    """Return the fields of a record that are known before anything is computed."""
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
        settings=described(settings),
        **experts.header(settings),
        seed=point.seed,
        salt=point.salt,
        select=point.select,
        versions=versions(),
        git=commit(),
        device=device_name(getattr(point.model, "device", "cpu")),
        config=config,
    )
