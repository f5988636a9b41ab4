"""A point's record: every field once, what reads it from JSON and what writes it.

A record is one JSON object: `DIR/records/<key>.json`, or one line of a `.jsonl` file, which holds
the same fields without the configuration (`line`). `Outcome` is the table of its fields. Whoever
shows, exports or tracks records goes through `table`, so that a new field is one line here. Nothing
in it needs more than the standard library.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

from deltalab.store import pairs, shown
from deltalab.store.effects import MARGIN, classify, two_errors
from deltalab.store.fields import (
    ANEW,
    CHOICE,
    ENDS,
    EVERYWHERE,
    FILES,
    NUMBER,
    NUMBERS,
    SETTINGS,
    TEXT,
    WHOLE,
    Field,
    Kind,
    Shows,
    fields_of,
    flatten,
    held,
    mapping,
    plain,
)
from deltalab.store.terms import MAIN, PREDICTIONS, TERMS, Term, terms_of

SCHEMA = 1
NOT_IN_PAGE = EVERYWHERE & ~Shows.PAGE
"""The list of all points has no room for everything."""
NOT_IN_LINE = EVERYWHERE & ~Shows.CONSOLE
"""A line names what its sweep varies."""
CONFIG = Kind("settings", lambda value, name: pairs.shared(value), dict, flatten, many=True)


@dataclass(frozen=True)
class Outcome:
    """One edit of one pair, as its record tells it; what the run did not compute is None or empty.

    Every line declares a field: its place in the JSON, its type, its title, its unit, and where it
    shows (everywhere unless it says otherwise). A field with `derive` is worked out from others
    where a record has none. Their order is that of all tables.
    """

    model: str = held(
        "model", TEXT, "option", shows=FILES, origin=True, default=MISSING, first=True
    )
    pair: str = held(
        "pair.label", TEXT, "model", origin=True, default="",
        derive=lambda p: pairs.label(p.model, p.config.get("model")),
    )  # fmt: skip
    edit: str = held("edit.name", TEXT, "edit", origin=True, default=MISSING, first=True)
    settings: Mapping[str, Any] = held("edit.*", SETTINGS, "settings", origin=True, first=True)
    data: str | None = held(
        "pair.data", TEXT, "data", spare=2, origin=True, shows=NOT_IN_LINE,
        derive=lambda p: pairs.data(p.config),
    )  # fmt: skip
    objective: str | None = held(
        "pair.objective", TEXT, "objective", spare=2, origin=True, shows=NOT_IN_LINE,
        derive=lambda p: p.loss_name,
    )  # fmt: skip
    evaluator: str | None = held(
        "pair.evaluator", TEXT, "evaluator", spare=6, origin=True, shows=FILES | Shows.TABLE,
        derive=lambda p: pairs.evaluator(p.config),
    )  # fmt: skip
    setup: str = held(
        "pair.id", TEXT, "setup", shows=FILES, origin=True, default="",
        derive=lambda p: pairs.identity(p.config),
    )  # fmt: skip
    merge: str | None = held("merge.name", TEXT, "merge", origin=True)
    merging: Mapping[str, Any] = held("merge.*", SETTINGS, "merge", origin=True)
    seed: int | None = held("seed", WHOLE, origin=True, shows=NOT_IN_LINE)
    select: str | None = held("select", CHOICE, spare=4, origin=True, shows=NOT_IN_LINE)
    salt: str = held("salt", TEXT, origin=True, default="", shows=FILES)
    classed: str | None = held("class", ANEW, spare=1, derive=lambda p: class_of(p, p.change))
    class_two_errors: str | None = held(
        "class_two_errors", ANEW, shows=FILES, derive=lambda p: two_errors(p.change, p.error)
    )
    margin: float = held("margin", NUMBER, unit="share of the gap", shows=FILES, default=MARGIN)
    terms: Mapping[str, Term] = held("terms", TERMS, "term", alias="term")
    main: str | None = held("term", MAIN, "main rule", shows=FILES)
    prediction: Mapping[str, float] = held("prediction", NUMBERS, shows=FILES)
    change: float | None = held("loss.change", NUMBER, "measured change")
    error: float | None = held("loss.error", NUMBER, "± error")
    gap: float | None = held("loss.gap", NUMBER, "gap", shows=FILES)
    gap_error: float | None = held("loss.gap_error", NUMBER, "± of the gap", shows=FILES)
    half: str | None = held("loss.half", TEXT, "half of the examples", shows=FILES)
    losses: Mapping[str, float] = held("loss.*", NUMBERS, "loss", shows=FILES)
    loss_name: str | None = held("loss.objective", TEXT, "objective", shows=Shows.TRACKER)
    unit: str | None = held("loss.unit", TEXT, "unit of the loss", shows=FILES)
    metrics: Mapping[str, float] = held("metrics", NUMBERS, alias="", shows=NOT_IN_PAGE)
    reference: Mapping[str, Mapping[str, float]] = held("reference", ENDS, shows=FILES)
    experts: Mapping[str, Any] = held("experts", SETTINGS, "expert", shows=FILES)
    overlap: Mapping[str, Any] = held("overlap", SETTINGS, "overlap of the deltas", shows=FILES)
    stream: Mapping[str, Any] = held("stream", SETTINGS, "stream of tasks", shows=FILES)
    tensors: int | None = held("touched.tensors", WHOLE, "tensors touched", shows=FILES)
    parameters: int | None = held("touched.parameters", WHOLE, "parameters touched", shows=FILES)
    of_parameters: int | None = held("touched.of_parameters", WHOLE, "parameters", shows=FILES)
    relative_shift: float | None = held(
        "touched.relative_shift", NUMBER, "relative shift", unit="|shift| / |delta|", shows=FILES
    )
    sparsity: float | None = held(
        "touched.sparsity", NUMBER, "sparsity", unit="share of touched entries", shows=FILES
    )
    kept: float | None = held(
        "touched.kept", NUMBER, "kept", unit="share of separate experts' numbers", shows=FILES
    )
    learned: Mapping[str, Any] = held(
        "learned", SETTINGS, "learned weight", unit="of the expert, or of its tensor", shows=FILES
    )
    bits_per_weight: Mapping[str, float] = held(
        "touched.bits_per_weight",
        NUMBERS,
        "bits",
        unit="bits a weight",
        spec=".4g",
        spare=5,
        shows=FILES | Shows.TABLE,
    )
    bytes: int | None = held("touched.bytes", WHOLE, "bytes", unit="bytes", shows=FILES)
    lost_in_storage: float | None = held(
        "touched.lost_in_storage", NUMBER, "lost in storage", unit="share of the edit", shows=FILES
    )
    gradient_evaluations: int | None = held(
        "gradient_evaluations", WHOLE, spec=".0f", spare=6, shows=FILES | Shows.TABLE
    )
    seconds: float | None = held(
        "seconds.total", NUMBER, "seconds", unit="s", spec=".1f", spare=5, shows=NOT_IN_PAGE
    )
    stages: Mapping[str, float] = held("seconds.*", NUMBERS, "seconds", unit="s", shows=FILES)
    peak_memory_bytes: int | None = held(
        "peak_memory_bytes", WHOLE, "peak memory", unit="bytes", shows=FILES
    )
    experiment: str = held(
        "experiment", TEXT, origin=True, default="runs", shows=FILES | Shows.PAGE
    )
    key: str = held("key", TEXT, "record", origin=True, default="", shows=FILES | Shows.PAGE)
    digest: str | None = held("digest", TEXT, shows=FILES, origin=True)
    device: str | None = held("device", TEXT, shows=FILES, origin=True)
    git: str | None = held("git", TEXT, "commit", shows=FILES, origin=True)
    versions: Mapping[str, str] = held("versions", SETTINGS, shows=FILES, origin=True)
    schema: int = held("schema", WHOLE, shows=Shows.EXPORT, default=SCHEMA)
    status: str = held("status", TEXT, shows=FILES, default="ok")
    kind_of_failure: str | None = held("error.type", TEXT, "failure", shows=FILES)
    message: str | None = held("error.message", TEXT, "failure", shows=FILES)
    config: Mapping[str, Any] = held("config", CONFIG, shows=Shows.NOWHERE, origin=True)

    def __post_init__(self) -> None:
        own: Any = type(self)
        for name, derive in _derived(own):
            if getattr(self, name) in (None, ""):
                object.__setattr__(self, name, shown.within(derive(self)))

    @property
    def label(self) -> str:
        """The edit with its hyper-parameters, as in `dare p=0.5 k=0`."""
        return label(self.edit, self.settings)

    @property
    def of(self) -> tuple[str, str, str, str, str]:
        """What the edit was made of and measured on: points that share it share `reference`."""
        measured = self.data or "", self.objective or "", self.evaluator or ""
        return self.pair, *measured, self.setup

    @property
    def failure(self) -> str | None:
        """What went wrong, None where nothing did."""
        if self.status != "error":
            return None
        return f"{self.kind_of_failure or 'Error'}: {self.message or ''}"


@cache
def _derived(points: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    return [(each.name, each.derive) for each in fields_of(points) if each.derive is not None]


def table() -> tuple[Field, ...]:
    """Return every field of a record, in the order of all tables."""
    return fields_of(Outcome)


def parse(record: Any) -> Outcome:
    """Turn the JSON of one record into a point, doubting what it holds: anyone may have written it.

    Raises:
        ValueError: if it is no record, or one of a schema that this version cannot read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"not a record but a {type(record).__name__}")
    record = {
        name: value
        if name == "config"
        else shown.within(value, shown.MESSAGE if name == "error" else shown.NAME)
        for name, value in record.items()
    }
    if record.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"schema {record['schema']!r}, this version reads schema {SCHEMA}")
    if record.get("status") not in ("ok", "error"):
        raise ValueError(f"status {record.get('status')!r}, must be 'ok' or 'error'")
    for name, value in (
        ("model", record.get("model")),
        ("edit.name", mapping(record.get("edit"), "edit").get("name")),
    ):
        if not isinstance(value, str):
            raise ValueError(f"{name} {value!r}, must be a string")
    return _read(record)


