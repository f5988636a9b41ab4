"""The points of an experiment as people see them: a table, and the line of a finished point.

Both follow the record's table of fields (`deltalab.store.record.table`). A field shows as its kind
does; the few that show otherwise have a view of their own here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltalab.report.outcomes import (
    by_pair,
    is_reference,
    pair_names,
    references,
    relative_error,
    rules,
    split_classes,
)
from deltalab.report.tables import (
    NONE,
    Column,
    fixed,
    is_lenient,
    is_score,
    markdown,
    measured,
    percent,
    scores,
    term,
)
from deltalab.store.fields import TEXT, Field, Shows, plain
from deltalab.store.record import Outcome, parse, table
from deltalab.store.terms import PREDICTIONS

if TYPE_CHECKING:
    from rich.table import Table

Cell = Callable[[Outcome], str]
MEASURED = ("data", "objective", "evaluator")
"""Fields that a table shows where they differ; what all points share is told above it."""
MOST_SCORES = 3
"""Scores in the line of a point."""


@dataclass(frozen=True)
class View:
    """How a field shows: as columns of some points, and in the line of one."""

    columns: Callable[[Field, Sequence[Outcome]], list[Column]]
    line: Callable[[Field, Outcome], list[str]]


def columns(points: Sequence[Outcome]) -> list[Column]:
    """Build the table's columns over some points in order; what never varies or occurs has none."""
    shown = [each for each in table() if Shows.TABLE in each.shows]
    return [column for each in shown for column in view(each).columns(each, points)]


def describe(record: Mapping[str, Any], skipped: bool = False, swept: Sequence[str] = ()) -> str:
    """Return the one line that tells a person what came out of a point.

    Args:
        record: the point's.
        skipped: it had been there before.
        swept: what sets the point apart from others of its sweep, as `seed=1`.
    """
    point = parse(record)
    own = [each for each in swept if not _named(each, point)]
    told = []
    for each in table():
        if Shows.CONSOLE in each.shows:
            took = ["done before"] if skipped and each.name == "seconds" else None
            told += took or view(each).line(each, point)
            told += own if each.name == "settings" else []
    return "  ".join(told)


def _named(override: str, point: Outcome) -> bool:
    """Whether a point's line tells an override anyway: by the name of its edit or its model."""
    name = override.lstrip("+").partition("=")[0]
    return name in ("edit", "model", *(f"edit.{setting}" for setting in point.settings))


def view(field: Field) -> View:
    """Return how a field shows."""
    return VIEWS.get(field.name) or View(_columns, _line)


def _cell(field: Field, value: Any) -> str:
    if value is None:
        return NONE
    is_number = field.spec and isinstance(value, int | float)
    return format(value, field.spec) if is_number else plain(value)


def _flat(field: Field, point: Outcome) -> dict[str, Any]:
    found = dict(field.kind.flat(getattr(point, field.name)))
    return {name: value for name, value in found.items() if value is not None}


def _columns(field: Field, points: Sequence[Outcome]) -> list[Column]:
    """Show a field in a column, or in one for each of its names, where any point has it."""
    cells = [_flat(field, point) for point in points]
    return [
        Column(
            f"{field.title} {name}".rstrip(),
            [_cell(field, own.get(name)) for own in cells],
            field.spare,
            right=field.kind is not TEXT,
        )
        for name in dict.fromkeys(name for own in cells for name in own)
    ]


def _line(field: Field, point: Outcome) -> list[str]:
    found = _flat(field, point).items()
    return [f"{f'{field.title} {name}'.rstrip()} {_cell(field, value)}" for name, value in found]


def _varying(field: Field, points: Sequence[Outcome]) -> list[Column]:
    """Show a field where edits differ in it."""
    edits = [point for point in points if not is_reference(point)]
    if len({getattr(point, field.name) for point in edits}) < 2:
        return []
    cells = [
        plain(v) if (v := getattr(point, field.name)) is not None else NONE for point in points
    ]
    return [Column(field.title, cells, field.spare, right=field.name == "seed")]


def _pair(field: Field, points: Sequence[Outcome]) -> list[Column]:
    named = pair_names(points, differing(points))
    return [Column(field.title, [named[point.of] for point in points], right=False)]


def differing(points: Sequence[Outcome]) -> list[str]:
    """Return which of data, objective and evaluator differ between some points."""
    return [name for name in MEASURED if len({getattr(point, name) for point in points}) > 1]


def common_data(points: Sequence[Outcome]) -> str:
    """Name the data where all points share them; where they differ, a column does.

    >>> common_data([Outcome("vit", "dare", data="mnist")])
    ' on mnist'
    """
    found = {point.data for point in points}
    return f" on {points[0].data}" if len(found) == 1 and points[0].data else ""


