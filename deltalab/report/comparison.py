"""Two points compared on the documents that both were scored on: differences and a paired test."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltalab.report.outcomes import pair_names
from deltalab.report.tables import Column
from deltalab.store.fields import plain
from deltalab.store.record import Outcome
from deltalab.store.shown import folder


@dataclass(frozen=True)
class Comparison:
    """One metric of two points on the same documents.

    Attributes:
        metric: its name.
        documents: on how many both have a score.
        first: the mean of the first point.
        second: the mean of the second.
        error: standard error of second - first, from the documents' differences.
        better: documents on which the second point scores higher, and lower.
        probability: of a split at least as uneven among the documents that differ, were both
            points equally good: the exact two-sided sign test, which is McNemar's for scores of
            0 and 1.
    """

    metric: str
    documents: int
    first: float
    second: float
    error: float
    better: tuple[int, int]
    probability: float


def compare(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> list[Comparison]:
    """Compare two points on every metric of which both have the same number of documents.

    >>> found = compare({"gsm/acc": [0, 0, 0, 1, 1]}, {"gsm/acc": [1, 1, 1, 1, 0]})[0]
    >>> found.first, found.second, found.better, found.probability
    (0.4, 0.8, (3, 1), 0.625)
    """
    found = []
    for metric in first:
        if metric.endswith("@post"):  # what the unedited model scored, kept with every point
            continue
        a, b = first[metric], second.get(metric, ())
        if len(a) != len(b):
            continue
        both = [(x, y) for x, y in zip(a, b, strict=True) if not math.isnan(x + y)]
        if not both:
            continue
        a, b = [x for x, _ in both], [y for _, y in both]
        differences = [y - x for x, y in zip(a, b, strict=True)]
        count, mean = len(a), math.fsum(differences) / len(a)
        squares = math.fsum((d - mean) ** 2 for d in differences)
        error = math.sqrt(squares / max(1, count - 1) / count)
        better = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        means = math.fsum(a) / count, math.fsum(b) / count
        found.append(Comparison(metric, count, *means, error, better, sign_test(*better)))
    return found


def sign_test(up: int, down: int) -> float:
    """Return the exact two-sided probability of a split of fair coins at least as uneven.

    >>> sign_test(5, 0), sign_test(2, 2)
    (0.0625, 1.0)
    """
    total = up + down
    tail = sum(math.comb(total, k) for k in range(max(up, down), total + 1))
    return float(min(1.0, 2 * tail / 2**total))


def chosen(points: Sequence[Outcome], name: str) -> Outcome:
    """Return the one point that a key, or an edit as the report writes it, names.

    Raises:
        ValueError: no such point, or several of them.
    """
    found = [
        p for p in points if name in (p.key, p.label, f"{p.model} {p.label}", f"{p.pair} {p.label}")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        keys = ", ".join(f"{p.key} ({told})" for p, told in zip(found, _apart(found), strict=True))
        raise ValueError(f"compare={name!r}: several points, name one by its key: {keys}")
    known = ", ".join(repr(p.label) for p in points[:5]) + ("..." if len(points) > 5 else "")
    raise ValueError(f"compare={name!r}: no such point; there are {known}")


def _apart(points: Sequence[Outcome]) -> list[str]:
    """Say of every point what sets it apart from the others."""
    pairs = pair_names(points)
    varying = [
        n for n in ("seed", "select", "experiment") if len({getattr(p, n) for p in points}) > 1
    ]
    words = [[f"{name}={plain(getattr(point, name))}" for name in varying] for point in points]
    if len(pairs) > 1:
        words = [[pairs[p.of], *own] for p, own in zip(points, words, strict=True)]
    return [" ".join(own) or "no known difference" for own in words]


def documents(directory: Path, point: Outcome) -> dict[str, list[float]]:
    """Read what every document of a point scored, NaN where it has no score.

    Raises:
        ValueError: nothing readable was kept of this point.
    """
    path = directory / "documents" / f"{folder(point.key)}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): [math.nan if v is None else float(v) for v in values]
            for name, values in kept.items()
        }
    except FileNotFoundError:
        raise ValueError(f"{path}: no scores of single documents for {point.label!r}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error})") from None


def table(found: Sequence[Comparison], labels: tuple[str, str]) -> list[Column]:
    """Return the comparison's columns."""
    rows = [
        (
            c.metric,
            str(c.documents),
            f"{c.first:.4f}",
            f"{c.second:.4f}",
            f"{c.second - c.first:+.4f} ± {c.error:.4f}",
            f"{c.better[0]} : {c.better[1]}",
            f"{c.probability:.2g}",
        )
        for c in found
    ]
    heads = ("metric", "documents", *labels, "difference", "better : worse", "sign test p")
    cells = list(zip(*rows, strict=True)) or [()] * len(heads)
    return [Column(h, c, right=h != "metric") for h, c in zip(heads, cells, strict=True)]
