"""The story of one point: open the pair, edit the delta, approximate, measure, record.

This module is importable and holds the only caches, so that consecutive jobs of a sweep, also in
the workers of a launcher, share the open pair and everything that only depends on it.
"""

import logging
import math
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from deltalab import apply, finite, records, riemann, select
from deltalab import settings as checks
from deltalab.edits import needs_of
from deltalab.evaluators.accuracy import Scores
from deltalab.extras import Extras
from deltalab.objectives import Loss, Measured, change, classify, measure
from deltalab.quadrature import Rule
from deltalab.weights import LazyWeights, ModelPair, Weights, loaded

log = logging.getLogger(__name__)
NOT_DETERMINING = ("results", "force", "tracker", "sweeps", "experiment", "most_points")


@dataclass(frozen=True)
class Choices:
    """Which option of a config group was chosen, by name."""

    model: str
    edit: str
    objective: str
    experiment: str | None = None


@dataclass(frozen=True)
class Point:
    """Everything that determines one point, validated, before any model is opened."""

    model: Any
    edit: Any
    objective: Any
    evaluator: Any
    rules: tuple[Rule, ...]
    select: str
    seed: int
    objective_name: str
    key: str
    nonfinite: str = "error"


def run(
    settings: Mapping[str, Any], choices: Choices, group: str = ""
) -> tuple[records.Record, bool]:
    """Run one point and write its record, or return the finished record.

    Args:
        settings: the composed config as plain containers.
        choices: the names of the chosen options.
        group: the sweep that the point belongs to, for the tracker.

    Returns:
        The record, and whether it had been there before.

    Raises:
        ValueError: a setting is out of range or the inputs do not fit together. Where the point
            was valid so far, an error record is written first.
    """
    point = prepare(settings, choices)
    tracker = build(settings["tracker"], "tracker")
    results = settings["results"]
    if not settings["force"] and (done := records.read(results, point.key)) is not None:
        return done, True
    records.check_writable(results)
    record = records.redacted(header(point, settings, choices))
    try:
        record |= {"status": "ok", "error": None, **evaluate(point)}
    except Exception as error:
        failure = {"type": type(error).__name__, "message": str(error)}
        with suppress(OSError):  # what went wrong first is what the user must hear
            records.write(results, record | {"status": "error", "error": failure})
        raise
    records.write(results, record)
    if tracker is not None:
        tracker.log(record, group=group)
    return record, False


def prepare(settings: Mapping[str, Any], choices: Choices) -> Point:
    """Build and validate the parts of a point; cheap, opens no model."""
    checks.check_top(settings)
    finite.check(settings.get("nonfinite", "error"))
    edit_settings = dict(settings["edit"])
    chosen = edit_settings.pop("select")
    chosen = settings["select"] or chosen
    select.check(chosen)
    edit = build(edit_settings, "edit")
    needs_of(edit)
    rules = build(settings["riemann"], "riemann").rules
    model = build(settings["model"], "model")
    determinants = {k: v for k, v in settings.items() if k not in NOT_DETERMINING}
    determinants |= {"select": chosen, "choices": [choices.model, choices.edit, choices.experiment]}
    return Point(
        model=model,
        edit=edit,
        objective=build(settings["objective"], "objective"),
        evaluator=build(settings["evaluator"], "evaluator"),
        rules=rules,
        select=chosen,
        seed=settings["seed"],
        objective_name=choices.objective,
        key=records.key_of(determinants | {"inputs": model.fingerprints}),
        nonfinite=settings.get("nonfinite", "error"),
    )


def evaluate(point: Point) -> records.Record:
    """Open the pair, edit, approximate and measure: the fields of the record that were computed."""
    clock = Clock()
    with clock("open"):
        known = reference(point.model, point.objective, point.evaluator, point.nonfinite)
        pair, loss = known.pair, known.loss
    with clock("edit"):
        extras = Extras.of(point.edit, pair, seed=point.seed, gradient=lambda: known.gradient)
        edited = dict(apply.edited(pair.pre, pair.post, point.edit, point.select, extras))
        finite.check_edited(edited)
        shift = {name: edited[name].float() - pair.post[name].float() for name in edited}
        touched = audit(pair, point.edit, extras, edited)
    with clock("term"):
        first = known.gradient if any(0.0 in rule.nodes for rule in point.rules) else None
        terms = riemann.terms(pair.module, pair.post, shift, loss, point.rules, first=first)
    with clock("loss"), loaded(pair.module, edited, restore=pair.post):
        measured = measure(pair.module, loss)
    with clock("evaluate"), loaded(pair.module, edited, restore=pair.post):
        scores = known.score(pair.module)
    value, error = change(known.post, measured)
    main = next(iter(terms.values()), None)
    return {
        "touched": touched,
        "term": main and main.as_record(),
        "terms": {name: term.as_record() for name, term in terms.items()},
        "prediction": None,
        "loss": {
            "objective": point.objective_name,
            "unit": loss.unit,
            "pre": known.pre.mean,
            "post": known.post.mean,
            "edited": measured.mean,
            "change": value,
            "error": error,
        },
        "metrics": {**scores.metrics, **paired(known.post_scores, scores)},
        "reference": {
            "pre": dict(known.pre_scores.metrics),
            "post": dict(known.post_scores.metrics),
        },
        "class": classify(value, error),
        "gradient_evaluations": sum(t.gradient_evaluations for t in terms.values()),
        "seconds": clock.seconds(),
        "peak_memory_bytes": peak_memory(),
    }


