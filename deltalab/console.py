"""What the terminal shows: one line per point, a bar over a sweep, errors in one line."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_bars: list[Progress] = []  # the bar of the sweep that this process runs, if it runs one


class SweepFailed(Exception):
    """Some points of a sweep failed; the others are finished and recorded."""

    def __init__(self, failures: Sequence[BaseException], total: int) -> None:
        self.failures = failures
        super().__init__(
            f"{len(failures)} of {total} points failed; the first: {one_line(failures[0])}"
        )


@contextmanager
def sweep(total: int) -> Iterator[None]:
    """Show a progress bar on stderr while the points of a sweep run in this process."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task("points", total=total)
        _bars.append(bar)
        try:
            yield
        finally:
            _bars.remove(bar)


def point_done(line: str) -> None:
    """Print the line of a finished point above the bar and move the bar on."""
    if not _bars or not _bars[-1].console.is_terminal:
        print(line, flush=True)
        return
    _bars[-1].print(line, markup=False, highlight=False, soft_wrap=True)
    _bars[-1].advance(_bars[-1].task_ids[0])


def describe(record: Mapping[str, Any], skipped: bool = False) -> str:
    """Return the one line that tells a person what came out of a point."""
    edit = {**record["edit"]}
    name = " ".join([edit.pop("name"), *(f"{k}={v}" for k, v in edit.items() if v is not None)])
    columns = [f"{record['model']:<16} {name:<28}"]
    if loss := record.get("loss"):
        columns.append(f"change {loss['change']:+.4f} ±{loss['error']:.4f}")
    columns += [f"{rule} {t['value']:+.4f}" for rule, t in (record.get("terms") or {}).items()]
    metrics = record.get("metrics") or {}
    columns += [
        f"{k} {v:.4f}" for k, v in metrics.items() if k.endswith(("/accuracy", "/exact_match"))
    ]
    columns.append(f"{record.get('class') or '':<11}")
    columns.append("done before" if skipped else f"{record['seconds']['total']:.1f} s")
    return "  ".join(columns)


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line, Hydra's lists joined by commas.

    >>> one_line(ValueError("no such edit\\n\\nAvailable options in 'edit':\\n\\tdare\\n\\tties\\n"))
    "no such edit. Available options in 'edit': dare, ties"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    text = lines[0] if lines else type(error).__name__
    for before, line in zip(lines, lines[1:], strict=False):
        joint = " " if before.endswith(":") else ", " if _is_item(before, lines) else ". "
        text += joint + line
    return text


def _is_item(line: str, lines: Sequence[str]) -> bool:
    """Tell whether a line is an item of a list that a heading with a colon opened."""
    heads = [i for i, other in enumerate(lines) if other.endswith(":")]
    return bool(heads) and lines.index(line) > heads[0]


def fail(message: str) -> None:
    """Print one line on stderr."""
    print(f"deltalab: {message}", file=sys.stderr, flush=True)
