"""The one line of a finished point, as the terminal shows it."""

import math
from collections.abc import Mapping
from typing import Any

from deltalab.report.outcomes import label
from deltalab.report.tables import is_lenient, is_score


def describe(record: Mapping[str, Any], skipped: bool = False) -> str:
    """Return the one line that tells a person what came out of a point."""
    hyper = {**record["edit"]}
    name = label(hyper.pop("name"), hyper)
    columns = [f"{record['model']:<16} {name:<28}"]
    if loss := record.get("loss"):
        change, error = (_number(loss[name]) for name in ("change", "error"))
        columns.append(f"change {change:+.4f} ±{error:.4f}")
    for rule, found in (record.get("terms") or {}).items():
        doubt = "?" if found.get("converged") is False else ""  # its error estimate is too large
        columns.append(f"{rule} {_number(found['value']):+.4f}{doubt}")
    metrics = record.get("metrics") or {}
    scores = [k for k in metrics if is_score(k) and not is_lenient(k)]
    columns += [f"{k} {metrics[k]:.4f}" for k in scores[:3]]
    columns.append(f"{record.get('class') or '':<11}")
    columns.append("done before" if skipped else f"{record['seconds']['total']:.1f} s")
    return "  ".join(columns)


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # a record holds no infinities and no NaN
