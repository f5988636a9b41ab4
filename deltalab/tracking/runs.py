"""What a run of a tracker shows of a point's record: flat names, numbers apart from words."""

import json
import re
from collections.abc import Mapping
from typing import Any

from deltalab.store import shown
from deltalab.store.fields import Shows, flatten
from deltalab.store.record import Outcome, table

MOST_OF_NAME = 128
MOST_OF_TAG = 64  # characters: the service refuses longer ones, and a tag twice
_SECRET = re.compile(r"(^|_)(api_key|apikey|token|secret|passw(or)?d|credentials?)$", re.IGNORECASE)


def run_name(point: Outcome) -> str:
    """Name a run for a person.

    >>> run_name(Outcome("mnist_vit", "dare", {"p": 0.5, "k": 0.0}, seed=0))
    'dare p=0.5 k=0 seed=0 mnist_vit'
    """
    return shown.name(f"{point.label} seed={point.seed} {point.pair}", MOST_OF_NAME)


def tags(point: Outcome, experiment: str | None) -> list[str]:
    """Tag a run with its model, edit, class or status, and experiment, where it has them."""
    found = [point.model, point.pair, point.edit, point.classed or point.status, experiment]
    return list(dict.fromkeys(shown.name(tag, MOST_OF_TAG) for tag in found if tag))


def config(point: Outcome) -> dict[str, Any]:
    """Return what identifies a point: its configuration and origin, flat and without secrets.

    >>> config(Outcome("vit", "dare", {"p": 0.5}, config={"api_key": "x", "seed": 0}))["edit/p"]
    0.5
    """
    pairs = {**dict(flatten(point.config)), **_flat(point, origin=True)}
    kept = {k: v for k, v in pairs.items() if not _SECRET.search(k.rpartition("/")[2])}
    return dict(sorted(kept.items()))


def essence(record: Mapping[str, Any]) -> str:
    """Return a record as JSON for `deltalab-report from=wandb` to read.

    It is without what has a secret's name; numbers that JSON cannot hold are null.

    >>> essence({"key": "0a", "loss": {"change": float("nan"), "token": "x"}})
    '{"key": "0a", "loss": {"change": null}}'
    """
    text = json.dumps(_public(record))
    return json.dumps(json.loads(text, parse_constant=lambda _: None))


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items() if not _SECRET.search(k)}
    return value


def nodes(point: Outcome) -> list[dict[str, float | None]]:
    """Return one row for each node of the rules: its place on the path and its inner product.

    Raises:
        ValueError: a rule has more of the ones than of the others.

    >>> from deltalab.store.terms import Term
    >>> term = Term("left", 2, 0.1, nodes=(0.0, 0.5), inner=(1.0, 3.0))
    >>> nodes(Outcome("vit", "dare", terms={"left": term}))[1]
    {'left/t': 0.5, 'left/inner': 3.0}
    """
    rows: list[dict[str, float | None]] = []
    for rule, term in point.terms.items():
        for index, (t, inner) in enumerate(zip(term.nodes, term.inner, strict=True)):
            rows.extend([{}] * (index + 1 - len(rows)))
            rows[index] = {**rows[index], f"{rule}/t": t, f"{rule}/inner": inner}
    return rows


def numbers(point: Outcome) -> dict[str, float]:
    """Return all results of a point that are numbers, by flat names; metrics keep theirs.

    >>> numbers(Outcome("vit", "dare", change=0.5, metrics={"mnist/accuracy": 0.9}))
    {'margin': 0.02, 'loss/change': 0.5, 'mnist/accuracy': 0.9}
    """
    found = {k: v for k, v in _flat(point).items() if isinstance(v, int | float)}
    main = point.terms[point.main].value if point.main else None
    return found if main is None else {"term": main, **found}


def words(point: Outcome) -> dict[str, str]:
    """Return the results that are words: status, class, the loss's unit, and what went wrong.

    >>> words(Outcome("vit", "dare", classed="improved", unit="nats"))
    {'class': 'improved', 'loss/unit': 'nats', 'status': 'ok'}
    """
    return {name: value for name, value in _flat(point).items() if isinstance(value, str)}


def _flat(point: Outcome, origin: bool = False) -> dict[str, Any]:
    """Return what says where a point comes from, or what came out of it, by flat names."""
    shown = [each for each in table() if Shows.TRACKER in each.shows and each.origin == origin]
    pairs = (pair for each in shown for pair in each.flat(getattr(point, each.name)))
    return {name: value for name, value in pairs if value not in (None, "")}
