"""What a table is, how numbers are written in it, and which metrics are scores."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from deltalab.store import shown
from deltalab.store.record import Outcome
from deltalab.store.terms import Term

NONE = "-"
_SCORE = re.compile(
    r"(^|[_-])(acc|accuracy|top\W?\d+|exact_match|pass@\d+|f1|win_rate|mc\d)($|\W|_)"
)
_NO_SCORE = re.compile(r"stderr|error|change")


@dataclass(frozen=True)
class Column:
    """One column of the table; the higher `spare`, the sooner a narrow terminal leaves it out.

    Cells are text, shown as it is; with `markup` they are Markdown of our own, such as links.
    """

    title: str
    cells: Sequence[str]
    spare: int = 0
    right: bool = True
    markup: bool = False


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
    escaped = [c.cells if c.markup else [shown.markdown(cell) for cell in c.cells] for c in table]
    lines = [[shown.markdown(c.title) for c in table]]
    lines += [list(row) for row in zip(*escaped, strict=True)]
    for index, strong in enumerate(bold, start=1):
        lines[index] = [f"**{c}**" if strong and c != NONE else c for c in lines[index]]
    text = [f"| {' | '.join(line)} |" for line in lines]
    rule = "|".join("---:" if c.right else ":---" for c in table)
    return "\n".join([text[0], f"|{rule}|", *text[1:]])
