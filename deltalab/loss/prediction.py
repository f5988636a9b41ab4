"""Predicted loss changes, from derivatives at W_post alone: no edit is evaluated.

With g and H the gradient and Hessian of the objective at W_post, and E the shift:

* first order: <g, E>, the account of arXiv 2410.13841;
* second order: <g, E> + E'HE / 2, with one Hessian-vector product an edit, or a line;
* closed form, for random edits E_i = D_i x_i with independent x_i of mean m and variance v:
  E[change] ~= m <g, D> + (m^2 D'HD + v sum_i H_ii D_i^2) / 2. The variance factor v is our reading
  of the follow-up's "editing intensity". Only m and v depend on p and k, so that a whole grid costs
  nothing once the curvature is known.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.artifacts import Store
from deltalab.edits import Edit, Line, Moments
from deltalab.loss.objectives import Loss
from deltalab.loss.passes import curvature, inner, probing, targets
from deltalab.rng import Rng
from deltalab.store.digests import key_of
from deltalab.weights.mapping import LazyWeights, Weights, meta


def first_order(module: nn.Module, gradient: Weights, shift: Weights) -> float:
    """Return <g, E> over the parameters that the shift moves, tied ones once."""
    return math.fsum(inner(gradient[n], shift[n]).item() for n in targets(module, shift))


def quadratic(module: nn.Module, post: Weights, shift: Weights, loss: Loss) -> float:
    """Return E'HE at W_post: one Hessian-vector product."""
    touched = targets(module, shift)
    if not touched:
        return 0.0
    with probing(module, touched, post):
        return math.fsum(curvature(module, touched, shift, loss).values())


@dataclass(frozen=True)
class Predict:
    """What is predicted.

    Args:
        enabled: whether anything is.
        probes: Hutchinson probes for the closed form's diagonal, each a Hessian-vector product over
            the whole objective, made once for a pair; 0 leaves the closed form out.
    """

    enabled: bool
    probes: int = 0

    def __post_init__(self) -> None:
        if self.probes < 0 or self.probes == 1:
            raise ValueError(
                f"prediction.probes={self.probes}: must be 0, or 2 or more for an error estimate"
            )