NEEDED = ("key", "model", "edit", "loss", "seconds")
"""What every finished point has."""


def fault(record: Mapping[str, Any], needed: Collection[str] = NEEDED) -> str | None:
    """Return what is wrong with the JSON of a finished point, None where it is a whole record.

    >>> fault({"schema": 1, "key": "0a", "loss": {"change": "?"}, "model": "m", "seconds": 1})
    'edit is missing'
    """
    if (schema := record.get("schema")) != SCHEMA:
        return f"has schema {schema!r}, this version of deltalab writes {SCHEMA}"
    if missing := [name for name in needed if not record.get(name)]:
        return f"{missing[0]} is missing"
    try:
        for each in table():
            given = each.raw(record)
            found = mapping(given, each.path) if each.kind is CONFIG else each.of(record)
            if found is None and each.kind not in (ANEW, MAIN) and (given or each.name in needed):
                return f"{each.path} {given!r}, must be {each.kind.wanted}"
    except ValueError as problem:
        return str(problem)
    return None


def is_newer(record: Any) -> bool:
    """Whether a record is of a schema that a later version of this package has made."""
    schema = record.get("schema") if isinstance(record, Mapping) else None
    return isinstance(schema, int) and schema > SCHEMA


def _read(record: Mapping[str, Any]) -> Outcome:
    found = {each.name: each.of(record) for each in table()}
    found = {name: value for name, value in found.items() if value is not None}
    first = mapping(record.get("term"), "term")
    if first and not found["terms"]:
        found["terms"] = terms_of({str(first.get("rule")): first}, "term")
    for name, value in found["prediction"].items():
        if name in PREDICTIONS:  # one more account of the change, beside the rules'
            found["terms"].setdefault(name, Term(name, None, value))
    if found.get("main") not in found["terms"]:
        found.pop("main", None)
    return Outcome(**{"model": "", "edit": "", **found})


