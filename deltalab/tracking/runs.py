"""What a run of a tracker shows of a point's record: flat names, numbers apart from words."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deltalab.report.outcomes import label

MOST_OF_TAG = 64  # characters: the service refuses longer ones, and a tag twice
_SECRET = re.compile(r"(^|_)(api_key|apikey|token|secret|passw(or)?d|credentials?)$", re.IGNORECASE)


def run_name(record: Mapping[str, Any]) -> str:
    """Name a run for a person.

    >>> edit = {"name": "dare", "p": 0.5, "k": 0.0}
    >>> run_name({"edit": edit, "seed": 0, "model": "mnist_vit"})
    'dare p=0.5 k=0 seed=0 mnist_vit'
    """
    edit = dict(record.get("edit") or {})
    name = label(str(edit.pop("name", "edit")), edit)
    return f"{name} seed={record.get('seed')} {record.get('model')}"


def tags(record: Mapping[str, Any]) -> list[str]:
    """Tag a run with its model, edit, class or status, and experiment, where it has them."""
    edit = (record.get("edit") or {}).get("name")
    kind = record.get("class") or record.get("status")
    found = [record.get("model"), edit, kind, record.get("experiment")]
    return list(dict.fromkeys(str(tag)[:MOST_OF_TAG] for tag in found if tag))


def config(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a point: its configuration and origin, flat and without secrets.

    >>> config({"model": "vit", "edit": {"name": "dare", "p": 0.5}, "config": {"api_key": "x"}})
    {'edit/name': 'dare', 'edit/p': 0.5, 'model': 'vit'}
    """
    origin = ("key", "experiment", "model", "seed", "select", "git", "device", "versions")
    named = {name: record.get(name) for name in (*origin, "edit")}
    pairs = {**dict(_flat(record.get("config") or {})), **dict(_flat(named))}
    kept = {k: v for k, v in pairs.items() if not _SECRET.search(k.rpartition("/")[2])}
    return dict(sorted(kept.items()))


def essence(record: Mapping[str, Any]) -> str:
    """Return a record as JSON, for `deltalab.report.offline` to read it back as from its file.

    It is without the configuration, which `config` gives, and without what has a secret's name;
    numbers that JSON cannot hold are null.

    >>> essence({"key": "0a", "loss": {"change": float("nan"), "token": "x"}, "config": {"a": 1}})
    '{"key": "0a", "loss": {"change": null}}'
    """
    kept = _public({name: value for name, value in record.items() if name != "config"})
    return json.dumps(json.loads(json.dumps(kept), parse_constant=lambda _: None))


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items() if not _SECRET.search(k)}
    return value


def nodes(record: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return one row for each node of the rules: its place on the path and its inner product.

    >>> nodes({"terms": {"left": {"nodes": [0.0, 0.5], "inner": [1.0, 3.0]}}})[1]
    {'left/t': 0.5, 'left/inner': 3.0}
    """
    rows: list[dict[str, float]] = []
    for rule, term in _terms(record).items():
        for index, (t, inner) in enumerate(
            zip(term.get("nodes") or (), term.get("inner") or (), strict=True)
        ):
            rows.extend([{}] * (index + 1 - len(rows)))
            rows[index] = {**rows[index], f"{rule}/t": t, f"{rule}/inner": inner}
    return rows


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return all results of a point that are numbers, by flat names; metrics keep theirs."""
    named: dict[str, Any] = {"term": (record.get("term") or {}).get("value")}
    for rule, term in _terms(record).items():
        named[f"term/{rule}"] = term.get("value")
        named[f"term/{rule}/by_part"] = term.get("by_part")
    for name in ("loss", "prediction", "touched", "seconds"):
        named[name] = record.get(name)
    for name in ("gradient_evaluations", "peak_memory_bytes"):
        named[name] = record.get(name)
    found = {**dict(_flat(named)), **(record.get("metrics") or {})}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and v is not None}


def words(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the results that are words: status, class, the loss's unit, and what went wrong."""
    loss, error = record.get("loss") or {}, record.get("error") or {}
    found = {
        "status": record.get("status"),
        "class": record.get("class"),
        "loss/objective": loss.get("objective"),
        "loss/unit": loss.get("unit"),
        "error/type": error.get("type"),
        "error/message": error.get("message"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _terms(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    terms = record.get("terms")
    if not terms and record.get("term"):
        terms = {record["term"].get("rule"): record["term"]}
    return {str(rule): term for rule, term in (terms or {}).items() if term}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value
