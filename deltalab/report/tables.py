"""The table of an experiment's points, for Markdown and the terminal."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltalab.report.outcomes import Outcome, Term, references, relative_error, rules, split_classes

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"
_SCORE = re.compile(
    r"(^|[_-])(acc|accuracy|top\W?\d+|exact_match|pass@\d+|f1|win_rate|mc\d)($|\W|_)"
)
_NO_SCORE = re.compile(r"stderr|error|change")


@dataclass(frozen=True)
class Column:
    """One column of the table; the higher `spare`, the sooner a narrow terminal leaves it out."""

    title: str
    cells: Sequence[str]
    spare: int = 0
    right: bool = True


def scores(points: Sequence[Outcome]) -> list[str]:
    """Return the names of the accuracy-like metrics of some points, those of single classes aside.

    >>> scores([Outcome("vit", "dare", metrics={"mnist/accuracy": 0.9, "mnist/loss": 0.1})])
    ['mnist/accuracy']
    >>> scores([Outcome("llm", "dare", metrics={"gsm/exact_match,strict-match": 0.9})])
    ['gsm/exact_match,strict-match']
    """
    names = {name for point in points for name in point.metrics}
    names |= {name for p in points for metrics in p.reference.values() for name in metrics}
    return sorted(n for n in names if is_score(n))


def is_score(metric: str) -> bool:
    """Tell whether a metric, called `<task>/<metric>`, is a score between 0 and 1."""
    last = metric.rpartition("/")[2]
    return metric.count("/") <= 1 and bool(_SCORE.search(last)) and not _NO_SCORE.search(last)


def is_lenient(metric: str) -> bool:
    """Tell whether a score counts an answer among the first few as right, as top-5 does.

    >>> is_lenient("imagenet/accuracy_top5"), is_lenient("imagenet/accuracy_top1")
    (True, False)
    """
    return bool(re.search(r"top\W?([2-9]|\d\d)", metric))


def signed(value: float | None) -> str:
    """Write a loss change with its sign, small ones in powers of ten.

    >>> signed(0.01234), signed(-2e-5), signed(0.0), signed(None)
    ('+0.0123', '-2.0e-05', '0', '-')
    """
    if value is None:
        return NONE
    if value == 0:
        return "0"
    return f"{value:+.1e}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:+.4f}"


def measured(change: float | None, error: float | None) -> str:
    """Write a measured change and its standard error.

    The change keeps the figures beyond its error: a term was computed on the same examples, so that
    the two agree far better than either agrees with the loss on other examples.

    >>> measured(0.012345, 0.00213), measured(1.25, 0.2), measured(0.0, 0.0)
    ('+0.0123 ± 0.0021', '+1.2500 ± 0.20', '0')
    """
    if change is None or not error or not math.isfinite(change + error):
        return signed(change)
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{signed(change)} ± {f'{error:.{places}f}' if error > 1e-5 else f'{error:.1e}'}"


def term(found: Term | None) -> str:
    """Write a term; a `?` marks one whose own error estimate is larger than was wanted."""
    if found is None:
        return NONE
    return signed(found.value) + ("?" if found.converged is False else "")


def percent(fraction: float | None) -> str:
    """Write a fraction as per cent, to two figures where it is small.

    >>> percent(0.00234), percent(0.614), percent(1e-7), percent(None)
    ('0.23 %', '61 %', '<0.01 %', '-')
    """
    if fraction is None:
        return NONE
    if 0 < fraction < 1e-4:
        return "<0.01 %"
    return f"{100 * fraction:.2g} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


def columns(points: Sequence[Outcome]) -> list[Column]:
    """Build the table's columns over some points in order; what never varies or occurs has none."""

    def column(title: str, cell: Callable[[Outcome], str], spare: int = 0, **kw: bool) -> Column:
        return Column(title, [cell(point) for point in points], spare, **kw)

    def metric(name: str) -> Callable[[Outcome], str]:
        return lambda p: f"{p.metrics[name]:.3f}" if name in p.metrics else NONE

    def value(rule: str) -> Callable[[Outcome], str]:
        return lambda p: term(p.terms.get(rule))

    def error(rule: str) -> Callable[[Outcome], str]:
        return lambda p: percent(relative_error(p.terms.get(rule), p))

    def split(task: str) -> Callable[[Outcome], str]:
        return lambda p: split_classes(p).get(task, NONE)

    found = [
        column("model", lambda p: p.model, right=False),
        column("edit", lambda p: p.label, right=False),
    ]
    edits = [p for p in points if not _is_reference(p)]
    if len({p.seed for p in edits}) > 1:
        found.append(column("seed", lambda p: NONE if p.seed is None else str(p.seed)))
    if len({p.select for p in edits}) > 1:
        found.append(column("select", lambda p: p.select or NONE, 4, right=False))
    found.append(column("class", lambda p: p.classed or NONE, 1, right=False))
    tasks = sorted({task for p in points for task in split_classes(p)})
    found += [column(f"class, {task} test", split(task), 3, right=False) for task in tasks]
    titles = rules(points)
    found += [column(f"term {title}", value(rule)) for rule, title in titles.items()]
    found.append(column("measured change", lambda p: measured(p.change, p.error)))
    found += [column(f"error {title}", error(rule), 2) for rule, title in titles.items()]
    found += [column(name, metric(name), 4 * is_lenient(name)) for name in scores(points)]
    found.append(column("gradient evaluations", lambda p: fixed(p.gradient_evaluations, ".0f"), 6))
    found.append(column("seconds", lambda p: fixed(p.seconds, ".1f"), 5))
    return found


