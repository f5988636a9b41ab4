"""The headers of safetensors files and the indices of shards, checked before anything is read.

A checkpoint comes from anywhere. Everything that its header or index claims is compared with the
file: nothing is allocated, mapped or opened on the strength of a claim alone, and what is refused
is a `ValueError` that names the file and the tensor.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

LONGEST = 100_000_000
"""Bytes that a header or an index may have, as in the safetensors library."""
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F4": 4,
}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor.

    Attributes:
        dtype: name of the dtype in the file, one of `BITS`.
        shape: its shape, as stored.
        begin: position of its first byte in the file.
        end: position after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read(file: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file, in the order of their bytes.

    Args:
        file: a regular file.

    Raises:
        ValueError: the file is not what the format demands: header length, JSON, names given once,
            dtypes, shapes, and offsets that cover the data once, without gap or overlap.
    """
    size = file.stat().st_size
    length, header = _header(file)
    _check_metadata(file, header.pop("__metadata__", {}))
    start = 8 + length
    found = {name: _entry(file, name, item, start) for name, item in header.items()}
    ordered = dict(sorted(found.items(), key=lambda pair: (pair[1].begin, pair[1].end)))
    position = start
    for name, entry in ordered.items():
        if entry.begin != position:
            kind = "overlaps the one before" if entry.begin < position else "leaves a gap before"
            raise _invalid(file, f"tensor {_short(name)} {kind} it, at byte {entry.begin - start}")
        position = entry.end
    if position != size:
        why = "an incomplete download?" if position > size else "the rest belongs to no tensor"
        raise _invalid(
            file, f"{size - start} bytes of data where the header says {position - start}; {why}"
        )
    return ordered


def metadata(file: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors, by name.

    Args:
        file: a regular file.

    Raises:
        ValueError: no header, or one that maps no texts to texts.
    """
    _, header = _header(file)
    found: dict[str, str] = header.pop("__metadata__", {})
    _check_metadata(file, found)
    return found


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return the length of a file's header in bytes, and what it says."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 10 or handle.read(1) != b"{":
            raise _invalid(file, _guess(file, size))
        if length > min(size - 8, LONGEST):
            raise _invalid(
                file, f"its header claims {length} bytes of {size - 8}; an incomplete download?"
            )
        handle.seek(8)
        return length, _object(file, handle.read(length))


def _entry(file: Path, name: str, item: Any, start: int) -> Entry:
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= set(item):
        raise _invalid(file, f"tensor {_short(name)} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _invalid(
            file,
            f"tensor {_short(name)} has dtype {_short(dtype)}, must be one of {', '.join(BITS)}",
        )
    if not _sizes(shape) or len(shape) > 64 or prod(n or 1 for n in shape) >= 1 << 60:
        raise _invalid(
            file,
            f"tensor {_short(name)} has shape {_short(shape)}, must be a list of sizes from 0,"
            " of fewer than 2^60 entries",
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(
            file, f"tensor {_short(name)} has data_offsets {_short(offsets)}, must be [begin, end]"
        )
    bits, given = prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * given:
        raise _invalid(
            file,
            f"tensor {_short(name)} of dtype {dtype} and shape {_short(shape)} has {given} bytes,"
            f" must have {-(-bits // 8)}",
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    """Whether a value is a list of integers from 0 that 63 bits hold."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _invalid(file, "__metadata__ must map texts to texts")


def _guess(file: Path, size: int) -> str:
    """Say what a file without a header may be instead."""
    with open(file, "rb") as handle:
        start = handle.read(64)
    known = {
        b"version https://git-lfs": "a Git LFS pointer; fetch the file itself (git lfs pull)",
        b"GGUF": "a GGUF file; convert it to safetensors first",
        b"PK\x03\x04": "a PyTorch archive; give it the ending .bin or .pt",
        b"<": "a web page; was the download refused?",
    }
    for magic, what in known.items():
        if start.startswith(magic):
            return f"it is {what}"
    return "it is empty" if size == 0 else f"no header in its {size} bytes"


def index(path: Path) -> dict[str, Path]:
    """Return the file of every tensor that an index of shards names, all of them beside it.

    Args:
        path: `*.index.json`.

    Raises:
        ValueError: no valid index, a name that leads out of its directory, or shards numbered
            `-of-` of which it names only some.
        FileNotFoundError: a shard that it names is missing.
    """
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, an index has at most {LONGEST}")
    weight_map = _object(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: not an index of shards, it has no weight_map with tensors")
    files: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(
                f"{path}: tensor {_short(name)} lies in {_short(file)}, must be a file name"
            )
        if file not in files:
            files[file] = beside(path, file, name)
    _check_numbering(path, files)
    return {name: files[file] for name, file in weight_map.items()}


def beside(path: Path, file: str, name: str) -> Path:
    """Return the file of this name in the directory of an index, and nowhere else.

    Links may lead to the `blobs` of the hub's cache that the directory belongs to.

    Raises:
        ValueError: an absolute name, one with `..`, or a link out of the directory.
        FileNotFoundError: no such file.
    """
    parts = re.split(r"[/\\]", file)
    if "" in parts or ".." in parts or "\0" in file or ":" in file:
        raise ValueError(
            f"{path}: tensor {_short(name)} lies in {_short(file)}, which leads out of the"
            " directory"
        )
    try:
        there = (path.parent / file).is_file()
    except OSError:  # a name that is too long
        there = False
    if not there:
        raise FileNotFoundError(plain(f"{path.parent / _cut(file)}: named by {path.name}, missing"))
    inside(path.parent, path.parent / file)
    return path.parent / file


def inside(directory: Path, file: Path) -> None:
    """Raise `ValueError` where a link leads out of a directory, the hub's own cache apart."""
    home, real = directory.resolve(), file.resolve()
    snapshots = [place for place in home.parents if place.name == "snapshots"]
    blobs = [place.parent / "blobs" for place in snapshots[:1]]  # of a sub-directory too
    if not any(real.is_relative_to(root) for root in (home, *blobs)):
        raise ValueError(
            plain(f"{file}: a link out of its directory, to {real}; name that file itself")
        )


def _check_numbering(path: Path, files: Mapping[str, Path]) -> None:
    """Refuse an index that names some of the shards 1 to n only: a part of the model is lost."""
    named: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := _PART.fullmatch(file):
            stem, number, count, suffix = match.groups()
            named.setdefault((stem, count, suffix), set()).add(int(number))
    for (stem, count, suffix), numbers in named.items():
        missing = next((n for n in range(1, int(count) + 1) if n not in numbers), None)
        if missing is not None:
            raise ValueError(
                f"{path}: names no tensor of {stem}-{missing:05d}-of-{count}{suffix},"
                f" {len(numbers)} shards of {int(count)} only"
            )


def _object(file: Path, text: bytes) -> dict[str, Any]:
    """Parse one JSON object in which no name stands twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"{_short(twice)} stands in it twice")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        if file.name.endswith(".json"):
            raise ValueError(plain(f"{file}: not a valid index ({reason})")) from None
        raise _invalid(file, f"its header is damaged: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON object is expected, not {_short(value)}")
    return value


def _invalid(file: Path, reason: str) -> ValueError:
    return ValueError(plain(f"{file}: not a valid safetensors file ({reason})"))


def plain(text: str) -> str:
    r"""Return a text in one line without control characters: parts of it come from the file.

    >>> plain("a\nb\x1b[2J")
    'a\\nb\\x1b[2J'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _short(value: Any) -> str:
    """Return a value as text of bounded length: it comes from the file."""
    return _cut(str(value) if isinstance(value, list) else repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