@dataclass(frozen=True)
class Predictor:
    """Predictions for one pair under one objective, with what they share.

    Args:
        settings: what to predict.
        store: keeps the curvature on disk.
    """

    settings: Predict
    store: Store
    _known: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def predict(
        self,
        module: nn.Module,
        post: Weights,
        shift: Weights,
        delta: Weights,
        loss: Loss,
        edit: Edit,
        line: Line | None,
        selection: Mapping[str, Any],
        gradient: Weights,
    ) -> dict[str, Any]:
        """Return the predictions as the record holds them.

        Args:
            module: the live module, holding `post`.
            post: the post-trained weights.
            shift: W_edit - W_post.
            delta: W_post - W_pre of the whole pair.
            loss: the opened objective.
            edit: the edit.
            line: the line it shares with others (`Edit.line`), if it does.
            selection: what else determines the shift, ready for JSON: select, seed, dtype.
            gradient: the gradient at W_post.
        """
        found: dict[str, Any] = {"first_order": first_order(module, gradient, shift)}
        bent, products = self._along(module, post, shift, loss, line, selection)
        found["second_order"] = found["first_order"] + bent / 2
        known = edit.moments()
        if known is not None and self.settings.probes:
            chosen = LazyWeights(shift, delta.__getitem__, partial(meta, delta))
            closed, error, made = self._closed(
                module, post, chosen, delta, loss, known, gradient, selection
            )
            found |= {"closed_form": closed, "closed_form_error": error}
            products += made
        return found | {"hessian_products": products}

    def _along(
        self,
        module: nn.Module,
        post: Weights,
        shift: Weights,
        loss: Loss,
        line: Line | None,
        selection: Mapping[str, Any],
    ) -> tuple[float, int]:
        """Return E'HE, along a line s^2 times one number, and how many products it took."""
        if line is None:
            return quadratic(module, post, shift, loss), 1
        if line.at == 0:
            return 0.0, 0
        key = {"line": line.family, **selection}
        known = self._load("curvature", key)
        made = "unit" not in known
        if made:
            known["unit"] = quadratic(module, post, shift, loss) / line.at**2
            self._keep("curvature", key, known)
        return known["unit"] * line.at**2, int(made)

    def _closed(
        self,
        module: nn.Module,
        post: Weights,
        chosen: Weights,
        delta: Weights,
        loss: Loss,
        known: Moments,
        gradient: Weights,
        selection: Mapping[str, Any],
    ) -> tuple[float, float, int]:
        """Return the closed form, its standard error from the probes, and the products made.

        It is a mean over draws: the deltas of all selected tensors count, also of such as this
        draw happened to leave where they were.
        """
        mean, variance = known
        made = 0
        names = list(targets(module, chosen))
        if not names:
            return 0.0, 0.0, 0
        value = 0.0
        if mean:
            some = {n: delta[n] for n in names}
            key = {"bent": "delta", "select": selection.get("select"), "names": sorted(names)}
            whole = self._load("curvature", key)
            if not whole:
                whole["delta"] = quadratic(module, post, some, loss)
                self._keep("curvature", key, whole)
                made += 1
            value = mean * first_order(module, gradient, some) + mean**2 * whole["delta"] / 2
        error = 0.0
        if variance:
            probes, more = self._probes(module, post, delta, loss)
            made += more
            sums = torch.tensor([math.fsum(p.get(n, 0.0) for n in names) for p in probes])
            value += variance / 2 * sums.mean().item()
            error = variance / 2 * sums.std().item() / math.sqrt(len(probes))
        return value, error, made

    def _probes(
        self, module: nn.Module, post: Weights, delta: Weights, loss: Loss
    ) -> tuple[list[dict[str, float]], int]:
        """Return every probe's estimate of sum H_ii D_i^2 by tensor, and the products made."""
        known = self._load("curvature", {"diagonal": "delta"})
        probes: list[dict[str, float]] = known.get("probes", [])
        missing = range(len(probes), self.settings.probes)
        probes = probes + [diagonal_probe(module, post, delta, loss, seed) for seed in missing]
        if missing:
            self._keep("curvature", {"diagonal": "delta"}, {"probes": probes})
        return probes[: self.settings.probes], len(missing)

    def _load(self, kind: str, key: Mapping[str, Any]) -> dict[str, Any]:
        name = key_of({"kind": kind, **key})
        if name not in self._known:
            self._known[name] = self.store.numbers(kind, key) or {}
        return dict(self._known[name])

    def _keep(self, kind: str, key: Mapping[str, Any], value: dict[str, Any]) -> None:
        self._known[key_of({"kind": kind, **key})] = value
        self.store.keep_numbers(kind, key, value)


def diagonal_probe(
    module: nn.Module, post: Weights, delta: Weights, loss: Loss, seed: int
) -> dict[str, float]:
    """Return one unbiased estimate of sum_i H_ii D_i^2 over every tensor.

    Hutchinson's estimator aligned with the delta: for v = r * D with independent signs r,
    E[v_n'(Hv)_n] = sum over tensor n of H_ii D_i^2, as the signs of different entries cancel.

    Args:
        module: the live module, holding `post` before and after.
        post: the post-trained weights.
        delta: W_post - W_pre.
        loss: the opened objective.
        seed: of the signs.
    """

    def signed(name: str) -> Tensor:
        values = delta[name]
        return torch.where(Rng(seed, f"hutchinson/{name}").below(values, 0.5), -values, values)

    names = dict(module.named_parameters(remove_duplicate=False))
    vector = LazyWeights([n for n in delta if n in names], signed, partial(meta, delta))
    touched = targets(module, vector)
    with probing(module, touched, post):
        return curvature(module, touched, vector, loss)
