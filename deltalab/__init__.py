"""Experiments on delta parameters: edit them, predict the loss change, measure it.

The functions of `deltalab.api` are here by name, fetched when they are first used, so that
`import deltalab` costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltalab.api import (
        change,
        decode,
        edit,
        edited,
        encode,
        loaded,
        methods,
        objective,
        pair,
        predict,
        save,
        term,
    )

__version__ = "0.1.0"
__all__ = [
    "change",
    "decode",
    "edit",
    "edited",
    "encode",
    "loaded",
    "methods",
    "objective",
    "pair",
    "predict",
    "save",
    "term",
]


def __getattr__(name: str) -> Any:
    """Return a function of the front door."""
    if name not in __all__:
        raise AttributeError(f"module 'deltalab' has no attribute {name!r}")
    from deltalab import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
