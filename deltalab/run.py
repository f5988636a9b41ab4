"""The story of one point: open the pair, edit the delta, approximate, measure, record.

This module is importable and holds the only caches, so that consecutive jobs of a sweep, also in
the workers of a launcher, share the open pair and everything that only depends on it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltalab.apply import editing
from deltalab.apply.audit import Audit
from deltalab.apply.extras import Extras
from deltalab.data import splits
from deltalab.evaluators.scores import Scores
from deltalab.keys import BESIDE, Choices, pair_id
from deltalab.loss import distill
from deltalab.loss.objectives import Measured, change, influences, measure
from deltalab.point import Point, build, prepare
from deltalab.provenance import commit, device_name, peak_memory, versions
from deltalab.reference import OPENED, Reference, opened
from deltalab.store import eviction, latest, locks, records
from deltalab.store.digests import key_of
from deltalab.store.record import SCHEMA, completed, written
from deltalab.weights import finite
from deltalab.weights.mapping import Weights, difference, loaded


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


def evaluate(point: Point) -> tuple[records.Record, dict[str, list[float]]]:
    """Open the pair, edit, approximate and measure.

    Returns:
        The fields of the record that were computed, and what every document scored, by metric.
    """
    clock = Clock()
    with clock("open"):
        known = reference(point)
        pair = known.pair
        # What was fitted to half A of the objective's examples is judged on half B.
        judge = known.judge("B" if splits.tunes(point.edit.needs) else None)
    with clock("edit"):
        extras = provide(known, point.edit, point.seed, point.salt)
        post = {name: pair.post[name] for name in editing.chosen(pair.post, point.select)}
        device = next(pair.module.parameters()).device
        audit, how = Audit(), (point.edit, point.select, extras)
        edited = dict(editing.edited(pair.pre, post, *how, device=device, audit=audit))
        finite.check_edited(edited)
    with clock("term"):
        changes = judge.engine.changes(
            point.edit,
            shift_from(post, edited),
            point.drawn,
            point.riemann,
            point.prediction,
            post,
        )
    with loaded(pair.module, edited, restore=post):
        with clock("loss"):
            measured = measure(pair.module, judge.loss)
        with clock("evaluate"):
            scores = known.score(pair.module)
    value, error = change(judge.post, measured)
    gap, gap_error = change(judge.post, judge.pre)
    terms = {name: term.as_record() for name, term in changes.terms.items()}
    found = written(
        **audit.said(pair),
        main=next(iter(terms.values()), None),
        terms=terms,
        prediction=changes.prediction,
        loss_name=point.objective_name,
        unit=judge.loss.unit,
        half=judge.half,
        losses={"pre": judge.pre.mean, "post": judge.post.mean, "edited": measured.mean},
        change=value,
        error=error,
        gap=gap,
        gap_error=gap_error,
        margin=point.margin,
        metrics={**scores.metrics, **paired(known.post_scores, scores)},
        reference={
            "pre": {**known.pre_scores.metrics, **paired(known.post_scores, known.pre_scores)},
            "post": dict(known.post_scores.metrics),
        },
        gradient_evaluations=changes.gradient_evaluations,
        stages=clock.seconds(),
        peak_memory_bytes=peak_memory(),
    )
    return found, kept_documents(known, scores, judge.of_all(influences(judge.post, measured)))


CHANGE = "objective/change"
"""Among the documents of a point: what every example of the objective says of the loss change,
nothing where it was fitted to."""


def kept_documents(known: Reference, scores: Scores, changes: Tensor) -> dict[str, list[float]]:
    """Return what is kept of single documents: scores, those of post beside them, loss changes."""
    found = {name: values.tolist() for name, values in scores.documents.items()}
    post = {f"{name}@post": v.tolist() for name, v in known.post_scores.documents.items()}
    return {**found, **post, CHANGE: [float(f"{v:.7g}") for v in changes.tolist()]}


def reference(point: Point) -> Reference:
    """Open a point's pair with its objective and evaluator, and measure both of its ends, once."""
    latest.stamp(**{name: key_of({"of": point.parts[name]}) for name in OPENED})
    shared = {name: point.parts[name] for name in ("model", "objective", "nonfinite", "reads")}
    return opened(
        point.model,
        point.objective,
        point.evaluator,
        point.nonfinite,
        point.artifacts,
        point.artifacts_gb,
        shared,
    )


def provide(known: Reference, edit: Any, seed: int, salt: str = "") -> Extras:
    """Return the provider of what an edit may ask for, computed when it asks.

    What is fitted to the objective's examples (`splits.TUNED`) is given half A of them alone.
    """
    gradient = lambda: known.whole.engine.gradient  # noqa: E731
    providers = distill.providers(known.pair, known.whole.loss, gradient)
    return Extras.of(edit, known.pair, seed=seed, salt=salt, providers=providers)


def shift_from(post: Weights, edited: Weights) -> dict[str, Tensor]:
    """Return W_edit - W_post in float32, of the weights as they are evaluated."""
    return {name: difference(post[name], edited[name]) for name in edited}


def paired(post: Scores, edited: Scores) -> dict[str, float]:
    """Return the change of every loss and score with its paired standard error.

    The same examples were scored twice, so that the error is that of their differences.
    """
    metrics: dict[str, float] = {}
    sides = ("{}/loss", post.losses, edited.losses), ("{}", post.documents, edited.documents)
    for title, before, after in sides:
        for key, values in after.items():
            both = ~(before[key].isnan() | values.isnan())  # a judge may have said nothing
            if not both.any():
                continue
            ones, name = torch.ones_like(values[both]), title.format(key)
            value, error = change(Measured(before[key][both], ones), Measured(values[both], ones))
            metrics |= {f"{name}_change": value, f"{name}_change_error": error}
    return metrics


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
        seed=point.seed,
        salt=point.salt,
        select=point.select,
        versions=versions(),
        git=commit(),
        device=device_name(getattr(point.model, "device", "cpu")),
        config=config,
    )


class Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        yield
        self._stages[stage] = self._stages.get(stage, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every stage, and in total."""
        total = time.perf_counter() - self._start
        return {k: round(v, 4) for k, v in {"total": total, **self._stages}.items()}
