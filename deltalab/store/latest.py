"""What is open now: one model, its batches, its tasks. The old is let go before the new is made.

Functions that open something share named slots of one value each. Consecutive points of a sweep get
the value that is there; another model first closes the one before, and all that holds it.
"""

import gc
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_held: dict[str, tuple[Any, Any]] = {}
_uses: dict[str, set[str]] = {}
_stamps: dict[str, str] = {}


def latest(slot: str, *uses: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keep a function's last value in a slot, for calls with equal arguments.

    Args:
        slot: the slot's name; functions of one slot share the one value.
        uses: the slots whose values this one refers to: it is let go with them.

    >>> made = []
    >>> @latest("doctest")
    ... def opened(name):
    ...     made.append(name)
    ...     return name
    >>> opened("a"), opened("a"), opened("b"), made
    ('a', 'a', 'b', ['a', 'b'])
    """
    _uses.setdefault(slot, set()).update(uses)

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def shared(*args: P.args, **kwargs: P.kwargs) -> T:
            stamps = [_stamps.get(name, "") for name in (slot, *uses)]
            key = function.__module__, function.__qualname__, args, kwargs, stamps
            held = _held.get(slot)
            if held is None or held[0] != key:
                held = None
                forget(slot)
                value = function(*args, **kwargs)
                _held[slot] = key, value
                return value
            found: T = held[1]
            return found

        return shared

    return decorate


def stamp(**digests: str) -> None:
    """Say what the contents behind slots are now: a value made of other contents is made anew."""
    _stamps.update(digests)


def forget(*slots: str) -> None:
    """Let go of slots, of all where none is named, and of whatever refers to them."""
    gone = set(slots or _held)
    while more := {name for name, used in _uses.items() if used & gone} - gone:
        gone |= more
    if gone & _held.keys():
        for name in gone:
            _held.pop(name, None)
        gc.collect()  # modules and their hooks refer to each other in circles
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
