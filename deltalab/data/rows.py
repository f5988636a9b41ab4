"""Rows of text data: JSON lines, JSON, CSV and parquet files, or a Hugging Face data set.

Files are read in order and only as far as `limit` asks. Every row knows where it stands, so that
whatever is wrong with it is said with its file and line.
"""

from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from deltalab.data import formats
from deltalab.store import reach


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        where: the file and line, for messages.
        fields: values by field name.
    """

    where: str
    fields: dict[str, Any]

    def value(self, field: str, setting: str) -> Any:
        """Return a field's value.

        Raises:
            ValueError: the row has no such field, or null in it.
        """
        if (found := self.fields.get(field)) is not None:
            return found
        problem = "is null" if field in self.fields else "is missing"
        names = ", ".join(str(name) for name in list(self.fields)[:20]) or "none"
        raise ValueError(
            f"{self.where}: field {field!r} {problem}; the fields are {names} (data.{setting})"
        )

    def text(self, field: str, setting: str) -> str:
        """Return a field's text.

        Raises:
            ValueError: the field is missing, is no text, is empty, or cannot be tokenised.
        """
        return checked(self.value(field, setting), f"{self.where}: field {field!r}")


def checked(value: Any, where: str, empty: bool = False) -> str:
    """Return a text that a tokenizer can take.

    Args:
        value: what should be a text.
        where: what to call it in messages.
        empty: whether it may be empty.

    >>> checked("4", "a.jsonl:1: field 'answer'")
    '4'

    Raises:
        ValueError: no text, only white space, or with NUL characters or lone surrogates in it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} is {formats.short(value)}, must be a text")
    if not empty and not value.strip():
        raise ValueError(f"{where} is empty")
    if (at := value.find("\0")) >= 0:
        raise ValueError(f"{where} holds a NUL character, at {at}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a surrogate pair, at {error.start}") from None
    return value


def read(
    path: str, config: str | None = None, split: str | None = None, limit: int | None = None
) -> list[Row]:
    """Return the rows of a file or data set, in order.

    Args:
        path: a file that ends in one of `formats.ENDINGS`; a directory with a file named after the
            split, or a local clone of a data set; a Hugging Face id; `package:` and a path within
            this package's embedded data.
        config: the configuration of a data set that has several.
        split: the split of a data set or directory.
        limit: the first so many rows only.

    Raises:
        FileNotFoundError: no such file, and no data set of this name to be had.
        ValueError: a file that cannot be read, or without rows.
    """
    place = _packaged(path) if path.startswith("package:") else _in_directory(path, split)
    if place.is_file():
        rows = [Row(*found) for found in islice(formats.rows(place), limit)]
    elif _is_clone(place, config) if place.is_dir() else _is_id(path):
        rows = _data_set(str(place) if place.is_dir() else path, config, split, limit)
    else:
        what = f"no file {split} or data set in it" if place.is_dir() else "no such file"
        raise FileNotFoundError(f"data.path={path}: {what}")
    if not rows:
        raise ValueError(f"data.path={path}: no rows in it")
    return rows


def _packaged(path: str) -> Path:
    root = Path(str(files("deltalab"))) / "zoo"
    place = root / path.removeprefix("package:")
    if not place.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"data.path={path}: leads out of the package's data")
    if not place.is_file():
        raise FileNotFoundError(f"data.path={path}: the package has no such file")
    return place


def _is_id(path: str) -> bool:
    """Whether a path can be a Hugging Face id, `org/name`.

    >>> [_is_id(p) for p in ("openai/gsm8k", "../gsm8k", "data/train.jsonl", "name")]
    [True, False, False, False]
    """
    org, slash, name = path.partition("/")
    return (
        bool(slash and org and name)
        and "/" not in name
        and org[0] not in ".~"
        and not path.endswith(formats.ENDINGS)
    )


def _in_directory(path: str, split: str | None) -> Path:
    """Return a path, or the one file that a directory holds for a split, if there is one."""
    try:
        place = Path(path).expanduser()
        within = [place / f"{split}{ending}" for ending in formats.ENDINGS if place.is_dir()]
        return next((file for file in within if file.is_file()), place)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(f"data.path={path}: {formats.plain(error)}") from None


def _is_clone(place: Path, config: str | None) -> bool:
    """Whether a directory looks like a data set's: to search any other may take minutes."""
    card = place / "README.md"
    if card.is_file() and card.open("rb").read(3) == b"---":
        return True
    within = (place / part for part in ("", "data", config or ""))
    return any(f.name.endswith(formats.ENDINGS) for part in within for f in part.glob("*"))


def _data_set(path: str, config: str | None, split: str | None, limit: int | None) -> list[Row]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"data.path={path}: a data set needs the package datasets") from None
    if not Path(path).expanduser().exists():
        reach.settle()
    try:
        found = datasets.load_dataset(path, config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise FileNotFoundError(
            f"data.path={path}: no file of this name or for split {split} here, and not to be had"
            f" as a data set ({reach.reason(error)}); name a local file or clone"
        ) from None
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"data.path={path} data.config={config} data.split={split}: {formats.plain(error)}"
        ) from None
    if isinstance(found, dict):
        raise ValueError(f"data.split=null: {path} has the splits {', '.join(found)}")
    return [
        Row(f"{path}, row {i}", dict(found[i])) for i in range(min(limit or len(found), len(found)))
    ]
