"""Trackers: where a finished point's record is sent, after it is safe on disk.

Local records never depend on a tracker: whatever goes wrong in one costs a line in the log.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from deltalab.outcomes import label

MODES = ("offline", "online", "disabled")
_SECRET = re.compile(r"(^|_)(api_key|apikey|token|secret|passw(or)?d|credentials?)$", re.IGNORECASE)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoTracker:
    """Keep nothing but the local records."""

    def log(self, record: Mapping[str, Any], *, group: str) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Wandb:
    """Log every point as one run of Weights & Biases.

    Args:
        project: the project the runs belong to.
        entity: user or team; None is the account's default.
        mode: `offline` writes below `dir` for a later `wandb sync`, `online` sends at once,
            `disabled` does neither.
        group: the group of the runs; None is the sweep's name.
        dir: the directory in which `wandb/` is made.

    Raises:
        ValueError: if `mode` is not one of these, `project` is empty or wandb is not installed.

    >>> Wandb(mode="ofline")
    Traceback (most recent call last):
    ...
    ValueError: tracker.mode='ofline': must be one of offline, online, disabled
    """

    project: str = "deltalab"
    entity: str | None = None
    mode: str = "offline"
    group: str | None = None
    dir: str = "results"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"tracker.mode={self.mode!r}: must be one of {', '.join(MODES)}")
        if not self.project:
            raise ValueError(f"tracker.project={self.project!r}: must be a project's name")
        if find_spec("wandb") is None:
            raise ValueError("tracker=wandb: needs the package wandb (pip install deltalab[wandb])")

    def log(self, record: Mapping[str, Any], *, group: str) -> None:
        """Log one record as one finished run; a failure is a warning, never an exception."""
        try:
            self._log(record, self.group or group)
        except Exception as problem:
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())
            _log.warning("wandb: point %s was not logged: %s", record.get("key"), reason)

    def _log(self, record: Mapping[str, Any], group: str) -> None:
        import wandb

        rows, results, notes = nodes(record), numbers(record), words(record)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            init_timeout=30,
        )
        # Without finish_previous, init would hand back a run that an interrupted point left open.
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,  # type: ignore[arg-type]
            dir=self.dir,
            group=group,
            job_type="point",
            name=run_name(record),
            tags=tags(record),
            config=config(record),
            reinit="finish_previous",
            settings=settings,
        )
        try:
            for name in {name for row in rows for name in row}:
                run.define_metric(name, summary="none")
            for step, row in enumerate(rows):
                run.log(row, step=step)
            run.log(results, step=len(rows))
            run.summary.update(notes)
        finally:
            run.finish(exit_code=int(record.get("status") != "ok"))


def run_name(record: Mapping[str, Any]) -> str:
    """Name a run for a person.

    >>> edit = {"name": "dare", "p": 0.5, "k": 0.0}
    >>> run_name({"edit": edit, "seed": 0, "model": "mnist_vit"})
    'dare p=0.5 k=0 seed=0 mnist_vit'
    """
    edit = dict(record.get("edit") or {})
    name = label(str(edit.pop("name", "edit")), edit)
    return f"{name} seed={record.get('seed')} {record.get('model')}"


def tags(record: Mapping[str, Any]) -> list[str]:
    """Tag a run with its model, edit, class or status, and experiment, where it has them."""
    edit = (record.get("edit") or {}).get("name")
    kind = record.get("class") or record.get("status")
    found = [record.get("model"), edit, kind, record.get("experiment")]
    # The service refuses tags beyond 64 characters, and a tag twice.
    return list(dict.fromkeys(str(tag)[:64] for tag in found if tag))


def config(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a point: its configuration and origin, flat and without secrets.

    >>> config({"model": "vit", "edit": {"name": "dare", "p": 0.5}, "config": {"api_key": "x"}})
    {'edit/name': 'dare', 'edit/p': 0.5, 'model': 'vit'}
    """
    origin = ("key", "experiment", "model", "seed", "select", "git", "device", "versions")
    named = {name: record.get(name) for name in (*origin, "edit")}
    pairs = {**dict(_flat(record.get("config") or {})), **dict(_flat(named))}
    kept = {k: v for k, v in pairs.items() if not _SECRET.search(k.rpartition("/")[2])}
    return dict(sorted(kept.items()))


def nodes(record: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return one row for each node of the rules: its place on the path and its inner product.

    >>> nodes({"terms": {"left": {"nodes": [0.0, 0.5], "inner": [1.0, 3.0]}}})[1]
    {'left/t': 0.5, 'left/inner': 3.0}
    """
    rows: list[dict[str, float]] = []
    for rule, term in _terms(record).items():
        for index, (t, inner) in enumerate(
            zip(term.get("nodes") or (), term.get("inner") or (), strict=True)
        ):
            rows.extend([{}] * (index + 1 - len(rows)))
            rows[index] = {**rows[index], f"{rule}/t": t, f"{rule}/inner": inner}
    return rows


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return all results of a point that are numbers, by flat names; metrics keep theirs."""
    named: dict[str, Any] = {"term": (record.get("term") or {}).get("value")}
    for rule, term in _terms(record).items():
        named[f"term/{rule}"] = term.get("value")
        named[f"term/{rule}/by_part"] = term.get("by_part")
    for name in ("loss", "prediction", "touched", "seconds"):
        named[name] = record.get(name)
    for name in ("gradient_evaluations", "peak_memory_bytes"):
        named[name] = record.get(name)
    found = {**dict(_flat(named)), **(record.get("metrics") or {})}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and v is not None}


def words(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the results that are words: status, class, the loss's unit, and what went wrong."""
    loss, error = record.get("loss") or {}, record.get("error") or {}
    found = {
        "status": record.get("status"),
        "class": record.get("class"),
        "loss/objective": loss.get("objective"),
        "loss/unit": loss.get("unit"),
        "error/type": error.get("type"),
        "error/message": error.get("message"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _terms(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    terms = record.get("terms")
    if not terms and record.get("term"):
        terms = {record["term"].get("rule"): record["term"]}
    return {str(rule): term for rule, term in (terms or {}).items() if term}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value
