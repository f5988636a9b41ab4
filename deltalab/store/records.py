"""One JSON file per point, addressed by what determines its result."""

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from deltalab.store import files, shown
from deltalab.store.record import SCHEMA, fault, is_newer

Record = dict[str, Any]
log = logging.getLogger(__name__)
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSW(OR)?D|CREDENTIALS?)S?$", re.IGNORECASE)


def path_of(results: str | Path, key: str) -> Path:
    """Return where the record of a key lies below a results directory."""
    return Path(results) / "records" / f"{key}.json"


def lock_of(results: str | Path, key: str) -> Path:
    """Return the lock under which a point is run (`deltalab.store.locks`)."""
    return Path(results) / "locks" / key


def read(results: str | Path, key: str) -> Record | None:
    """Return a finished record, or None where it is absent, not whole or an error record.

    What is not whole is told once, in one line.

    Raises:
        ValueError: a newer version has written it.
    """
    path = path_of(results, key)
    record = _found(path)
    if record.get("status") != "ok":
        return None
    if why := fault(record):
        if path not in _told:
            log.warning("%s: %s; the point is run again", path, shown.name(why))
        _told.add(path)
        return None
    return record


_told: set[Path] = set()


def _found(path: Path) -> Record:
    """Return what a file holds, empty where it holds no object; raises as `read` does."""
    try:
        record: Record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if is_newer(record):
        raise ValueError(
            f"{path}: a newer version of deltalab has written it (schema {record['schema']}, this"
            f" one knows {SCHEMA}); use that version, or another results=DIR"
        )
    return record if isinstance(record, dict) else {}


def finished(
    results: str | Path, key: str, force: bool = False, experiment: str | None = None
) -> Record | None:
    """Return a point's record if it need not be run again, and count it to the experiment.

    Raises:
        ValueError: a newer version has written it, so that it must not be run over either.
    """
    _found(path_of(results, key))
    done = None if force else read(results, key)
    if done is not None and experiment and done.get("experiment") != experiment:
        enrol(results, experiment, key)
    return done


def enrol(results: str | Path, experiment: str, key: str) -> None:
    """Note that a point which another experiment has run belongs to this one too.

    An empty file `DIR/records/of/<experiment>/<key>` says so; the record itself never changes.
    """
    place = Path(results) / "records" / "of" / shown.folder(experiment)
    place.mkdir(parents=True, exist_ok=True)
    (place / key).touch()


def enrolled(results: str | Path) -> dict[str, list[str]]:
    """Return the further experiments of every key that `enrol` has noted."""
    found: dict[str, list[str]] = {}
    for path in sorted((Path(results) / "records" / "of").glob("*/*")):
        found.setdefault(path.name, []).append(shown.name(unquote(path.parent.name)))
    return found


def check_writable(results: str | Path) -> None:
    """Raise `ValueError` where no record can be written, before anything is computed."""
    directory = path_of(results, "").parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"results={results}: no record can be written there ({error.strerror})"
        ) from None


def redacted(value: Any) -> Any:
    """Return a copy of nested data in which no text tells a secret, or whose home it was made in.

    What environment variables named `...KEY`, `...TOKEN`, `...SECRET` and the like hold is replaced
    by `***`, however it came into the data, and the path of the home directory by `~`.
    """
    found = _redacted(value, dict.fromkeys(map(re.escape, _secrets().values()), "***"))
    home = os.path.expanduser("~").rstrip("/")
    return _redacted(found, {rf"(?<![\w./~-]){re.escape(home)}(?![\w-]|\.\w)": "~"} if home else {})


def secret_in(value: Any) -> str | None:
    """Return the variable of the environment whose secret nested data hold, if they hold one."""
    return next(
        (k for k, v in _secrets().items() if _redacted(value, {re.escape(v): ""}) != value), None
    )


def _secrets() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if _SECRET.search(k) and len(v) >= 8}


def _redacted(value: Any, instead: Mapping[str, str]) -> Any:
    """Return a copy of nested data in whose texts patterns are replaced."""
    if isinstance(value, Mapping):
        return {_redacted(k, instead): _redacted(v, instead) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(v, instead) for v in value]
    if isinstance(value, str):
        for pattern, other in instead.items():
            value = re.sub(pattern, other, value)
    return value


def write(results: str | Path, record: Record) -> Path:
    """Write a record, which appears whole.

    Numbers that JSON cannot hold (NaN, infinities) become null, secrets of the environment `***`.

    Raises:
        OSError: naming the file, where it cannot be written; an earlier record is left as it was.
        ValueError: a newer version has written one, which is left too.
    """
    _found(path_of(results, record["key"]))
    text = json.dumps(_finite(redacted(record)), indent=1, allow_nan=False)
    return files.write(path_of(results, record["key"]), text + "\n")


def write_documents(
    results: str | Path, key: str, documents: Mapping[str, Sequence[float]]
) -> Path | None:
    """Write what every single document scored beside a point's record, for paired comparisons.

    Args:
        results: the results directory.
        key: the point's key.
        documents: the scores of the documents in their order, by metric.

    Returns:
        The path `DIR/documents/<key>.json`, or None where there is nothing to write.
    """
    if not documents:
        return None
    named = {redacted(name): values for name, values in documents.items()}
    text = json.dumps(_finite(named), allow_nan=False)
    return files.write(Path(results) / "documents" / f"{key}.json", text + "\n")


def _finite(value: Any) -> Any:
    """Return JSON-ready data: containers copied, non-finite numbers replaced by None."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
