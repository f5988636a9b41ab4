"""Trackers: where a finished point's record is sent, after it is safe on disk.

Local records never depend on a tracker: whatever goes wrong in one costs a line in the log.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deltalab.settings import home
from deltalab.store import files, shown
from deltalab.store.reading import TRACKED
from deltalab.store.record import parse
from deltalab.store.records import secret_in
from deltalab.tracking import runs

LONGEST = 128
"""Characters of a name that the service takes; a longer one fails when it is sent."""
MODES = ("offline", "online", "disabled")
FAILED = ".failed"
"""Ends the name of the file of a point that failed: it runs again, and is logged again."""
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
        ValueError: `mode` is not one of these, `project` is empty, a name is too long or a secret,
            wandb is not installed, or it is to send at once and there is no key.

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
        for name in ("project", "entity", "group"):
            if len(getattr(self, name) or "") > LONGEST:
                raise ValueError(f"tracker.{name}: must have {LONGEST} characters at most")
        if find_spec("wandb") is None:
            raise ValueError("tracker=wandb: needs the package wandb (pip install deltalab[wandb])")
        if self.mode == "online" and not has_account():
            raise ValueError(
                "tracker.mode=online: no key of an account here; `wandb login` keeps one, or set"
                " WANDB_API_KEY, or use tracker.mode=offline and `wandb sync` later"
            )

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
        point = parse(record)
        rows, results, notes = runs.nodes(point), runs.numbers(point), runs.words(point)
        # A point belongs to its experiment, however many sweeps it took to complete that.
        run = self._begun(
            group=shown.name(self.group or record.get("experiment") or group, LONGEST),
            job_type="point",
            name=runs.run_name(point),
            tags=runs.tags(point, record.get("experiment")),
            config={**runs.config(point), "sweep": group},
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
        if self.mode != "disabled":
            mark, failed = self._mark(record), self._mark(record, FAILED)
            if point.failure is None:
                failed.unlink(missing_ok=True)
            files.write(mark if point.failure is None else failed, runs.essence(record) + "\n")

    def _log_sheet(self, sheet: Sheet, name: str, group: str) -> None:
        import wandb

        run = self._begun(
            group=shown.name(self.group or name, LONGEST),
            job_type="summary",
            name=shown.name(f"{name} summary", LONGEST),
            tags=[shown.name(name, runs.MOST_OF_TAG), "summary"],
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

    def _mark(self, record: Mapping[str, Any], end: str = "") -> Path:
        """Return the file that holds a point's record if it was logged."""
        experiment, key = record.get("experiment") or "runs", f"{record.get('key')}{end}"
        names = self.project, str(experiment), key
        return Path(self.dir, TRACKED, *map(shown.folder, names))


def has_account() -> bool:
    """Whether wandb would find a key: in the environment, or where `wandb login` has put it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = os.environ.get("NETRC")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    for place in [own] if own else ("~/.netrc", "~/_netrc"):
        with suppress(OSError, NetrcParseError):
            if netrc(os.path.expanduser(place)).authenticators(str(host)):
                return True
    settings = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"  # it may name another host
    return (Path(settings).expanduser() / "settings").is_file()


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
