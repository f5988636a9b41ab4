"""What a budget is told of every tensor, measured on the codes themselves, and what it gives."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltalab.apply.extras import Extras, Provider, handed
from deltalab.budgets import Choice, Tensors
from deltalab.budgets.shared import Shared
from deltalab.edits import Edit
from deltalab.terminal import console
from deltalab.weights.mapping import Weights

Signal = Callable[[Weights], tuple[Mapping[str, float], Weights]]
"""Gives of the deltas of some tensors the loss change of each for a unit of squared error, and the
gradient half-way to what the edit gives without a budget."""


def provider(edit: Shared, extras: Extras, signal: Signal | None = None) -> Provider:
    """Return the provider of what a budget gives a tensor, worked out when it is first asked for.

    Args:
        edit: the edit, with its budget.
        extras: provider of what it asks for beside.
        signal: what the loss makes of errors, for budgets that want to know.

    Raises:
        ValueError: by the provider: a budget that wants a signal where there is none, an edit
            without a code, or a total that cannot be met.
    """
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    if signal is None and "sensitivity" in edit.budget.wants(str(edit.edit.spends)):
        raise ValueError(
            "budget.signal=loss: needs the loss of a live model; budget.signal=energy does not"
        )

    def share(name: str, deltas: Weights) -> Any:
        names = tuple(deltas)
        if names not in known:
            told = told_of(edit, extras, deltas, signal)
            known[names] = edit.budget(told, edit.edit.spends)
        return known[names][name]

    return share


def told_of(
    edit: Shared, extras: Extras, deltas: Weights, signal: Signal | None
) -> dict[str, Tensors]:
    """Return what a budget wants to know of all tensors.

    Args:
        edit: the edit, with its budget.
        extras: provider of what it asks for.
        deltas: of all tensors that are edited.
        signal: as for `provider`.
    """
    spends = str(edit.edit.spends)
    wants = edit.budget.wants(spends)
    values = getattr(edit.budget, "choices", None) or edit.edit.choices
    slopes, gradient = signal(deltas) if signal and "sensitivity" in wants else ({}, {})
    found = {}
    with console.steps("budget", len(deltas)) as step:
        for name in deltas:
            delta = deltas[name]
            numbers = [v for v in values if isinstance(v, int | float)]
            one = Tensors(
                delta.numel(),
                getattr(edit.of(name), spends, getattr(edit.edit, spends)),
                std=float(delta.double().std(correction=0)) if delta.numel() else 0.0,
                limits=(min(numbers, default=0), max(numbers, default=0)),
                sensitivity=float(slopes.get(name, 1.0)),
            )
            if "energies" in wants and delta.ndim > 1 and delta.numel():
                s = extras.memo.svd(name, deltas)[1]
                one = replace(one, energies=s.double().square().cpu().numpy())
            if "choices" in wants:
                grad = gradient[name] if gradient else None
                one = replace(one, choices=_choices(edit, extras, name, deltas, values, grad))
            found[name] = one
            step()
    return found


def _choices(
    edit: Shared,
    extras: Extras,
    name: str,
    deltas: Weights,
    values: Any,
    grad: Tensor | None,
) -> tuple[Choice, ...]:
    """Return the edit's own setting and all others that are valid, as their codes have them."""
    found = []
    for share in (None, *values):
        try:
            made = extras.seen(edit.of(name, share), name, deltas)
        except ValueError:
            if getattr(edit.budget, "choices", None):
                raise
            continue  # out of range with the edit's other settings
        found.append(_choice(made, extras, name, deltas, share, grad))
    return tuple(found)


def _choice(
    edit: Edit, extras: Extras, name: str, deltas: Weights, share: Any, grad: Tensor | None
) -> Choice:
    delta = deltas[name]
    needs = handed(extras.for_tensor(name, deltas), delta.device)
    with torch.no_grad():
        code = edit.encode(delta, **needs)
    if code is None:
        raise ValueError(
            f"budget: edit {type(edit).__name__} with these settings has no code whose bits could"
            " be counted"
        )
    off = code.decode().double() - delta.cpu().double()
    slope = 0.0
    if grad is not None:
        mean = _mean(off, delta.cpu().double()) if "rng" in edit.needs else off
        slope = float((grad.cpu().double() * mean).sum())
    return Choice(share, code.bits.total, float((off * off).sum()), slope)


def _mean(off: Tensor, delta: Tensor) -> Tensor:
    """Return the part of a random error that is along the delta: one draw's rest has no mean."""
    norm = float((delta * delta).sum())
    return delta * (float((off * delta).sum()) / norm) if norm else off
