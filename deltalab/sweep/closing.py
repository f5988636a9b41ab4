"""What a tracker gets when a sweep has ended: the points it has not, a table of all, the figures.

This runs in the process that began the sweep, wherever its points ran.
"""

import json
import logging
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deltalab.report.outcomes import relative_error
from deltalab.store import exporting
from deltalab.store.reading import cards, sort_key
from deltalab.store.record import Outcome, parse
from deltalab.store.records import Record, path_of
from deltalab.sweep import sweeps
from deltalab.tracking.trackers import Sheet

_log = logging.getLogger(__name__)


def sweep_ended(config: DictConfig, folder: Path) -> None:
    """Tell the tracker of a sweep's config what became of the sweep; never an exception.

    Args:
        config: the sweep's, with Hydra's own part.
        folder: where the sweep has noted the keys of its points.
    """
    node = OmegaConf.to_container(config.tracker, resolve=True)
    if not isinstance(node, dict) or str(node.get("_target_")).endswith(".NoTracker"):
        return  # building one would take the imports of a point
    from deltalab.run.building import build

    try:
        tracker, experiment = build(node, "tracker"), config.hydra.runtime.choices.get("experiment")
        results = Path(config.results)
        found = list(records(results, sweeps.keys(folder), experiment))
        if not found or not all(
            tracker.log(record, group=folder.name)
            for record in found
            if record["status"] != "ok" or not tracker.logged(record)
        ):
            return  # each further attempt would wait for a service that does not answer
        points = sorted((parse(record) for record in found), key=sort_key)
        name = experiment or folder.name
        with tempfile.TemporaryDirectory() as place:
            drawn = [*figures(points, name, Path(place)), *own_figures(results, name, found)]
            tracker.log_sheet(sheet(points, drawn), name=name, group=folder.name)
    except Exception as problem:  # a sweep that went well does not fail over its tracker
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        _log.warning("tracker: the sweep's summary was not logged: %s", reason)


def records(results: Path, keys: Sequence[str], experiment: str | None) -> Iterator[Record]:
    """Yield the records of some points, also of failed ones, as records of an experiment."""
    for key in dict.fromkeys(keys):
        with suppress(OSError, ValueError, RecursionError):
            record = json.loads(path_of(results, key).read_text(encoding="utf-8"))
            parse(record)
            yield record | ({"experiment": experiment} if experiment else {})


def sheet(points: Sequence[Outcome], figures: Sequence[tuple[Path, str]] = ()) -> Sheet:
    """Return the table of some points, their classes counted, and each rule's median error.

    >>> found = sheet([Outcome("vit", "dare", {"p": 0.5}, seed=0, change=0.1, classed="improved")])
    >>> dict(zip(found.columns, found.rows[0]))["edit/p"], dict(found.numbers)
    (0.5, {'count': 1, 'failed': 0, 'class/improved': 1})
    """
    rules = list(dict.fromkeys(rule for p in points for rule in p.terms))
    failed = sum(p.failure is not None for p in points)
    classes = Counter(f"class/{p.classed}" for p in points if p.classed)
    numbers = {"count": len(points), "failed": failed, **classes, **dict(_medians(points, rules))}
    return Sheet(*exporting.sheet(points), numbers, figures)


def _medians(points: Sequence[Outcome], rules: Sequence[str]) -> Iterator[tuple[str, float]]:
    for rule in rules:
        errors = [relative_error(p.terms.get(rule), p) for p in points]
        if known := [error for error in errors if error is not None]:
            yield f"median_relative_error/{rule}", statistics.median(known)


def figures(points: Sequence[Outcome], name: str, place: Path) -> list[tuple[Path, str]]:
    """Draw what the report would draw of some points; nothing without matplotlib."""
    done = [point for point in points if point.failure is None]
    if not done or find_spec("matplotlib") is None:
        return []
    from deltalab.report.figures import draw

    return draw(done, place, name)


def own_figures(
    results: Path, name: str, found: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Path, str]]:
    """Yield the figures that an experiment has drawn itself, if they are of these very records.

    They lie where cards do, as `DIR/paper/NAME.png` and `DIR/paper/NAME_*.png`; one that is older
    than a record is not of it.
    """
    latest = max(path_of(results, record["key"]).stat().st_mtime for record in found)
    for path in [*cards(results, f"{name}.png"), *cards(results, f"{name}_*.png")]:
        if path.stat().st_mtime >= latest:
            yield path, path.stem
