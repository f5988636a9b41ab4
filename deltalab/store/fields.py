"""One field of a point's record: where it stands in the JSON, of which type, and where it shows.

`deltalab.store.record.Outcome` declares every field once with `held`, and whatever writes, reads,
shows, exports or tracks records goes through that table.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from functools import cache
from typing import Any

Flat = Iterator[tuple[str, Any]]


class Shows(Flag):
    """Where a field shows; what a record holds is in the record in any case."""

    NOWHERE = 0
    TABLE = auto()
    """The tables of a report: Markdown and terminal."""
    PAGE = auto()
    """The list of all points in `index.html`."""
    CONSOLE = auto()
    """The line of a finished point, and of `deltalab-status list=done`."""
    EXPORT = auto()
    """JSON lines, CSV, and a tracker's table of a sweep."""
    TRACKER = auto()
    """A tracker's run of the point."""


FILES = Shows.EXPORT | Shows.TRACKER
EVERYWHERE = Shows.TABLE | Shows.PAGE | Shows.CONSOLE | FILES


@dataclass(frozen=True)
class Kind:
    """A type of fields, read from JSON that anyone may have written.

    Attributes:
        wanted: what a value must be, for messages.
        read: a value of JSON and its name -> what the point holds, None where it is of no use.
        write: what the point holds -> JSON.
        flat: what the point holds -> plain values, by their names within the field.
        many: whether one field holds several values by name; it is then never None but empty.
    """

    wanted: str
    read: Callable[[Any, str], Any]
    write: Callable[[Any], Any] = lambda value: value
    flat: Callable[[Any], Flat] = lambda value: iter([("", value)])
    many: bool = False


@dataclass(frozen=True)
class Field:
    """A field of the record.

    Attributes:
        name: the attribute of a point that holds it.
        path: its place in the JSON: `loss.change`; `edit.*` is what else is in `edit`.
        title: what people call it.
        unit: of its numbers; losses and terms are in the unit that the record itself names.
        spec: the format of its numbers for people; empty for up to six figures.
        spare: the higher, the sooner a narrow terminal leaves out its column; 0: never.
        origin: whether it says what the point is, rather than what came out.
        derive: the value where nobody gave one, from the point's other fields.
        alias: what its flat names begin with, where it is not its path.
        named: entries of the object that other fields hold, for a path that ends in `*`.
    """

    name: str
    path: str
    kind: Kind
    title: str
    unit: str = ""
    spec: str = ""
    spare: int = 0
    shows: Shows = EVERYWHERE
    origin: bool = False
    derive: Callable[[Any], Any] | None = None
    alias: str | None = None
    named: frozenset[str] = frozenset()

    def of(self, record: Mapping[str, Any]) -> Any:
        """Read this field of a record's JSON; raises as `raw` does.

        >>> Field("change", "loss.change", NUMBER, "change").of({"loss": {"change": 0.5}})
        0.5
        """
        return self.kind.read(self.raw(record), self.path.removesuffix(".*"))

    def raw(self, record: Mapping[str, Any]) -> Any:
        """Return what a record's JSON holds in this field's place.

        Raises:
            ValueError: something on the way to it is no object.
        """
        *outer, last = self.path.split(".")
        for place in range(len(outer)):
            record = mapping(record.get(outer[place]), ".".join(outer[: place + 1]))
        if last == "*":
            return {name: value for name, value in record.items() if name not in self.named}
        return record.get(last)

    def put(self, record: dict[str, Any], value: Any) -> None:
        """Write a value of JSON into a record's."""
        *outer, last = self.path.split(".")
        for name in outer:
            record[name] = record.get(name) or {}
            record = record[name]
        record.update(value if last == "*" else {last: value})

    def flat(self, value: Any) -> Flat:
        """Yield a point's value as plain ones, each with its name in files: `loss/change`."""
        start = self.path.removesuffix(".*").replace(".", "/") if self.alias is None else self.alias
        for name, plain in self.kind.flat(value):
            yield "/".join(part for part in (start, name) if part), plain