def peek(record: Mapping[str, Any], name: str) -> Any:
    """Return one field of what may be a record, None where it is not to be had.

    >>> peek({"seconds": {"total": 2.5}}, "seconds"), peek({"seconds": "?"}, "seconds")
    (2.5, None)
    """
    try:
        return next(each for each in table() if each.name == name).of(record)
    except ValueError:
        return None


def written(**values: Any) -> dict[str, Any]:
    """Return fields as JSON.

    Args:
        **values: the fields by their names in `Outcome`, in values of JSON.

    Raises:
        TypeError: there is no such field, or its value is of another type.

    >>> written(change=0.5, error=0.1)
    {'loss': {'change': 0.5, 'error': 0.1}}
    """
    record: dict[str, Any] = {}
    known = {each.name: each for each in table()}
    if unknown := [name for name in values if name not in known]:
        raise TypeError(f"{unknown[0]}: no field of a record")
    for name, given in values.items():
        place = known[name]
        if given is not None and place.kind.read(given, place.path) is None:
            raise TypeError(f"{name}={given!r}: must be {place.kind.wanted}")
        place.put(record, given)
    return record


def completed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with all that can be derived from what it holds.

    >>> completed({"loss": {"change": 0.5, "error": 0.1}})["class_two_errors"]
    'decreased'
    """
    full = {name: dict(v) if isinstance(v, Mapping) else v for name, v in record.items()}
    point = _read(record)
    for each in table():
        if each.derive is not None and each.of(record) is None:
            derived = getattr(point, each.name)
            if derived not in (None, ""):
                each.put(full, derived)
    return full


def line(point: Outcome, figures: int | None = None) -> dict[str, Any]:
    """Return a point as one line of a JSON lines file holds it; `parse` reads it.

    Args:
        point: a point.
        figures: round numbers to so many significant figures; None leaves them as they are.

    >>> line(Outcome("vit", "dare", {"p": 0.5}, change=0.123456789), figures=6)["loss"]
    {'change': 0.123457}
    """
    record: dict[str, Any] = {}
    for each in table():
        found = getattr(point, each.name)
        if Shows.EXPORT in each.shows and found not in (None, "", {}):
            each.put(record, _rounded(each.kind.write(found), figures))
    return record


def flat(point: Outcome, shows: Shows) -> dict[str, Any]:
    """Return a point as plain values by flat names, those of one place; null ones are left out.

    They are named by their place in the record, as `loss/change`; but a term is `term/<rule>`, and
    a metric has its own name.

    >>> flat(Outcome("vit", "dare", {"p": 0.5}, metrics={"mnist/accuracy": 0.9}), Shows.CONSOLE)
    {'pair/label': 'vit', 'edit/name': 'dare', 'edit/p': 0.5, 'mnist/accuracy': 0.9}
    """
    found: dict[str, Any] = {}
    for each in table():
        if shows in each.shows:
            named = each.flat(getattr(point, each.name))
            found |= {name: value for name, value in named if value not in (None, "")}
    return found


def label(edit: str, settings: Mapping[str, Any]) -> str:
    """Name an edit with its hyper-parameters, those that are set, for a person.

    >>> label("dare", {"p": 0.5, "k": 0.0}), label("twin", {"rank": 4, "rate": None})
    ('dare p=0.5 k=0', 'twin rank=4')
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return " ".join([edit, *(f"{name}={plain(value)}" for name, value in given.items())])


def class_of(
    point: Outcome, change: float | None, margin: float | None = None, factor: float = 2.0
) -> str | None:
    """Class a change as if it were the point's, with the point's error and gap."""
    share = point.margin if margin is None else margin
    return classify(change, point.error, point.gap, point.gap_error, share, factor)


def _rounded(value: Any, figures: int | None) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(each, figures) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each, figures) for each in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if figures is None else float(f"{value:.{figures}g}")
    return value
