"""Read points back from the files that Weights & Biases keeps on this machine, synced or not.

A run's `.wandb` file is a log of protobuf messages in blocks of 32 KiB, each piece of a message
with a checksum; a process that is killed leaves it cut short. `Wandb` puts a point's record into
the run's summary, so that what is read here is what `deltalab.report.reading` reads from the
record.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalab.report.outcomes import Outcome, sort_key
from deltalab.report.reading import parse

POINT, RECORD = "point", "record"
"""The type of a point's run, and the name of its summary's record."""
_MAGIC, _HEADER, _BLOCK = b":W&B", struct.Struct("<IHB"), 32768
_WHOLE, _FIRST, _LAST = 1, 2, 4


@dataclass
class Run:
    """What a run's file says of the run: None where the file ends before it says it."""

    job: str | None = None
    began: int = 0
    record: Any = None


def read(directory: Path, warn: Callable[[str], None]) -> list[Outcome]:
    """Read all points that were logged below a directory, in the order of `sort_key`.

    Of a point that was logged several times for one experiment, the latest run counts.

    Args:
        directory: holds `wandb/*run-*/run-*.wandb`; a tracker's `dir`, `results` by default.
        warn: told in one line of every run that cannot be read; it is skipped. So are, silently,
            runs that hold no point.

    Raises:
        ValueError: if wandb is not installed.
    """
    try:
        from wandb.proto import wandb_internal_pb2 as messages
    except ImportError:
        raise ValueError(
            "from=wandb: needs the package wandb (pip install deltalab[wandb])"
        ) from None
    latest: dict[tuple[str, str], tuple[int, Outcome]] = {}
    for path in sorted((directory / "wandb").glob("*run-*/run-*.wandb")):
        try:
            run = _run(path.read_bytes(), messages.Record)
            if run.job not in (None, POINT):
                continue
            if not isinstance(run.record, str):
                raise ValueError("ends before its point's record")
            point = parse(json.loads(run.record))
        except (OSError, ValueError, RecursionError) as problem:
            warn(f"skipped {path}: {' '.join(str(problem).split())}")
            continue
        name = point.key, point.experiment
        if name not in latest or run.began >= latest[name][0]:
            latest[name] = run.began, point
    return sorted((point for _, point in latest.values()), key=sort_key)


def _run(data: bytes, message: Any) -> Run:
    """Go through a run's messages; `message` is the protobuf type of each."""
    run = Run()
    for frame in frames(data):
        try:
            found = message.FromString(frame)
        except Exception:  # protobuf's own, which only its module could name
            raise ValueError("holds what is no message") from None
        match found.WhichOneof("record_type"):
            case "run":
                run.job, run.began = found.run.job_type, found.run.start_time.ToNanoseconds()
            case "summary":
                for item in found.summary.update:
                    if (item.key or ".".join(item.nested_key)) == RECORD:
                        run.record = json.loads(item.value_json)
    return run


def frames(data: bytes) -> Iterator[bytes]:
    r"""Yield the messages of a run's file, up to where it was cut short.

    Raises:
        ValueError: if it is no such file, or a checksum is wrong.

    >>> piece = b"one"
    >>> header = _HEADER.pack(zlib.crc32(bytes([_WHOLE]) + piece), len(piece), _WHOLE)
    >>> list(frames(b":W&B\xe1\xbe\x00" + header + piece + header[:3]))
    [b'one']
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("not a run of W&B")
    place, message = _HEADER.size, b""
    while place + _HEADER.size <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER.size:  # what is left of a block holds no header
            place += _BLOCK - place % _BLOCK
            continue
        checksum, length, kind = _HEADER.unpack_from(data, place)
        place += _HEADER.size
        piece = data[place : place + length]
        place += length
        if len(piece) < length or not kind:
            return
        if zlib.crc32(bytes([kind]) + piece) != checksum:
            raise ValueError(f"wrong checksum before byte {place}")
        message = piece if kind in (_WHOLE, _FIRST) else message + piece
        if kind in (_WHOLE, _LAST):
            yield message
