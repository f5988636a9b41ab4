"""One point of a pair, opened: what it is, what it may ask for, and what edited weights come to."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltalab.apply.extras import Extras, Provider
from deltalab.budgets.shared import Shared
from deltalab.calibration import providing
from deltalab.calibration.providing import Calibration
from deltalab.data import splits
from deltalab.evaluators.scores import Scores
from deltalab.linear.delta import difference
from deltalab.loss import distill
from deltalab.loss.objectives import Loss, Measured, change, influences, measure
from deltalab.loss.prediction import Predict
from deltalab.loss.riemann import Riemann
from deltalab.provenance import peak_memory
from deltalab.run import shares
from deltalab.run.opening import OPENED, Judge, Opening, Reference, opened
from deltalab.run.sensitivity import midway, sensitivities
from deltalab.store import latest
from deltalab.store.digests import key_of
from deltalab.weights.mapping import Weights, loaded

PROVIDED = (*distill.PROVIDED, *providing.PROVIDED, "peers")
"""What `providers` provides."""


@dataclass(frozen=True)
class Point:
    """Everything that determines one point, validated, before any model is opened.

    Attributes:
        experts: of a family, the point of every expert's pair, by name; empty for a pair.
        peers: specs of further post-trained models of the same base, by name.
        merge: how they become one; None for a pair.
        merged: the tensors that are merged.
    """

    model: Any
    edit: Any
    objective: Any
    evaluator: Any
    riemann: Riemann
    prediction: Predict
    select: Any
    seed: int
    nonfinite: str
    artifacts: str
    artifacts_gb: float | None
    margin: float
    objective_name: str
    salt: str
    key: str
    parts: Mapping[str, Any]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    merge: Any = None
    merged: Any = "all"
    experts: Mapping[str, "Point"] = field(default_factory=dict)
    peers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fitted(self) -> bool:
        """Whether it is fitted to half A of the objective's examples, as a budget is."""
        spread = getattr(self.edit, "budget", None) is not None
        return splits.tunes((*self.edit.needs, *(("share",) if spread else ())))

    @property
    def drawn(self) -> dict[str, Any]:
        """What decides the edited weights beside the pair and the edit's line."""
        version = self.parts["edit"]["version"]
        return {"select": self.select, "seed": self.seed, "salt": self.salt, "version": version}


def reference(point: Point) -> Reference:
    """Open a point's pair with its objective and evaluator, and measure both of its ends, once."""
    stamp([point])
    return opened(*opening(point))


def stamp(points: Sequence[Point]) -> None:
    """Say what the contents of points are that are to be opened together."""
    parts = {name: [point.parts[name] for point in points] for name in OPENED}
    parts["model"] += [point.parts["peers"] for point in points if "peers" in point.parts]
    alone = len(points) == 1 and not points[0].peers
    latest.stamp(**{n: key_of({"of": each[0] if alone else each}) for n, each in parts.items()})


def opening(point: Point) -> Opening:
    """Return what a point's pair is opened with."""
    shared = {name: point.parts[name] for name in ("model", "objective", "nonfinite", "reads")}
    layers = point.calibration
    return (
        point.model,
        point.objective,
        point.evaluator,
        point.nonfinite,
        point.artifacts,
        point.artifacts_gb,
        shared,
        tuple(each.get("objective") for each in (layers, layers.get("fisher") or {})),
        point.peers,
    )


def provide(
    known: Reference, edit: Any, seed: int, salt: str = "", calibrated: Calibration | None = None
) -> Extras:
    """Return the provider of what an edit may ask for, computed when it asks.

    What is fitted to the objective's examples (`splits.TUNED`) is given half A of them alone.
    """
    given = providers(known, calibrated or calibration(known))
    extras = Extras.of(edit, known.pair, seed=seed, salt=salt, providers=given)
    if not isinstance(edit, Shared) or edit.budget is None:
        return extras

    def signal(deltas: Weights) -> tuple[Mapping[str, float], Weights]:
        plain = replace(edit, budget=None)
        return sensitivities(known, deltas), midway(known, plain, extras, deltas)

    share = shares.provider(edit, extras, signal)
    return replace(extras, providers={**extras.providers, "share": share})


def providers(known: Reference, calibrated: Calibration) -> dict[str, Provider]:
    """Return the providers of all that needs an objective."""
    gradient = lambda: known.whole.engine.gradient  # noqa: E731
    fitted = distill.providers(known.pair, known.whole.loss, gradient)
    return {**fitted, **calibrated.providers(), "peers": partial(_of_peer, known)}


