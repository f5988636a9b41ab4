"""One JSON file per point, addressed by what determines its result."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
Record = dict[str, Any]


def key_of(determinants: Mapping[str, Any]) -> str:
    """Return the content address of a point: a hash of everything that determines its result.

    Args:
        determinants: nested settings, serialisable as JSON. Order does not matter.

    Returns:
        16 hexadecimal digits.

    >>> key_of({"a": 1, "b": 0.5}) == key_of({"b": 0.5, "a": 1}) != key_of({"a": 2, "b": 0.5})
    True
    """
    text = json.dumps({"schema": SCHEMA, **determinants}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_of(results: str | Path, key: str) -> Path:
    """Return where the record of a key lies below a results directory."""
    return Path(results) / "records" / f"{key}.json"


def read(results: str | Path, key: str) -> Record | None:
    """Return a finished record, or None where it is absent, unreadable or an error record."""
    try:
        record: Record = json.loads(path_of(results, key).read_text())
    except (OSError, ValueError):
        return None
    return record if record.get("status") == "ok" and record.get("schema") == SCHEMA else None


def write(results: str | Path, record: Record) -> Path:
    """Write a record to a temporary name and rename it, so that a reader never sees half of one.

    Numbers that JSON cannot hold (NaN, infinities) become null.
    """
    path = path_of(results, record["key"])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(record), indent=1, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _finite(value: Any) -> Any:
    """Return JSON-ready data: containers copied, non-finite numbers replaced by None."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
