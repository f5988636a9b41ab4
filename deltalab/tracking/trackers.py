"""Trackers: where a finished point's record is sent, after it is safe on disk.

Local records never depend on a tracker: whatever goes wrong in one costs a line in the log.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deltalab.report.offline import POINT, RECORD
from deltalab.settings import home
from deltalab.store.records import secret_in
from deltalab.tracking import runs

MODES = ("offline", "online", "disabled")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoTracker:
    """Keep nothing but the local records."""

    def log(self, record: Mapping[str, Any], *, group: str) -> bool:
        """Do nothing."""
        return True


@dataclass(frozen=True)
class Sheet:
    """What a sweep's last run shows: a table of all points, a few numbers, and figures.

    Attributes:
        columns: the names of the table's columns.
        rows: one for each point, of texts, numbers and None.
        numbers: counts, by flat names.
        figures: images with their captions.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Mapping[str, float]
    figures: Sequence[tuple[Path, str]] = ()


@dataclass(frozen=True)
class Wandb:
    """Log every point as one run of Weights & Biases, and every sweep as one more.

    Args:
        project: the project the runs belong to.
        entity: user or team; None is the account's default.
        mode: `offline` writes below `dir` for a later `wandb sync`, `online` sends at once,
            `disabled` does neither.
        group: the group of the runs; None is the experiment's name, without one the sweep's.
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
        object.__setattr__(self, "dir", home(self.dir, "tracker.dir"))
        if self.mode not in MODES:
            raise ValueError(f"tracker.mode={self.mode!r}: must be one of {', '.join(MODES)}")
        if not self.project:
            raise ValueError(f"tracker.project={self.project!r}: must be a project's name")
        if name := secret_in([self.project, self.entity, self.group]):
            raise ValueError(f"tracker: what {name} holds is no name of a project, team or group")
        if find_spec("wandb") is None:
            raise ValueError("tracker=wandb: needs the package wandb (pip install deltalab[wandb])")

    def log(self, record: Mapping[str, Any], *, group: str) -> bool:
        """Log one record as one finished run; a failure is a warning, never an exception.

        Args:
            record: the point's.
            group: the sweep's name.

        Returns:
            Whether it was logged.
        """
        with _warned(f"point {record.get('key')}") as failures:
            self._log(record, group)
        return not failures

    def logged(self, record: Mapping[str, Any]) -> bool:
        """Whether a point that went well was logged before, for the experiment in its record."""
        return self._mark(record).exists()

    def log_sheet(self, sheet: Sheet, *, name: str, group: str) -> bool:
        """Log what a sweep has come to; a failure is a warning, never an exception.

        Args:
            sheet: what is logged.
            name: the experiment's, or the sweep's.
            group: the sweep's name.

        Returns:
            Whether it was logged.
        """
        with _warned(f"the summary of {name}") as failures:
            self._log_sheet(sheet, name, group)
        return not failures

    def _log(self, record: Mapping[str, Any], group: str) -> None:
        rows, results, notes = runs.nodes(record), runs.numbers(record), runs.words(record)
        # A point belongs to its experiment, however many sweeps it took to complete that.
        run = self._begun(
            group=self.group or record.get("experiment") or group,
            job_type=POINT,
            name=runs.run_name(record),
            tags=runs.tags(record),
            config={**runs.config(record), "sweep": group},
        )
        try:
            for name in {name for row in rows for name in row}:
                run.define_metric(name, summary="none")
            for step, row in enumerate(rows):
                run.log(row, step=step)
            run.log(results, step=len(rows))
            run.summary.update({**notes, RECORD: runs.essence(record)})
        finally:
            run.finish(exit_code=int(record.get("status") != "ok"))
        if record.get("status") == "ok" and self.mode != "disabled":
            mark = self._mark(record)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()

    def _log_sheet(self, sheet: Sheet, name: str, group: str) -> None:
        import wandb

        run = self._begun(
            group=self.group or name,
            job_type="summary",
            name=f"{name} summary",
            tags=[name[: runs.MOST_OF_TAG], "summary"],
            config={"experiment": name, "sweep": group},
        )
        try:
            table = wandb.Table(
                columns=list(sheet.columns),
                data=[list(row) for row in sheet.rows],
                allow_mixed_types=True,
            )
            images = {
                f"figures/{path.stem}": wandb.Image(str(path), caption=caption)
                for path, caption in sheet.figures
            }
            run.log({"points": table, **images})
            run.summary.update(dict(sheet.numbers))
        finally:
            run.finish()

    def _begun(self, **about: Any) -> Any:
        import wandb

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
        return wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,  # type: ignore[arg-type]
            dir=self.dir,
            reinit="finish_previous",
            settings=settings,
            **about,
        )

    def _mark(self, record: Mapping[str, Any]) -> Path:
        """Return the empty file that says that a point was logged."""
        names = self.project, str(record.get("experiment") or "runs"), str(record.get("key"))
        return Path(self.dir, "wandb", ".points", *(quote(name, safe="") for name in names))


@contextmanager
def _warned(what: str) -> Iterator[list[Exception]]:
    """Turn an exception into a warning; yields a list that it is put into."""
    failures: list[Exception] = []
    try:
        yield failures
    except Exception as problem:
        failures.append(problem)
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        _log.warning("wandb: %s was not logged: %s", what, reason)