@dataclass(frozen=True, eq=False)
class Reference:
    """What every edit of a pair shares: the live module, and both of its ends measured."""

    pair: ModelPair
    loss: Loss
    score: Callable[[nn.Module], Scores]
    pre: Measured
    post: Measured
    pre_scores: Scores
    post_scores: Scores

    @cached_property
    def gradient(self) -> dict[str, Tensor]:
        """The gradient of the objective at W_post."""
        return riemann.gradient(self.pair.module, self.loss)


@lru_cache(maxsize=1)
def reference(model: Any, objective: Any, evaluator: Any, nonfinite: str = "error") -> Reference:
    """Open a pair with its objective and evaluator, and measure both of its ends, once."""
    pair = finite.checked(model.open(), nonfinite)
    loss = objective.open(pair)
    score = evaluator.open(pair) if evaluator is not None else lambda module: Scores({}, {})
    post, post_scores = measure(pair.module, loss), score(pair.module)
    with loaded(pair.module, pair.pre, restore=pair.post):
        pre, pre_scores = measure(pair.module, loss), score(pair.module)
    if classify(*change(pre, post)) == "decreased":
        log.warning(
            "the pre-trained model has a lower loss than the post-trained one, %.4f < %.4f %s:"
            " are model.pre and model.post swapped?",
            pre.mean,
            post.mean,
            loss.unit,
        )
    return Reference(pair, loss, score, pre, post, pre_scores, post_scores)


def paired(post: Scores, edited: Scores) -> dict[str, float]:
    """Return the change of every evaluated loss with its paired standard error."""
    metrics: dict[str, float] = {}
    for task, losses in edited.losses.items():
        ones = torch.ones_like(losses)
        value, error = change(Measured(post.losses[task], ones), Measured(losses, ones))
        metrics |= {f"{task}/loss_change": value, f"{task}/loss_change_error": error}
    return metrics


def audit(pair: ModelPair, edit: Any, extras: Extras, edited: Weights) -> dict[str, Any]:
    """Say what an edit did: what it touched, how far it moved, how much of that storage lost.

    `relative_shift` is |shift| / |delta| and `lost_in_storage` |shift - (F(D) - D)| / |F(D) - D|,
    Frobenius norms over the touched tensors; `sparsity` is the share of touched entries that have
    the pre-trained value.
    """
    deltas = LazyWeights(edited, lambda name: apply.difference(pair.pre[name], pair.post[name]))
    zeros = entries = 0
    shift2 = delta2 = ideal2 = lost2 = 0.0
    for name in edited:
        before = deltas[name]
        ideal = edit(before, **extras.for_tensor(name, deltas)) - before
        shift = edited[name].float() - pair.post[name].float()
        zeros += int((edited[name] == pair.pre[name]).sum())
        entries += shift.numel()
        shift2 += squared(shift)
        delta2 += squared(before)
        ideal2 += squared(ideal)
        lost2 += squared(shift - ideal)
    return {
        "tensors": len(edited),
        "parameters": entries,
        "of_parameters": sum(t.numel() for t in pair.module.parameters()),
        "relative_shift": math.sqrt(shift2 / delta2) if delta2 else 0.0,
        "sparsity": zeros / entries if entries else 0.0,
        "lost_in_storage": math.sqrt(lost2 / ideal2) if ideal2 else 0.0,
    }


def squared(tensor: Tensor) -> float:
    """Return the sum of squares, accumulated in float64."""
    return float(tensor.double().square().sum())


def header(point: Point, settings: Mapping[str, Any], choices: Choices) -> records.Record:
    """Return the fields of a record that are known before anything is computed."""
    hyper = {k: v for k, v in settings["edit"].items() if k not in ("_target_", "select")}
    config = {k: v for k, v in settings.items() if k not in NOT_DETERMINING}
    return {
        "schema": records.SCHEMA,
        "key": point.key,
        "status": "error",
        "error": None,
        "experiment": choices.experiment,
        "model": choices.model,
        "edit": {"name": choices.edit, **hyper},
        "seed": point.seed,
        "select": point.select,
        "versions": versions(),
        "git": commit(),
        "device": device_name(getattr(point.model, "device", "cpu")),
        "config": config,
    }


def build(node: Any, setting: str) -> Any:
    """Instantiate a config node of this package; a mistake in it becomes a `ValueError`."""
    if not node or "_target_" not in node:
        return None
    checks.check_node(node, setting)
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError):
            raise ValueError(f"{setting}: {cause}") from None
        raise (cause if isinstance(cause, ValueError | OSError) else error) from None


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


def peak_memory() -> int:
    """Return the peak memory of the process so far, in bytes; of the GPU where one is used."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    packages = ("deltalab", "torch", "timm", "hydra-core", "omegaconf", "safetensors", "numpy")
    return {name: version(name) for name in packages}


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Return the commit of this checkout, `+` appended where files differ, or None outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@lru_cache(maxsize=4)
def device_name(device: str) -> str:
    """Return what the point ran on, for instance `cpu, 2 threads` or the name of the GPU."""
    if device != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(None if device == "auto" else device))
    return f"cpu, {torch.get_num_threads()} threads"
