"""Files of rows: JSON lines, JSON, CSV and parquet, each row with the place where it stands."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

ENDINGS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
LONGEST_LINE = 1 << 26
LARGEST_FILE = 1 << 30
"""Bytes that are read at most, unpacked: a small archive may claim to hold any number of them."""

csv.field_size_limit(LARGEST_FILE)

Found = tuple[str, dict[str, Any]]


def rows(path: Path) -> Iterator[Found]:
    """Yield where every row of a file stands, for messages, and its fields; read as asked for.

    Args:
        path: a file that ends in one of `ENDINGS`.

    Raises:
        ValueError: another ending, a damaged file, or a row that is no object with named fields;
            the line is named where there are lines.
    """
    name = path.name.lower()
    if not name.endswith(ENDINGS):
        raise ValueError(f"data.path={path}: must end in {', '.join(ENDINGS)}")
    kind = name.removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            yield from _parquet(path)
            return
        with path.open("rb") as raw:
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if name.endswith(".gz") else raw
            yield from {"jsonl": _lines, "json": _json, "csv": _csv}[kind](path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({plain(error)})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or plain(error)})") from None


def _lines(path: Path, file: IO[bytes]) -> Iterator[Found]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{where}: a line of more than {LONGEST_LINE} bytes")
        if text := _decoded(line, where, first=number == 1).strip():
            yield where, _object(_parsed(text, where), where)


def _json(path: Path, file: IO[bytes]) -> Iterator[Found]:
    data = _parsed(_whole(path, file), str(path))
    if not isinstance(data, list):
        raise ValueError(f"{path}: must be a list of objects, is {short(data)}")
    for number, item in enumerate(data):
        where = f"{path}, item {number}"
        yield where, _object(item, where)


def _csv(path: Path, file: IO[bytes]) -> Iterator[Found]:
    reader = csv.DictReader(io.StringIO(_whole(path, file), newline=""), strict=True)
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if None in fields:
                raise ValueError(f"{where}: more values than the header has names")
            yield where, dict(fields)
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.reader.line_num}: not valid CSV ({plain(error)})"
        ) from None


def _parquet(path: Path) -> Iterator[Found]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: parquet files need the package pyarrow") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                yield f"{path}, row {number}", fields
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({plain(error)})") from None


def _whole(path: Path, file: IO[bytes]) -> str:
    data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path}: more than {LARGEST_FILE} bytes; split it, or use .jsonl")
    return _decoded(data, str(path), first=True)


def _decoded(data: bytes, where: str, first: bool) -> str:
    """Return text from UTF-8, without the byte order mark that a file may begin with."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        lines = data.count(b"\n", 0, error.start)
        line = f" in line {lines + 1}" if lines else ""
        raise ValueError(
            f"{where}: not UTF-8{line} (byte 0x{data[error.start]:02x} at {error.start})"
        ) from None
    return text.removeprefix("\ufeff") if first else text


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({plain(error)})") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object with named fields, is {short(value)}")
    return value


def short(value: Any) -> str:
    """Return a value in one line of at most 60 characters, for messages.

    >>> short({"a": [1]})
    "{'a': [1]}"
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(error: BaseException) -> str:
    """Return an error's message in one line.

    >>> plain(ValueError("no  such thing"))
    'no such thing'
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