def held(
    path: str,
    kind: Kind,
    title: str = "",
    *,
    unit: str = "",
    spec: str = "",
    spare: int = 0,
    shows: Shows = EVERYWHERE,
    origin: bool = False,
    derive: Callable[[Any], Any] | None = None,
    alias: str | None = None,
    default: Any = None,
    first: bool = False,
) -> Any:
    """Declare a field in a dataclass of points.

    Most arguments are those of `Field`. `default` is of a point that does not have it (kinds of
    several values begin empty), and a field that is `first` may be given by its place among a
    point's arguments, without its name.
    """
    about = {"path": path, "kind": kind, "title": title or path.replace("_", " "), "unit": unit}
    about |= {"spec": spec, "spare": spare, "shows": shows, "origin": origin, "derive": derive}
    about["alias"] = alias
    given: dict[str, Any] = {"default_factory": dict} if kind.many else {"default": default}
    return dataclasses.field(**given, kw_only=not first, metadata={"field": about})


def fields_of(points: Any) -> tuple[Field, ...]:
    """Return the table of a dataclass of points, in its order."""
    return _fields_of(points)


@cache
def _fields_of(points: Any) -> tuple[Field, ...]:
    found = [
        Field(name=field.name, **field.metadata["field"])
        for field in dataclasses.fields(points)
        if "field" in field.metadata
    ]
    holders: dict[str, set[str]] = {}
    for each in found:
        holder, _, last = each.path.rpartition(".")
        holders.setdefault(holder, set()).add(last)
    return tuple(
        dataclasses.replace(each, named=frozenset(holders[each.path.removesuffix(".*")] - {"*"}))
        if each.path.endswith(".*")
        else each
        for each in found
    )


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Return an object of JSON, empty for null.

    Raises:
        ValueError: it is something else.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} {value!r}, must be an object or null")
    return value or {}


def number(value: Any) -> float | None:
    """Return a value of JSON as a number, or None if it is none.

    >>> number(3), number("3"), number(True)
    (3.0, None, None)
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None


def plain(value: Any) -> str:
    """Write one setting as a person would.

    >>> plain(0.30000000000000004), plain(None), plain(True), plain([1, 2.0])
    ('0.3', 'none', 'true', '[1,2]')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(plain(each) for each in value) + "]"
    return str(value)


def numbers(value: Any, name: str) -> dict[str, float]:
    """Return those entries of an object that are numbers."""
    found = mapping(value, name).items()
    return {str(key): each for key, each in found if number(each) is not None}


def flatten(values: Mapping[str, Any], start: str = "") -> Flat:
    """Yield the entries of nested mappings by flat names; null ones have none.

    >>> dict(flatten({"a": {"b": 1, "c": None}, "d": [2]}))
    {'a/b': 1, 'd': [2]}
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{start}{name}/")
        elif value is not None:
            yield f"{start}{name}", value


def _whole(value: Any, name: str) -> int | None:
    found = number(value)
    return int(found) if found is not None and found.is_integer() else None


def _ends(value: Any, name: str) -> dict[str, dict[str, float]]:
    ends = mapping(value, name)
    return {end: numbers(each, end) for end, each in ends.items() if each}


NUMBER = Kind("a number", lambda value, name: number(value))
WHOLE = Kind("a whole number", _whole)
TEXT = Kind("a text", lambda value, name: value if isinstance(value, str) else None)
ANEW = Kind("nothing: it is worked out from other fields", lambda value, name: None)
"""What is derived anew whenever a record is read, whatever it says."""
CHOICE = Kind(
    "a text or a list of texts", lambda value, name: None if value is None else plain(value)
)
"""What may be one name or a list of them, held as it is written."""
NUMBERS = Kind("numbers by name", numbers, dict, flatten, many=True)
ENDS = Kind("numbers by name, for each of several models", _ends, dict, flatten, many=True)
SETTINGS = Kind("settings by name", mapping, dict, flatten, many=True)
