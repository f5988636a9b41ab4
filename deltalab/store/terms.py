"""The Riemann approximation of a point's loss change, as its record holds it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltalab.store.fields import Kind, flatten, mapping, number, numbers

ABOUT = ("points", "converged", "error", "gradient_evaluations", "rounding")
"""What there is to say of a term's value."""
PREDICTIONS = ("first_order", "second_order", "closed_form")
"""Predictions that are accounts of the change, as the rules' terms are."""


@dataclass(frozen=True)
class Term:
    """The Riemann approximation of one point's loss change by one rule, in the loss's unit.

    Attributes:
        rule: the quadrature rule, or the prediction, that it is by.
        points: its number of nodes.
        by_part: the value's share of every part of the model.
        converged: whether `error`, its own estimate, is as small as was wanted.
        nodes: where the path was looked at, t in [0, 1].
        inner: the inner product of gradient and shift at every node.
        gradient_evaluations: the passes that were made for it.
        rounding: how far rounding to 16 bits moves the middle of its path, relative to the shift.
    """

    rule: str
    points: int | None
    value: float | None
    by_part: Mapping[str, float] = field(default_factory=dict)
    converged: bool | None = None
    error: float | None = None
    nodes: tuple[float | None, ...] = ()
    inner: tuple[float | None, ...] = ()
    gradient_evaluations: int | None = None
    rounding: float | None = None


def _term(rule: str, found: Mapping[str, Any]) -> Term:
    counts = (number(found.get(name)) for name in ("points", "gradient_evaluations"))
    points, passes = (None if count is None else int(count) for count in counts)
    settled = found.get("converged")
    return Term(
        rule,
        points,
        number(found.get("value")),
        numbers(found.get("by_part"), "by_part"),
        settled if isinstance(settled, bool) else None,
        number(found.get("error")),
        _sequence(found.get("nodes")),
        _sequence(found.get("inner")),
        passes,
        number(found.get("rounding")),
    )


def _sequence(value: Any) -> tuple[float | None, ...]:
    return tuple(number(each) for each in value) if isinstance(value, list | tuple) else ()


def told(term: Term) -> dict[str, Any]:
    """Return a term as JSON, without its nodes and what is not known of it."""
    about = {name: getattr(term, name) for name in ("value", "by_part", *ABOUT)}
    return {"rule": term.rule, **{k: v for k, v in about.items() if v not in (None, {})}}


def terms_of(value: Any, name: str) -> dict[str, Term]:
    """Read terms by rule.

    Raises:
        ValueError: one is no object.
    """
    named = mapping(value, name)
    found = {str(rule): mapping(each, str(rule)) for rule, each in named.items()}
    return {rule: _term(rule, each) for rule, each in found.items() if each}


def _flat_terms(terms: Mapping[str, Term]) -> Iterator[tuple[str, Any]]:
    for rule, term in terms.items():
        yield rule, term.value
        for name in ABOUT:
            yield f"{rule}/{name}", getattr(term, name)
        yield from flatten(term.by_part, f"{rule}/by_part/")


TERMS = Kind(
    "terms by rule",
    terms_of,
    lambda terms: {rule: told(t) for rule, t in terms.items() if rule not in PREDICTIONS},
    _flat_terms,
    many=True,
)
MAIN = Kind(
    "a term, held by its rule's name",
    lambda value, name: str(rule) if (rule := mapping(value, name).get("rule")) else None,
    lambda rule: {"rule": rule},
    lambda rule: iter([("rule", rule)]),
)
