"""How well an experiment's terms agree with the measured changes, and its classes, in words."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from deltalab.report.outcomes import at_margin, pair_names, rules, spearman, split_classes
from deltalab.report.tables import NONE, Column, fixed, markdown, percent
from deltalab.store import shown
from deltalab.store.effects import CLASSES, MARGINS, two_errors
from deltalab.store.record import Outcome, class_of
from deltalab.store.terms import Term


def summary(points: Sequence[Outcome]) -> str:
    """Say in Markdown how well each rule agrees with the measured change, and count classes."""
    lines = ["## Agreement of term and measured change", ""]
    lines.append(markdown(agreement(points)) if rules(points) else "No point has a term.")
    lines += ["", *(f"* {line}" for line in [*_wrong_signs(points), *_counts(points)]), ""]
    if any(p.classed for p in points):
        lines += [markdown(margins(points)), ""]
    return "\n".join(lines)


def agreement(points: Sequence[Outcome]) -> list[Column]:
    """Build the columns of the table of rules: errors, agreeing signs and rank correlation."""
    body: list[list[str]] = []
    for rule, title in rules(points).items():
        found = list(_compared(points, rule))
        errors = [abs(value - change) / abs(change) for _, value, change in found if change]
        furthest = max((abs(value - change) for _, value, change in found), default=None)
        moved = [(value, change) for _, value, change in found if change]
        signs = sum(value * change > 0 for value, change in moved)
        ranks = spearman([value for _, value, _ in found], [change for *_, change in found])
        body.append([
            title,
            str(len(found)),
            percent(statistics.median(errors)) if errors else NONE,
            percent(max(errors)) if errors else NONE,
            fixed(furthest, ".2g"),
            f"{signs} of {len(moved)}",
            fixed(ranks, ".3f"),
            _classes_right(points, rule),
        ])  # fmt: skip
    heads = ["rule", "points", "median relative error", "largest relative error"]
    heads += ["largest absolute error", "same sign", "Spearman correlation", "class right"]
    cells = list(zip(*body, strict=True)) or [()] * len(heads)
    return [Column(h, c, right=h != "rule") for h, c in zip(heads, cells, strict=True)]


def _compared(points: Sequence[Outcome], rule: str) -> Iterator[tuple[Outcome, float, float]]:
    for point in points:
        value = point.terms.get(rule, Term(rule, None, None)).value
        if value is not None and point.change is not None and math.isfinite(value + point.change):
            yield point, value, point.change


def _classes_right(points: Sequence[Outcome], rule: str) -> str:
    """Count the points that an estimate puts into the class that the measurement decides."""
    pairs = [
        (class_of(point, value), point.classed)
        for point, value, _ in _compared(points, rule)
        if point.classed and point.classed != "undecided"
    ]
    return f"{sum(guess == truth for guess, truth in pairs)} of {len(pairs)}" if pairs else NONE


def margins(points: Sequence[Outcome]) -> list[Column]:
    """Count the classes of some points at every margin, and by whether a change is shown at all."""
    rules = {f"margin {100 * m:g} %": [p.classed for p in at_margin(points, m)] for m in MARGINS}
    rules["two standard errors"] = [two_errors(p.change, p.error) for p in points]
    counts = [Counter(kinds) for kinds in rules.values()]
    found = [Column(name, [str(c[name]) for c in counts]) for name in CLASSES]
    return [Column("rule", list(rules), right=False), *found]


def _wrong_signs(points: Sequence[Outcome]) -> Iterator[str]:
    pairs = pair_names(points)
    for rule, title in rules(points).items():
        wrong = [p for p, value, change in _compared(points, rule) if value * change < 0]
        named = shown.markdown(", ".join(f"{p.label} on {pairs[p.of]}" for p in wrong[:5]))
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        if wrong:
            yield f"Wrong sign by {shown.markdown(title)}: {named}{more}."


def _counts(points: Sequence[Outcome]) -> Iterator[str]:
    objective = Counter(p.classed for p in points if p.classed)
    if objective:
        yield f"Classes on the objective: {_counted(objective)}."
    for task in sorted({task for p in points for task in split_classes(p)}):
        tested = Counter(split_classes(p)[task] for p in points if task in split_classes(p))
        yield f"Classes on the test split of {shown.markdown(task)}: {_counted(tested)}."


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in CLASSES)
