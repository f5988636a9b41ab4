"""What the terminal shows: lines above a bar over a sweep, errors in one line."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deltalab.store import shown
from deltalab.store.records import redacted
from deltalab.terminal import commands

_bars: list[Progress] = []  # the bar of the sweep that this process runs, if it runs one


class SweepFailed(Exception):
    """Some points of a sweep failed; the others are finished and recorded."""

    def __init__(self, failures: Sequence[BaseException], total: int) -> None:
        self.failures = failures
        super().__init__(
            f"{len(failures)} of {total} points failed; the first: {one_line(failures[0])}"
        )


def rich_console(**given: Any) -> Console:
    """Return a console of rich that takes no text for markup, emoji or something to highlight."""
    return Console(markup=False, emoji=False, highlight=False, **given)


class _Record(logging.LogRecord):
    """An entry of a log that shows what it is given as plain text, on one line each."""

    def getMessage(self) -> str:
        """Return the message; its own lines stay."""
        if isinstance(self.args, tuple):
            self.args = tuple(
                shown.line(one) if isinstance(one, str | Path | BaseException) else one
                for one in self.args
            )
        return shown.lines(super().getMessage())


def ready() -> None:
    """Prepare this process for text from anywhere, in what it prints and in what it logs."""
    commands.ready()
    logging.setLogRecordFactory(_Record)


@contextmanager
def sweep(total: int) -> Iterator[None]:
    """Show a progress bar on stderr while the points of a sweep run in this process."""
    with _shown() as bar:
        bar.add_task("points", total=total)
        yield


@contextmanager
def steps(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr for the steps of one point, below the sweep's bar if there is one.

    Args:
        name: what the bar is called.
        total: how many steps there are.

    Yields:
        What to call at every step.
    """
    with nullcontext(_bars[-1]) if _bars else _shown() as bar:
        task = bar.add_task(shown.name(name), total=total)
        try:
            yield lambda: bar.advance(task)
        finally:
            bar.remove_task(task)


@contextmanager
def _shown() -> Iterator[Progress]:
    console = rich_console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        _bars.append(bar)
        try:
            yield bar
        finally:
            _bars.remove(bar)


def point_done(text: str) -> None:
    """Print what a finished point has to say above the bar and move the bar on."""
    text = shown.lines(redacted(text))
    if not _bars or not _bars[-1].console.is_terminal:
        print(text, flush=True)
        return
    _bars[-1].print(text, soft_wrap=True)
    _bars[-1].advance(_bars[-1].task_ids[0])


def waiting(count: int) -> None:
    """Say that other processes are running points of this sweep."""
    point = f"{count} point{'s' if count > 1 else ''}"
    fail(f"{point} of this sweep are being run by other processes: waiting for them")


def one_line(error: BaseException) -> str:
    r"""Return an exception's message as one line; Hydra's indented lists are joined by commas.

    >>> one_line(ValueError("Could not find 'edit/x'\n\nAvailable:\n\tdare\n\tties\n"))
    "Could not find 'edit/x'. Available: dare, ties"
    >>> one_line(ValueError("Missing mandatory value: name\n    full_key: model.name"))
    'Missing mandatory value: name (model.name)'
    >>> one_line(OSError(28, "No space left on device", "results/a.json"))
    'results/a.json: no space left on device'
    """
    text = ""
    previous = ""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[0].lower() + error.strerror[1:]
        return shown.line(redacted(f"{error.filename}: {reason}" if error.filename else reason))
    message = (str(error) or str(error.__cause__ or "")).split("Config search path:")[0]
    for line in filter(str.strip, message.splitlines()):
        if line.strip().startswith("object_type="):
            continue
        if line.strip().startswith("full_key: "):
            text += f" ({line.split(': ')[1]})"
            continue
        joint = ", " if previous.startswith("\t") and line.startswith("\t") else ". "
        text += ("" if not text else " " if text.endswith((":", ".")) else joint) + line.strip()
        previous = line
    return shown.line(redacted(text)) or type(error).__name__


def fail(message: str) -> None:
    """Print one line on stderr."""
    print(f"deltalab: {shown.line(message)}", file=sys.stderr, flush=True)
