"""Read the records of a results directory, doubting what they hold: anyone may write there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltalab.report.outcomes import Outcome, Term, at_margin, number, plain, sort_key
from deltalab.store.effects import MARGIN
from deltalab.store.records import SCHEMA, enrolled


def read(directory: Path, warn: Callable[[str], None]) -> list[Outcome]:
    """Read all records of a results directory, in the order of `sort_key`.

    A point that belongs to several experiments is there once for each of them.

    Args:
        directory: holds `records/*.json`.
        warn: told in one line of every file that is no readable record; such files are skipped.
    """
    points, further = [], enrolled(directory)
    for path in sorted((directory / "records").glob("*.json")):
        try:
            point = parse(json.loads(path.read_text(encoding="utf-8")))
            also = [name for name in further.get(path.stem, ()) if name != point.experiment]
            points += [point, *(replace(point, experiment=name) for name in also)]
        except (OSError, ValueError, RecursionError) as problem:
            warn(f"skipped {path}: {' '.join(str(problem).split())}")
    return sorted(points, key=sort_key)


def parse(record: Any) -> Outcome:
    """Turn the JSON of one record into a point.

    Raises:
        ValueError: if it is no record, or one of a schema that this version cannot read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"not a record but a {type(record).__name__}")
    if record.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"schema {record['schema']!r}, this version reads schema {SCHEMA}")
    if record.get("status") not in ("ok", "error"):
        raise ValueError(f"status {record.get('status')!r}, must be 'ok' or 'error'")
    edit = _mapping(record, "edit")
    for name, value in (("model", record.get("model")), ("edit.name", edit.get("name"))):
        if not isinstance(value, str):
            raise ValueError(f"{name} {value!r}, must be a string")
    error, loss = _mapping(record, "error"), _mapping(record, "loss")
    failure = f"{error.get('type', 'Error')}: {error.get('message', '')}"
    terms, main = _terms(record)
    select = record.get("select")
    margin = number(record.get("margin"))
    point = Outcome(
        model=record["model"],
        edit=edit["name"],
        settings={name: value for name, value in edit.items() if name != "name"},
        experiment=str(record.get("experiment") or "runs"),
        key=str(record.get("key", "")),
        seed=record["seed"] if isinstance(record.get("seed"), int) else None,
        select=None if select is None else plain(select),
        terms=terms,
        main=main,
        change=number(loss.get("change")),
        error=number(loss.get("error")),
        gap=number(loss.get("gap")),
        gap_error=number(loss.get("gap_error")),
        half=loss.get("half"),
        losses=_numbers({name: loss.get(name) for name in ("pre", "post", "edited")}),
        objective=loss.get("objective"),
        unit=loss.get("unit"),
        metrics=_numbers(_mapping(record, "metrics")),
        reference={
            name: _numbers(_mapping(_mapping(record, "reference"), name))
            for name in ("pre", "post")
        },
        gradient_evaluations=number(record.get("gradient_evaluations")),
        seconds=number(_mapping(record, "seconds").get("total")),
        failure=failure if record["status"] == "error" else None,
    )
    return at_margin([point], MARGIN if margin is None else margin)[0]


PREDICTIONS = ("first_order", "second_order", "closed_form")


def _terms(record: Mapping[str, Any]) -> tuple[dict[str, Term], str | None]:
    main = _mapping(record, "term")
    named = _mapping(record, "terms") or ({str(main.get("rule")): main} if main else {})
    terms = {}
    for name in named:
        term = _mapping(named, name)
        if term:
            points, parts = number(term.get("points")), _numbers(_mapping(term, "by_part"))
            count = None if points is None else int(points)
            settled = term.get("converged")
            terms[name] = Term(name, count, number(term.get("value")), parts, settled)
    for name, value in _numbers(_mapping(record, "prediction")).items():
        if name in PREDICTIONS:  # one more account of the change, beside the rules'
            terms[name] = Term(name, None, value)
    return terms, str(main["rule"]) if main.get("rule") in terms else None


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} {value!r}, must be an object or null")
    return value or {}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}