def _edit(field: Field, points: Sequence[Outcome]) -> list[Column]:
    return [Column(field.title, [point.label for point in points], right=False)]


def _classes(field: Field, points: Sequence[Outcome]) -> list[Column]:
    """Show the class on the objective, and on the test split of every task."""
    tasks = sorted({task for point in points for task in split_classes(point)})
    found = [Column(field.title, [p.classed or NONE for p in points], field.spare, right=False)]
    for task in tasks:
        cells = [split_classes(point).get(task, NONE) for point in points]
        found.append(Column(f"class, {task} test", cells, 3, right=False))
    return found


def _terms(field: Field, points: Sequence[Outcome]) -> list[Column]:
    return [
        Column(f"{field.title} {title}", [term(point.terms.get(rule)) for point in points])
        for rule, title in rules(points).items()
    ]


def _change(field: Field, points: Sequence[Outcome]) -> list[Column]:
    """Show the change with its standard error, and how far each term is from it."""
    found = [Column(field.title, [measured(point.change, point.error) for point in points])]
    for rule, title in rules(points).items():
        cells = [percent(relative_error(point.terms.get(rule), point)) for point in points]
        found.append(Column(f"error {title}", cells, 2))
    return found


def _scores(field: Field, points: Sequence[Outcome]) -> list[Column]:
    return [
        Column(name, [fixed(p.metrics.get(name), ".3f") for p in points], 4 * is_lenient(name))
        for name in scores(points)
    ]


def _score_line(field: Field, point: Outcome) -> list[str]:
    named = [name for name in point.metrics if is_score(name) and not is_lenient(name)]
    return [f"{name} {point.metrics[name]:.4f}" for name in named[:MOST_SCORES]]


def _within(field: Field, _: Any) -> list[Any]:
    """Show nothing: another field's view shows this one."""
    return []


VIEWS = {
    "edit": View(_edit, lambda field, point: []),
    "settings": View(_within, lambda field, point: [f"{point.label:<28}"]),
    "pair": View(_pair, lambda field, point: [f"{point.pair:<16}"]),
    **dict.fromkeys(MEASURED, View(_varying, _within)),
    "seed": View(_varying, _within),
    "select": View(_varying, _within),
    "classed": View(_classes, lambda field, point: [f"{point.classed or '':<11}"]),
    "terms": View(
        _terms,
        lambda field, point: [
            f"{rule} {term(each)}" for rule, each in point.terms.items() if rule not in PREDICTIONS
        ],
    ),
    "change": View(
        _change,
        lambda field, point: (
            [f"change {measured(point.change, point.error)}"] if point.change is not None else []
        ),
    ),
    "error": View(_within, _within),
    "metrics": View(_scores, _score_line),
    "seconds": View(_columns, lambda field, point: [f"{point.seconds or 0.0:.1f} s"]),
}
"""Fields that show otherwise than their kinds do."""


def rows(points: Sequence[Outcome]) -> list[Outcome]:
    """Put the unedited models on top of the points of each pair; points are in order."""
    return [row for own in by_pair(points) for row in (*references(own), *own)]


def points_table(points: Sequence[Outcome]) -> str:
    """Write the Markdown table of an experiment, its unedited models on top in bold."""
    shown = rows(points)
    return markdown(columns(shown), [is_reference(p) for p in shown])


def terminal(points: Sequence[Outcome], title: str, width: int | None) -> "Table":
    """Build the compact table of the same rows for a terminal.

    Args:
        points: all points of an experiment, in order.
        title: set above the table.
        width: characters that the table may take; it leaves out columns until it fits. None: all.
    """
    from rich import box
    from rich.table import Table

    from deltalab.terminal.console import rich_console

    shown = rows(points)
    table = columns(shown)
    if len(pairs := set(table[0].cells)) == 1:
        title, table = f"{title}, {pairs.pop()}", table[1:]
    title += common_data(points)
    while True:
        drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        drawn.padding = (0, 1 if width is None else 0, 0, 0)
        for column in table:
            side = "right" if column.right else "left"
            head = column.title.replace(" ", "\n", 1).replace("/", "/\n")
            drawn.add_column(head, justify=side, overflow="fold")  # type: ignore[arg-type]
        for index, point in enumerate(shown):
            style = "bold" if is_reference(point) else _STYLES.get(point.classed or "")
            drawn.add_row(*(column.cells[index] for column in table), style=style)
        most = max(column.spare for column in table)
        if width is None or most == 0 or rich_console(width=1000).measure(drawn).maximum <= width:
            return drawn
        table = [column for column in table if column.spare < most]


_STYLES = {"improved": "green", "decreased": "yellow"}
