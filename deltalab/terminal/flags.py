"""Hydra's flags on the command line, taken as they are written and nothing else.

Hydra's parser would take `--p 0.9` for `--package=0.9` and run the defaults, and flags must stand
together. Here a flag is written out, may stand anywhere, and one that would have no effect is
refused.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from deltalab.settings import near

_REFUSED = {"--experimental-rerun": "would run what a file holds; give the run's settings again"}


def arranged(arguments: Sequence[str], known: Callable[[], Iterable[str]] = list) -> list[str]:
    """Return the arguments with all flags first, each with its value.

    Args:
        arguments: what follows the command's name.
        known: gives the settings there are, for a suggestion.

    Raises:
        ValueError: an abbreviated, unknown or useless flag, or one without its value.

    >>> arranged(["edit=dare", "-m", "edit.p=0.5", "--cfg", "job"])
    ['-m', '--cfg', 'job', 'edit=dare', 'edit.p=0.5']
    """
    from hydra._internal.utils import get_args_parser

    actions: dict[str, Any] = get_args_parser()._option_string_actions
    flags: list[str] = []
    names, settings, left = set(), [], list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            settings.append(argument)
            continue
        name, equals, value = argument.partition("=")
        action = actions.get(name)
        if action is None:
            raise ValueError(_unknown(name, value or next(iter(left), ""), actions, known))
        names.update(action.option_strings)
        flags.append(argument)
        if equals or action.nargs == 0:
            continue
        if action.nargs == "?":  # it may have one of a few values, and the next may be a setting
            flags[-1] = f"{action.option_strings[0]}={action.const}"
            if left and left[0] in action.choices:
                flags[-1] = f"{action.option_strings[0]}={left.pop(0)}"
        elif left:
            flags.append(left.pop(0))
        else:
            raise ValueError(f"{argument}: needs a value")
    for name, why in _REFUSED.items():
        if name in names:
            raise ValueError(f"{name}: {why}")
    if "--package" in names and "--cfg" not in names:
        raise ValueError("--package (-p): chooses what --cfg prints, and has no effect without it")
    return flags + settings


def _unknown(
    name: str, value: str, flags: Iterable[str], known: Callable[[], Iterable[str]]
) -> str:
    """Return what to say of a flag that is none: a setting was meant, or another flag."""
    plain = name.lstrip("-")
    meant = [s for s in known() if plain and (s == plain or s.endswith(f".{plain}"))]
    if not meant:
        return f"{name}: no such flag{near(name, flags)}; settings are given as name=value"
    given = f"={value}" if value and "=" not in value else "=..."
    return f"{name}: no such flag; did you mean {meant[0]}{given}?"
