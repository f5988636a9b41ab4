"""What the commands beside `deltalab` share: help, and one line for a user's mistake."""

import sys
from collections.abc import Callable, Sequence


def command(
    name: str, usage: str, body: Callable[[list[str]], int | None], argv: Sequence[str] | None
) -> int:
    """Run a command's body on its arguments, those of the process where `argv` is None.

    Returns:
        What the body returns, 0 for None; 0 after `--help`; 2 for a user's mistake.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(usage, end="")
        return 0
    try:
        return body(arguments) or 0
    except (ValueError, OSError) as mistake:
        print(f"{name}: {mistake}", file=sys.stderr)
        return 2