def rows(points: Sequence[Outcome]) -> list[Outcome]:
    """Put the unedited models on top of the points of each pair; points are in order."""
    found: list[Outcome] = []
    for model in dict.fromkeys(p.model for p in points):
        own = [p for p in points if p.model == model]
        found += [*references(own), *own]
    return found


def _is_reference(point: Outcome) -> bool:
    return point.edit in ("pre", "post") and not point.key


def fixed(value: float | None, spec: str) -> str:
    """Write a number by a format, or a dash where there is none."""
    return NONE if value is None else format(value, spec)


def markdown(table: Sequence[Column], bold: Sequence[bool] = ()) -> str:
    """Write columns as a Markdown table; the rows marked bold are set in bold.

    >>> print(markdown([Column("a", ["1", "2"]), Column("b", ["x", "y"], right=False)]))
    | a | b |
    |---:|:---|
    | 1 | x |
    | 2 | y |
    """
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in c.cells] for c in table]
    lines = [[c.title for c in table]]
    lines += [list(row) for row in zip(*escaped, strict=True)]
    for index, strong in enumerate(bold, start=1):
        lines[index] = [f"**{c}**" if strong and c != NONE else c for c in lines[index]]
    text = [f"| {' | '.join(line)} |" for line in lines]
    rule = "|".join("---:" if c.right else ":---" for c in table)
    return "\n".join([text[0], f"|{rule}|", *text[1:]])


def points_table(points: Sequence[Outcome]) -> str:
    """Write the Markdown table of an experiment, its unedited models on top in bold."""
    shown = rows(points)
    return markdown(columns(shown), [_is_reference(p) for p in shown])


def terminal(points: Sequence[Outcome], title: str, width: int | None) -> "Table":
    """Build the compact table of the same rows for a terminal.

    Args:
        points: all points of an experiment, in order.
        title: set above the table.
        width: characters that the table may take; it leaves out columns until it fits. None: all.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = rows(points)
    table = columns(shown)
    models = {point.model for point in shown}
    if len(models) == 1:
        title, table = f"{title}, {models.pop()}", table[1:]
    while True:
        drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        drawn.padding = (0, 1 if width is None else 0, 0, 0)
        for column in table:
            side = "right" if column.right else "left"
            head = column.title.replace(" ", "\n", 1).replace("/", "/\n")
            drawn.add_column(head, justify=side, overflow="fold")  # type: ignore[arg-type]
        for index, point in enumerate(shown):
            style = "bold" if _is_reference(point) else _STYLES.get(point.classed or "")
            drawn.add_row(*(column.cells[index] for column in table), style=style)
        most = max(column.spare for column in table)
        if width is None or most == 0 or Console(width=1000).measure(drawn).maximum <= width:
            return drawn
        table = [column for column in table if column.spare < most]


_STYLES = {"improved": "green", "decreased": "yellow"}
