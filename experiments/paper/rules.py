"""Study: the error of every quadrature rule against its cost, over all edits and pairs."""

from collections.abc import Sequence
from typing import Any

from deltalab.figures.style import looks, panels
from deltalab.outcomes import Outcome
from deltalab.quadrature import RULES
from experiments.paper.drawing import one_legend
from experiments.paper.found import Found, Table, mean, models

LEAST = 1e-3
"""Changes below this, in nats, are no fair denominator of a relative error."""

MODERATE = 0.5
Errors = dict[tuple[str, int], list[float]]


def rules(points: Sequence[Outcome]) -> Found:
    """Compare rules by relative error and by sign, on changes that are large enough to compare."""
    usable = [p for p in points if p.change is not None and abs(p.change) >= LEAST]
    near = [p for p in usable if abs(p.change or 0.0) < MODERATE]
    errors, signs = _errors(near), _signs(near)
    adaptive = [p for p in near if "adaptive" in p.terms]
    cost = mean([p.gradient_evaluations or 0.0 for p in adaptive])
    own = sorted(_error(p, "adaptive") for p in adaptive)
    rows: list[list[Any]] = []
    for rule, count in sorted(errors, key=lambda at: (at[1], RULES.index(at[0]))):
        found = sorted(errors[rule, count])
        right, of = signs[rule, count]
        rows.append([rule, count, *_quantiles(found), f"{right} of {of}"])
    right = sum((p.terms["adaptive"].value or 0.0) * (p.change or 0.0) > 0 for p in adaptive)
    rows.append(["adaptive", f"{cost:.1f}", *_quantiles(own), f"{right} of {len(adaptive)}"])
    picked = {at: sorted(errors[at])[len(errors[at]) // 2] for at in errors}
    sentence = (
        f"Median relative error: the paper's rule (left, 5) {_percent(picked['left', 5])}, two"
        f" Gauss nodes {_percent(picked['gauss', 2])}, three {_percent(picked['gauss', 3])}, three"
        f" Radau nodes {_percent(picked['radau', 3])}, adaptive {_percent(own[len(own) // 2])} with"
        f" {cost:.1f} gradients."
    )
    edits, large = ({(p.model, p.label) for p in some} for some in (near, usable))
    return Found(
        sentence=sentence,
        notes=[
            f"{len(edits)} edits of {len(models(near))} pairs whose loss changes by {LEAST} to"
            f" {MODERATE} nats; {len(large - edits)} change more, and are in the figure's right"
            " panel. Radau's first node is the gradient at the post-trained model, which all edits"
            " of a pair share."
        ],
        tables=[Table("Relative error by rule", [
            "rule", "gradients", "median", "9 of 10 below", "largest", "right sign",
        ], rows)],
        figures=[("", _figure(near, [p for p in usable if p not in near]), (
            "Median relative error of the term against the number of gradients of a rule; the band"
            " holds the middle half of the points. The cross is the adaptive rule."
        ))],
    )  # fmt: skip


def _error(point: Outcome, rule: str) -> float:
    change = point.change or 0.0
    return abs((point.terms[rule].value or 0.0) - change) / abs(change)


def _errors(points: Sequence[Outcome]) -> Errors:
    found: Errors = {}
    for point in points:
        for rule, term in point.terms.items():
            if rule in RULES and term.value is not None and term.points is not None:
                found.setdefault((rule, term.points), []).append(_error(point, rule))
    return found


def _signs(points: Sequence[Outcome]) -> dict[tuple[str, int], tuple[int, int]]:
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for point in points:
        for rule, term in point.terms.items():
            if rule in RULES and term.value is not None and term.points is not None:
                right, of = found.get((rule, term.points), (0, 0))
                found[rule, term.points] = right + (term.value * (point.change or 0.0) > 0), of + 1
    return found


def _quantiles(ordered: Sequence[float]) -> list[str]:
    last = len(ordered) - 1
    return [_percent(ordered[round(q * last)]) for q in (0.5, 0.9, 1.0)]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _figure(near: Sequence[Outcome], far: Sequence[Outcome]) -> Any:
    drawn, ((left, right),) = panels(1, 2, 8.4, 3.5)
    titles = (left, near, f"changes of {LEAST} to {MODERATE} nats"), (right, far, "larger changes")
    for axes, points, title in titles:
        errors = _errors(points)
        for index, rule in enumerate(RULES):
            counts = sorted(n for r, n in errors if r == rule)
            ordered = [sorted(errors[rule, n]) for n in counts]
            colour, marker = looks(index)
            axes.plot(counts, [o[len(o) // 2] for o in ordered], color=colour, marker=marker, ms=4,
                      lw=1.3, label=rule)  # fmt: skip
            low, high = ([o[round(q * (len(o) - 1))] for o in ordered] for q in (0.25, 0.75))
            axes.fill_between(counts, low, high, color=colour, alpha=0.12, lw=0)
        own = [p for p in points if "adaptive" in p.terms]
        if own:
            middle = sorted(_error(p, "adaptive") for p in own)[len(own) // 2]
            axes.plot(mean([p.gradient_evaluations or 0.0 for p in own]), middle, "kx", ms=7,
                      label="adaptive")  # fmt: skip
        axes.set(title=title, xlabel="gradients", ylabel="relative error", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
    one_legend(drawn, left, 7)
    return drawn
