"""Simulated points: documents that an edit loses and wins by chance, losses with errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltalab.store.record import Outcome
from deltalab.store.terms import Term

GSM, CHOICE = "gsm/exact_match_strict", "choice/acc"


@dataclass(frozen=True, eq=False)
class World:
    """One data set, as an experiment would leave it.

    Attributes:
        rng: chance.
        count: documents of every task.
        right: the share of them that the post-trained model has right.
        churn: the share of documents that an edit loses by chance, and as many that it wins.
        points: of the edits so far.
        documents: what their documents scored.
    """

    rng: np.random.Generator
    count: int = 1000
    right: float = 0.8
    churn: float = 0.005
    points: list[Outcome] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    _post: dict[tuple[str, str], Any] = field(default_factory=dict)

    def scored(
        self,
        edit: str,
        settings: Mapping[str, Any],
        gains: Mapping[str, float],
        draws: int = 1,
        model: str = "m",
        **more: Any,
    ) -> None:
        """Add an edit whose scores differ from post's by these amounts in expectation.

        Half of what it loses or wins is lost or won in every draw, as some documents are harder
        than others, the other half in each draw for itself.
        """
        after = {metric: self._edited(model, metric, g, draws) for metric, g in gains.items()}
        post = {metric: self._of_post(model, metric) for metric in gains}
        reference = {"post": {metric: float(scores.mean()) for metric, scores in post.items()}}
        for draw in range(draws):
            key = f"{len(self.points)}"
            self.documents[key] = {metric: scores[draw] for metric, scores in after.items()}
            self.documents[key] |= {f"{metric}@post": scores for metric, scores in post.items()}
            means = {metric: float(scores[draw].mean()) for metric, scores in after.items()}
            self.points.append(
                Outcome(model, edit, settings, key=key, seed=draw, metrics=means,
                        reference=reference, **more)
            )  # fmt: skip

    def lost(
        self,
        edit: str,
        settings: Mapping[str, Any],
        change: float,
        error: float,
        spread: Sequence[float] = (0.0,),
        rules: Mapping[str, float | None] | None = None,
        model: str = "m",
    ) -> None:
        """Add an edit that changes the loss, measured with an error of its own.

        Args:
            edit: its name.
            settings: its hyper-parameters.
            change: in expectation, over draws and examples.
            error: standard error of the examples, the same in every draw.
            spread: for every draw, how far it is from the mean, in expectation.
            rules: how far the rules' terms are from the measured change; None: the same.
            model: its name.
        """
        off = error * self.rng.standard_normal()
        for draw, wide in enumerate(spread):
            own = change + off + wide * self.rng.standard_normal()
            terms = {r: Term(r, None, own + (apart or 0.0)) for r, apart in (rules or {}).items()}
            self.points.append(
                Outcome(model, edit, settings, key=f"{len(self.points)}", seed=draw, change=own,
                        error=error, terms=terms)
            )  # fmt: skip

    def _of_post(self, model: str, metric: str) -> Any:
        if (model, metric) not in self._post:
            self._post[model, metric] = (self.rng.random(self.count) < self.right).astype(float)
        return self._post[model, metric]

    def _edited(self, model: str, metric: str, gain: float, draws: int) -> Any:
        post = self._of_post(model, metric)
        won, lost = max(gain, 0.0) + self.churn, max(-gain, 0.0) + self.churn
        chance = np.where(post > 0, lost / self.right, won / (1 - self.right))
        shared = self.rng.random(self.count) < 0.5
        own, same = self.rng.random((draws, self.count)), self.rng.random(self.count)
        turned = np.where(shared, same, own) < chance
        return np.where(turned, 1 - post, post)
