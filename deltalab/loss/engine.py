"""One pair under one objective: all that its points share, and every account of a loss change."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltalab.artifacts import Store
from deltalab.edits import Edit
from deltalab.loss import passes
from deltalab.loss.lines import Lines, approximate
from deltalab.loss.objectives import Loss
from deltalab.loss.passes import gradient, rounding
from deltalab.loss.prediction import Predict, Predictor
from deltalab.loss.riemann import Riemann, Term
from deltalab.weights.layouts import layout_of
from deltalab.weights.mapping import ModelPair, Weights, delta, live, meta

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """What was worked out for one edit.

    Attributes:
        terms: rule -> term, the main one first.
        prediction: the predictions, as the record holds them; None where none were asked for.
        gradient_evaluations: those made since the last edit, the one at W_post included.
    """

    terms: dict[str, Term]
    prediction: dict[str, Any] | None
    gradient_evaluations: int


@dataclass(frozen=True, eq=False)
class Engine:
    """Terms and predictions of a pair's edits, sharing gradients, lines and curvature.

    Args:
        pair: the open pair, whose module holds `post`.
        loss: the opened objective.
        store: where artefacts are kept between processes.
        wide: whether a module in 16 bits is widened to float32 for all of it.
    """

    pair: ModelPair
    loss: Loss
    store: Store
    wide: bool = False
    _made: list[int] = field(default_factory=list, init=False)
    _told: list[bool] = field(default_factory=list, init=False)
    _predictors: dict[Predict, Predictor] = field(default_factory=dict, init=False)

    @property
    def gradient(self) -> Weights:
        """The gradient at W_post, under the names of the pair's files."""
        return layout_of(self.pair.module).filed(self.first)

    @cached_property
    def first(self) -> dict[str, Tensor]:
        """The gradient at W_post, under the module's names: from the store, or one evaluation."""

        def compute() -> dict[str, Tensor]:
            self._made.append(1)
            return gradient(self.pair.module, self.loss)

        device = next(self.pair.module.parameters()).device
        found = self.store.tensors("gradient", compute)
        return {name: value.to(device) for name, value in found.items()}

    @cached_property
    def widened(self) -> "Engine":
        """The engine of the same pair and objective that works in float32, with its own store."""
        apart = replace(self.store, determinants={**self.store.determinants, "dtype": "float32"})
        return Engine(self.pair, self.loss, apart, wide=True)

    @cached_property
    def lines(self) -> Lines:
        """The lines of the pair, as far as they are known."""
        return Lines(self.store)

    def changes(
        self,
        edit: Edit,
        shift: Weights,
        selection: Mapping[str, Any],
        settings: Riemann,
        predict: Predict,
        post: Weights | None = None,
        compared: bool = False,
    ) -> Changes:
        """Return the terms and predictions of one edit.

        Args:
            edit: the edit.
            shift: W_edit - W_post as stored, in memory.
            selection: what determines the shift beside pair and edit, ready for JSON: select, seed.
            settings: the rules.
            predict: what to predict.
            post: the pair's post-trained weights as far as the edit shifts them, where they are in
                memory: every node of the path starts from them.
            compared: as for `lines.alone`.

        Raises:
            ValueError: as for `riemann.terms`.
        """
        module, whole = self.pair.module, self.pair.post
        narrow = any(p.element_size() == 2 for p in module.parameters())
        if settings.dtype and narrow and not self.wide:
            with passes.widened(module):
                return self.widened.changes(
                    edit, shift, selection, settings, predict, post, compared
                )
        post = live(module, whole if post is None else post, whole)
        if layout_of(module).groups:
            shift = dict(live(module, shift))
        first = self.first if settings.starts_at_post or predict.enabled else None
        exact = _exact(post, shift)
        line = edit.line() if exact else None
        lost = None if exact or self.wide or settings.rule is None else rounding(post, shift)
        if lost is not None and not self._told:
            self._told.append(True)
            log.warning(
                "the term is taken in 16 bits, which round every node on the way from W_post to"
                " W_edit, its middle by %.2g of the shift: its size may be off however many nodes"
                " it has; riemann.dtype=float32 is not, nor is model.dtype=float32",
                lost,
            )
        terms = approximate(
            settings,
            self.lines,
            module,
            post,
            shift,
            self.loss,
            line,
            selection,
            first,
            compared,
        )
        terms = {name: replace(term, rounding=lost) for name, term in terms.items()}
        prediction = None
        if predict.enabled:
            assert first is not None
            predictor = self._predictors.setdefault(predict, Predictor(predict, self.store))
            prediction = predictor.predict(
                module,
                post,
                shift,
                self._delta,
                self.loss,
                edit,
                line,
                selection,
                first,
            )
        made = sum(self._made) + sum(term.gradient_evaluations for term in terms.values())
        self._made.clear()
        return Changes(terms, prediction, made)

    @property
    def _delta(self) -> Weights:
        return live(self.pair.module, delta(self.pair.pre, self.pair.post))


def _exact(post: Weights, shift: Weights) -> bool:
    """Whether edited weights are stored finely enough to lie on a line with others.

    In 16 bits, rounding moves every point off the line by as much as a small delta.
    """
    return all(meta(post, name).dtype in (torch.float32, torch.float64) for name in shift)
