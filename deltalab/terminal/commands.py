"""What all commands share: streams that take any text, help, one line for a user's mistake."""

import codecs
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from deltalab.store import shown

_PLAIN = {"±": "+-", "…": "...", "\u00d7": "x", "\u2212": "-"}
"""What is written in the place of our own signs where an encoding lacks them."""


def command(
    name: str, usage: str, body: Callable[[list[str]], int | None], argv: Sequence[str] | None
) -> int:
    """Run a command's body on its arguments, those of the process where `argv` is None.

    Returns:
        What the body returns, 0 for None; 0 after `--help`; 2 for a user's mistake.
    """
    ready()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if {"-h", "--help"} & set(arguments):
            print(usage, end="", flush=True)
            return 0
        code = body(arguments) or 0
        with suppress(AttributeError):  # a process without an output has no stream
            sys.stdout.flush()
        return code
    except (ValueError, OSError) as mistake:
        print(f"{name}: {shown.line(mistake)}", file=sys.stderr)
        return 2


def ready() -> None:
    """Let this process's output take every text, and end at leisure where nobody reads it.

    Signs that the encoding lacks are replaced. Where a reader has gone, as after `| head -1`, the
    rest is dropped, and what the command writes into files is written all the same.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="shown")
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.flush()
            setattr(sys, name, _lasting(stream, number))


def _lasting(stream: io.TextIOWrapper, number: int) -> io.TextIOWrapper:
    """Return a stream like one of the process's own, which outlives its reader."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors="shown",
        line_buffering=stream.line_buffering,
    )


class _Pipe(io.FileIO):
    """A file that drops what is written to a pipe that nobody reads."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _without(error: UnicodeError) -> tuple[str, int]:
    """Replace the signs that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, ascii(sign)[1:-1]) for sign in missing), error.end


codecs.register_error("shown", _without)