def _of_peer(known: Reference, name: str, _: Weights) -> Callable[[str], Tensor]:
    """Return what gives the delta of one tensor of a peer, by the peer's name."""

    def delta(peer: str) -> Tensor:
        if peer not in known.peers:
            there = ", ".join(known.peers) or "none; name it, as peers={" + peer + ": PATH}"
            raise ValueError(f"edit.peer={peer}: no such model among the peers, {there}")
        return difference(known.pair.pre[name], known.peers[peer][name])

    return delta


def calibration(known: Reference, point: Point | None = None) -> Calibration:
    """Return the statistics of a pair's layers, shared by all points that take them alike."""
    settings = dict(point.calibration) if point else {}
    apart = settings.pop("fisher", None)
    parts = (point.parts.get("calibration") if point else None) or None
    found = _calibration(known, known.calibrating[0], settings, parts)
    if apart:
        parts = {"fisher": (parts or {}).get("fisher")}
        found.apart = _calibration(known, known.calibrating[1], apart, parts)
    return found


def _calibration(
    known: Reference, loss: Loss, settings: Mapping[str, Any], parts: Any
) -> Calibration:
    kept = {name: settings[name] for name in ("model", "sequential") if name in settings}
    about = {"calibration": parts}
    key = repr(("calibration", kept, about))
    if key not in known.memo:
        store = known.store(None)
        known.memo[key] = Calibration(known.pair, loss, store, about=about, **kept)
    found: Calibration = known.memo[key]
    return found


def judged(
    point: Point,
    known: Reference,
    judge: Judge,
    edited: Weights,
    post: Weights,
    clock: "Clock",
    edit: Any = None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Account for edited weights of a pair: terms, predictions, losses and scores.

    Args:
        point: what is to be worked out.
        known: the open pair.
        judge: the objective on the examples that judge.
        edited: the weights, in memory.
        post: the post-trained weights of the same names, in memory.
        clock: what takes how long.
        edit: what they were made by, as far as its line and its moments go; None: the point's.

    Returns:
        Fields of the record by name (`record.Outcome`), and what every document scored.
    """
    with clock("term"):
        changes = judge.engine.changes(
            edit or point.edit,
            shift_from(post, edited),
            point.drawn,
            point.riemann,
            point.prediction,
            post,
            compared=edit is not None,
        )
    with loaded(known.pair.module, edited, restore=post):
        with clock("loss"):
            measured = measure(known.pair.module, judge.loss)
        with clock("evaluate"):
            scores = known.score(known.pair.module)
    value, error = change(judge.post, measured)
    gap, gap_error = change(judge.post, judge.pre)
    terms = {name: term.as_record() for name, term in changes.terms.items()}
    found = {
        "main": next(iter(terms.values()), None),
        "terms": terms,
        "prediction": changes.prediction,
        "loss_name": point.objective_name,
        "unit": judge.loss.unit,
        "half": judge.half,
        "losses": {"pre": judge.pre.mean, "post": judge.post.mean, "edited": measured.mean},
        "change": value,
        "error": error,
        "gap": gap,
        "gap_error": gap_error,
        "margin": point.margin,
        "metrics": {**scores.metrics, **paired(known.post_scores, scores)},
        "reference": {
            "pre": {**known.pre_scores.metrics, **paired(known.post_scores, known.pre_scores)},
            "post": dict(known.post_scores.metrics),
        },
        "gradient_evaluations": changes.gradient_evaluations,
    }
    return found, kept_documents(known, scores, judge.of_all(influences(judge.post, measured)))


def spent(clock: "Clock") -> dict[str, Any]:
    """Return the fields of a record that tell what a point took."""
    return {"stages": clock.seconds(), "peak_memory_bytes": peak_memory()}


CHANGE = "objective/change"
"""Among the documents of a point: what every example of the objective says of the loss change,
nothing where it was fitted to."""


def kept_documents(known: Reference, scores: Scores, changes: Tensor) -> dict[str, list[float]]:
    """Return what is kept of single documents: scores, those of post beside them, loss changes."""
    found = {name: values.tolist() for name, values in scores.documents.items()}
    post = {f"{name}@post": v.tolist() for name, v in known.post_scores.documents.items()}
    return {**found, **post, CHANGE: [float(f"{v:.7g}") for v in changes.tolist()]}


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
