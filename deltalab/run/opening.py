"""What every edit of a pair shares: the live module, and both of its ends measured."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.artifacts import Store
from deltalab.data import splits
from deltalab.evaluators.scores import Scores
from deltalab.loss.engine import Engine
from deltalab.loss.objectives import Loss, Measured, change, measure
from deltalab.models import families
from deltalab.store import latest
from deltalab.store.effects import two_errors
from deltalab.terminal.console import one_line
from deltalab.weights import finite
from deltalab.weights.mapping import ModelPair, Weights, loaded

log = logging.getLogger(__name__)
OPENED = ("model", "objective", "evaluator")
"""What stays open from one point to the next."""


@dataclass(frozen=True, eq=False)
class Judge:
    """The objective that points are judged by, and both ends of the pair measured by it.

    Attributes:
        half: which half of the objective's examples; None: all of them.
        total: how many examples the whole objective has.
    """

    loss: Loss
    engine: Engine
    pre: Measured
    post: Measured
    half: splits.Half | None
    total: int

    def of_all(self, values: Tensor) -> Tensor:
        """Return values of the judged examples in their places among all, NaN elsewhere."""
        found = torch.full((self.total,), math.nan, dtype=values.dtype)
        found[splits.places(self.total, self.half)] = values
        return found


@dataclass(frozen=True, eq=False)
class Reference:
    """What every edit of a pair shares: the live module, and both of its ends measured.

    Attributes:
        calibrating: the objectives on whose examples layers are looked at, and gradients taken.
        peers: the weights of further post-trained models of the same base, by name.
        memo: what points make of it and share, by name.
    """

    pair: ModelPair
    whole: Judge
    score: Callable[[nn.Module], Scores]
    pre_scores: Scores
    post_scores: Scores
    store: Callable[[str | None], Store]
    calibrating: tuple[Loss, Loss]
    peers: Mapping[str, Weights] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    _halves: dict[str, Judge] = field(default_factory=dict)

    def judge(self, half: splits.Half | None) -> Judge:
        """Return the objective on one half of its examples, or on all of them."""
        if half is None:
            return self.whole
        if half not in self._halves:
            loss, total = splits.halved(self.whole.loss, half), self.whole.total
            rows = splits.places(total, half)
            pre, post = (
                Measured(m.losses[rows], m.weights[rows]) for m in (self.whole.pre, self.whole.post)
            )
            engine = Engine(self.pair, loss, self.store(half))
            self._halves[half] = Judge(loss, engine, pre, post, half, total)
        return self._halves[half]


class Unopened(ValueError):
    """The pair cannot be opened, and so no point of it can be run."""


Opening = tuple[Any, Any, Any, str, str, float | None, Mapping[str, Any], Any, Mapping[str, Any]]
"""What a pair is opened with: spec of the model, the arguments of `_measured` after the pair, and
the specs of its peers."""


@latest.latest("reference", *OPENED)
def family(openings: Mapping[str, Opening]) -> dict[str, Reference]:
    """Open every expert's pair, by name; all stay open until another model takes their place.

    Raises:
        Unopened: experts that cannot be opened, all named, or that do not fit each other.
    """
    pairs: dict[str, ModelPair] = {}
    wrong: dict[str, Exception] = {}
    peers = {name: _peers(*each) for name, each in openings.items()}
    for name, (model, _, _, nonfinite, *_) in openings.items():
        try:
            pairs[name] = _pair(model, nonfinite)
        except Unopened as error:
            wrong[name] = error
    if wrong:
        names, text = ", ".join(wrong), next(iter(wrong.values()))
        raise Unopened(f"model.experts: {names}: {text}")
    try:
        families.check_family(pairs)
    except ValueError as error:
        raise Unopened(one_line(error)) from error
    return {
        name: _measured(pairs[name], *each[1:8], peers=peers[name])
        for name, each in openings.items()
    }


@latest.latest("reference", *OPENED)
def opened(*opening: Any) -> Reference:
    """Open a pair, with its objective and evaluator: an `Opening`, taken apart."""
    peers = _peers(*opening)  # before the pair, which then is what stays open
    pair = _pair(opening[0], opening[3])
    return _measured(pair, *opening[1:8], peers=peers)  # type: ignore[misc]


def _peers(*opening: Any) -> dict[str, ModelPair]:
    """Open the peers of a pair, each as a pair of its own with the same base.

    Raises:
        Unopened: one that cannot be opened.
    """
    found = {}
    for name, spec in (opening[8] if len(opening) > 8 else {}).items():
        try:
            found[name] = _pair(spec, opening[3])
        except Unopened as error:
            raise Unopened(f"peers.{name}: {error}") from error
    return found


def _pair(model: Any, nonfinite: str) -> ModelPair:
    try:
        return finite.checked(model.open(), nonfinite)
    except (ValueError, OSError) as error:
        raise Unopened(one_line(error)) from error


def _measured(
    pair: ModelPair,
    objective: Any,
    evaluator: Any,
    nonfinite: str,
    artifacts: str,
    artifacts_gb: float | None,
    shared: Mapping[str, Any],
    calibrating: tuple[Any, Any] = (None, None),
    peers: Mapping[str, ModelPair] | None = None,
) -> Reference:
    """Open the objective and evaluator of a pair, and measure both of its ends, once.

    Args:
        pair: the open pair.
        objective: spec of the loss.
        evaluator: spec of the scores; None: none.
        nonfinite: what becomes of NaN and infinities in the weights.
        artifacts: where gradients and slopes are kept.
        artifacts_gb: how much of them; None: all.
        shared: what decides them, ready for JSON.
        calibrating: specs of the losses on whose examples layers are looked at and squared
            gradients taken; None: the objective.
        peers: further pairs of the same base, by name; their modules are let go.
    """
    most = math.inf if artifacts_gb is None else artifacts_gb * 1e9

    def store(half: str | None) -> Store:
        return Store(artifacts, {**shared, **({"half": half} if half else {})}, most)

    # Before the objective, which then is what stays open.
    others = [spec.open(pair, store(None)) if spec is not None else None for spec in calibrating]
    loss = objective.open(pair, store(None))
    score = evaluator.open(pair) if evaluator is not None else lambda module: Scores({}, {})
    post, post_scores = measure(pair.module, loss), score(pair.module)
    with loaded(pair.module, pair.pre, restore=pair.post):
        pre, pre_scores = measure(pair.module, loss), score(pair.module)
    if hasattr(evaluator, "warn"):
        evaluator.warn(pre_scores)
    if two_errors(*change(pre, post)) == "decreased":
        log.warning(
            "the pre-trained model has a lower loss than the post-trained one, %.4f < %.4f %s:"
            " are model.pre and model.post swapped?",
            pre.mean,
            post.mean,
            loss.unit,
        )
    engine = Engine(pair, loss, store(None))
    whole = Judge(loss, engine, pre, post, None, len(post.losses))
    layers, squares = others[0] or loss, others[1] or others[0] or loss
    beside = families.peers(pair, peers or {})
    return Reference(pair, whole, score, pre_scores, post_scores, store, (layers, squares), beside)
