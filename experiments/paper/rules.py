"""Study: the error of every quadrature rule against its cost, over all edits and pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltalab.drawing import looks, panels
from deltalab.loss.quadrature import RULES
from deltalab.store.record import Outcome
from experiments.paper.drawing import one_legend
from experiments.paper.evidence import Documents
from experiments.paper.found import Check, Found, Table, every, mean, nearer, pairs

LEAST = 1e-3
"""Changes below this, in nats, are no fair denominator of a relative error."""

MODERATE = 0.5
ADAPTIVE = "adaptive", 0
"""Its number of nodes differs from point to point."""

Pairs = list[tuple[float, float]]
"""Terms with their measured changes."""


def rules(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Compare rules by relative error and by sign, on changes that are large enough to compare."""
    usable = [p for p in points if p.change is not None and abs(p.change) >= LEAST]
    near = [p for p in usable if abs(p.change or 0.0) < MODERATE]
    far = [p for p in usable if abs(p.change or 0.0) >= MODERATE]
    if not any(term.points for p in near for term in p.terms.values()):
        raise ValueError("rules: the points do not tell how many nodes their terms have")
    found, cost = _by_rule(near), _cost(near)
    errors = {at: _errors(pairs) for at, pairs in found.items()}
    order = sorted(found, key=lambda at: (at == ADAPTIVE, at[1], [*RULES, "adaptive"].index(at[0])))
    rows = [
        [rule, count or f"{cost:.1f}", *_quantiles(errors[rule, count]), _signs(found[rule, count])]
        for rule, count in order
    ]
    sentence = (
        f"Median relative error: the paper's rule (left, 5) {_median(errors, 'left', 5)}, two"
        f" Gauss nodes {_median(errors, 'gauss', 2)}, three {_median(errors, 'gauss', 3)}, three"
        f" Radau nodes {_median(errors, 'radau', 3)}, adaptive {_median(errors, *ADAPTIVE)} with"
        f" {cost:.1f} gradients."
    )
    edits, large = ({(p.of, p.label) for p in some} for some in (near, usable))
    caption = (
        "Median relative error of the term against the number of gradients of a rule; the band"
        " holds the middle half of the points. The cross is the adaptive rule."
    )
    heads = ["rule", "gradients", "median", "9 of 10 below", "largest", "right sign"]
    return Found(
        sentence=sentence,
        checks=[_check(near)],
        notes=[
            f"{len(edits)} edits of {len(pairs(near))} pairs whose loss changes by {LEAST} to"
            f" {MODERATE} nats; {len(large - edits)} change more, and are in the figure's right"
            " panel. Radau's first node is the gradient at the post-trained model, which all edits"
            " of a pair share."
        ],
        show=lambda: (
            [Table("Relative error by rule", heads, rows)],
            [("", _figure(near, far), caption)],
        ),
    )


def _check(points: Sequence[Outcome]) -> Check:
    """Check that three Gauss nodes are nearer to the change than the paper's rule, in every pair.

    The edits of a pair are compared one by one, by how many lie nearer with either rule.
    """
    cells = []
    for own in pairs(points).values():
        errors: dict[str, dict[tuple[str, int], float]] = {}
        for point in own:
            for rule, term in point.terms.items():
                if term.value is not None and point.change is not None:
                    at = rule, term.points or 0
                    errors.setdefault(point.label, {})[at] = abs(term.value - point.change)
        both = [e for e in errors.values() if {("gauss", 3), ("left", 5)} <= e.keys()]
        cells.append(nearer([(e["gauss", 3], e["left", 5]) for e in both]))
    claim = (
        "three Gauss nodes are nearer to the measured change than the paper's rule, pair by pair"
    )
    return every("gauss", claim, cells)


def _by_rule(points: Sequence[Outcome]) -> dict[tuple[str, int], Pairs]:
    """Group terms by rule and number of nodes."""
    found: dict[tuple[str, int], Pairs] = {}
    for point in points:
        for rule, term in point.terms.items():
            at = ADAPTIVE if rule == "adaptive" else (rule, term.points or 0)
            if term.value is not None and (at == ADAPTIVE or rule in RULES):
                found.setdefault(at, []).append((term.value, point.change or 0.0))
    return found


def _cost(points: Sequence[Outcome]) -> float:
    """Return the gradients of the points that have the adaptive term, in the mean."""
    costs = [p.gradient_evaluations or 0.0 for p in points if "adaptive" in p.terms]
    return mean(costs) if costs else 0.0


def _errors(pairs: Pairs) -> list[float]:
    """Return the terms' relative errors, the smallest first."""
    return sorted(abs(value - change) / abs(change) for value, change in pairs)


def _signs(pairs: Pairs) -> str:
    """Count the terms that have the measured change's sign."""
    return f"{sum(value * change > 0 for value, change in pairs)} of {len(pairs)}"


def _quantiles(ordered: Sequence[float]) -> list[str]:
    last = len(ordered) - 1
    return [_percent(ordered[round(q * last)]) for q in (0.5, 0.9, 1.0)]


def _median(errors: Mapping[tuple[str, int], Sequence[float]], *at: Any) -> str:
    ordered = errors.get((at[0], at[1]), ())
    return _percent(ordered[len(ordered) // 2]) if ordered else "not taken"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _figure(near: Sequence[Outcome], far: Sequence[Outcome]) -> Any:
    drawn, ((left, right),) = panels(1, 2, 8.4, 3.5)
    titles = (left, near, f"changes of {LEAST} to {MODERATE} nats"), (right, far, "larger changes")
    for axes, points, title in titles:
        errors = {at: _errors(pairs) for at, pairs in _by_rule(points).items()}
        for index, rule in enumerate(RULES):
            counts = sorted(n for r, n in errors if r == rule)
            ordered = [errors[rule, n] for n in counts]
            colour, marker = looks(index)
            axes.plot(counts, [o[len(o) // 2] for o in ordered], color=colour, marker=marker, ms=4,
                      lw=1.3, label=rule)  # fmt: skip
            low, high = ([o[round(q * (len(o) - 1))] for o in ordered] for q in (0.25, 0.75))
            axes.fill_between(counts, low, high, color=colour, alpha=0.12, lw=0)
        if own := errors.get(ADAPTIVE):
            axes.plot(_cost(points), own[len(own) // 2], "kx", ms=7, label="adaptive")
        axes.set(title=title, xlabel="gradients", ylabel="relative error", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
    one_legend(drawn, left, 7)
    return drawn
