"""What of a composed config decides a result, and so belongs into a record's key.

Specs say what does not, and what is more than its name, by two class attributes:

* `beside`: fields that decide no result, such as a cache's place or the retries of a service;
* `files`: fields that name a file whose content decides it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def determining(node: Any, built: Any) -> Any:
    """Return the settings of a config node that decide results.

    Args:
        node: plain containers.
        built: what was built from it.

    >>> from deltalab.edits.dare import Dare
    >>> determining({"_target_": "deltalab.edits.dare.Dare", "p": 0.5, "k": 0.0}, Dare(0.5, 0.0))
    {'_target_': 'deltalab.edits.dare.Dare', 'p': 0.5, 'k': 0.0}
    """
    if not isinstance(node, Mapping):
        return node
    beside, files = (getattr(type(built), name, ()) for name in ("beside", "files"))
    found = {
        name: determining(value, getattr(built, name, None))
        for name, value in node.items()
        if name not in beside
    }
    for name in files:
        if (digest := _digest(getattr(built, name))) is not None:
            found[f"{name} content"] = digest
    return found


def _digest(path: str | None) -> str | None:
    """Return a digest of a local file, None of what is none: a directory, an id of the hub."""
    if path is None or not (file := Path(path).expanduser()).is_file():
        return None
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
