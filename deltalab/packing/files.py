"""Files of codes: plain safetensors, written and read a part at a time.

Every array is a tensor `<tensor>/<part>/<array>`, where part 0, 1, ... of a tensor are the codes of
its entries from `start` on. Bits are packed as `packing` says. `__metadata__` holds three texts:

* `about`: JSON, what the writer says: at least `format` and `version`;
* `codes`: JSON, by tensor its `dtype` and `shape` as it is to be stored, and its `parts`, each with
  `start`, `digest` and `code`: `kind`, `shape` and the kind's settings;
* `digest`: SHA-256 of both, 32 hexadecimal digits.

A part's `digest` is the SHA-256 of its description and of its arrays' names, dtypes, shapes and
bytes. Arrays of wide types come first, so that all are aligned.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from deltalab.codes import NAMES, Bits, Code
from deltalab.store import files
from deltalab.weights import headers

FORMAT, VERSION = "deltalab.delta", 1
_TYPES = {name: dtype for dtype, name in NAMES.items()}


class Writer:
    """Writes codes one after another; the file appears whole at the end, or not at all.

    Memory is that of one code. Arrays wait on the disk, in files without a name, until all sizes
    are known, which come first in the file.

    Args:
        path: the file to write, which must not exist.

    Raises:
        ValueError: it exists.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise ValueError(f"out={path}: exists already; name another file or remove it")
        self._path = path
        self._stack = ExitStack()
        self._data: dict[int, IO[bytes]] = {}
        self._lines: dict[int, list[tuple[str, str, list[int], int]]] = {8: [], 4: [], 2: [], 1: []}
        self._codes: dict[str, dict[str, Any]] = {}
        self.bits = Bits(0, 0, 0.0)

    def __enter__(self) -> "Writer":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for size in self._lines:
            made = tempfile.TemporaryFile(dir=self._path.parent)
            self._data[size] = self._stack.enter_context(made)
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()

    def tensor(self, name: str, dtype: str, shape: Iterable[int], **said: Any) -> None:
        """Begin a tensor.

        Args:
            name: its name.
            dtype: in which it is stored, as safetensors call it.
            shape: as it is stored.
            said: more about it.
        """
        self._codes[name] = {"dtype": dtype, "shape": list(shape), **said, "parts": []}

    def add(self, name: str, code: Code, start: int = 0) -> None:
        """Add the code of a tensor's entries from `start` on."""
        self.bits += code.bits
        self._part(name, start, code.described, code.arrays)

    def plain(self, name: str, kind: str, start: int, count: int, data: Tensor | None) -> None:
        """Add entries that are no delta: as the base has them, or bytes of their own."""
        arrays = {} if data is None else {"bytes": data}
        self._part(name, start, {"kind": kind, "shape": [count]}, arrays)
        size = 0 if data is None else 8 * data.numel()
        self.bits += Bits(size, 0, size)

    def _part(
        self, name: str, start: int, described: dict[str, Any], arrays: Mapping[str, Tensor]
    ) -> None:
        parts = self._codes[name]["parts"]
        digest = digest_of(described, arrays)
        for own, array in arrays.items():
            self.array(f"{name}/{len(parts)}/{own}", array)
        parts.append({"start": start, "digest": digest, "code": described})

    def array(self, name: str, array: Tensor) -> None:
        """Add one array by its full name."""
        size = array.element_size()
        view = array.reshape(-1).view(torch.uint8).numpy().data if array.numel() else b""
        self._data[size].write(view)
        self._lines[size].append((name, NAMES[array.dtype], list(array.shape), len(view)))

    def finish(self, about: Mapping[str, Any]) -> int:
        """Write the file, to the disk itself, and return its size in bytes.

        Args:
            about: what is said of the whole, ready for JSON.

        Raises:
            OSError: the disk failed, or is full; then there is no file.
        """
        told = {"format": FORMAT, "version": VERSION, **about}
        texts = {"about": _text(told), "codes": _text(self._codes)}
        header: dict[str, Any] = {"__metadata__": {**texts, "digest": _digest_of_texts(texts)}}
        position = 0
        for lines in self._lines.values():
            for name, dtype, shape, size in lines:
                offsets = [position, position := position + size]
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        files.join(self._path, _text(header).encode(), list(self._data.values()))
        return self._path.stat().st_size


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _digest_of_texts(texts: Mapping[str, str]) -> str:
    held = json.dumps([texts["about"], texts["codes"]])
    return hashlib.sha256(held.encode()).hexdigest()[:32]


def digest_of(described: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> str:
    """Return the digest of one part, 32 hexadecimal digits."""
    found = hashlib.sha256(_text(sorted(described.items())).encode())
    for name, array in sorted(arrays.items()):
        found.update(_text([name, NAMES[array.dtype], list(array.shape)]).encode())
        if array.numel():
            found.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


@dataclass(frozen=True)
class Packed:
    """A file of codes, opened: its header is read and checked, its arrays are not read yet.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no valid safetensors file, not one of codes, of another version, or damaged.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        texts = headers.metadata(self.path)
        if not {"about", "codes", "digest"} <= set(texts):
            raise ValueError(f"{self.path}: holds no codes; write one with deltalab-delta pack")
        about = _object(self.path, texts["about"])
        if about.get("format") != FORMAT:
            raise ValueError(f"{self.path}: holds no codes; write one with deltalab-delta pack")
        if about.get("version") != VERSION:
            raise ValueError(
                f"{self.path}: of version {about.get('version')}, this deltalab reads {VERSION}"
            )
        if _digest_of_texts(texts) != texts["digest"]:
            raise self._damaged("its header")
        _ = self.entries

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the writer says of the whole."""
        return _object(self.path, headers.metadata(self.path)["about"])

    @cached_property
    def codes(self) -> dict[str, dict[str, Any]]:
        """By tensor its dtype, shape and parts."""
        return _object(self.path, headers.metadata(self.path)["codes"])

    @cached_property
    def entries(self) -> dict[str, headers.Entry]:
        """Where every array lies."""
        return headers.read(self.path)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """The names of arrays by what precedes them."""
        found: dict[str, list[str]] = {}
        for name in self.entries:
            lead, _, own = name.rpartition("/")
            found.setdefault(lead, []).append(own)
        return found

    def array(self, name: str) -> Tensor:
        """Read one array by its full name.

        Raises:
            ValueError: it is missing, or of a type that no code has.
        """
        entry = self.entries.get(name)
        if entry is None or entry.dtype not in _TYPES:
            raise self._damaged(f"array {name!r}")
        out = torch.empty(prod(entry.shape), dtype=_TYPES[entry.dtype])
        view = out.view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        with open(self.path, "rb", buffering=0) as handle:
            handle.seek(entry.begin)
            while view:
                count = handle.readinto(view)
                if not count:
                    raise self._damaged(f"array {name!r}")
                view = view[count:]
        return out.reshape(entry.shape)

    def arrays(self, tensor: str, part: int) -> dict[str, Tensor]:
        """Read the arrays of one part, and check them against its digest.

        Raises:
            ValueError: they are not what was written.
        """
        lead = f"{tensor}/{part}"
        found = {own: self.array(f"{lead}/{own}") for own in self._names.get(lead, [])}
        said = self.codes[tensor]["parts"][part]
        if digest_of(said["code"], found) != said["digest"]:
            raise self._damaged(f"tensor {tensor!r}")
        return found

    def size(self, tensor: str, part: int) -> int:
        """Return the bytes of a part's arrays."""
        lead = f"{tensor}/{part}"
        places = (self.entries[f"{lead}/{own}"] for own in self._names.get(lead, []))
        return sum(place.end - place.begin for place in places)

    def code(self, tensor: str, part: int = 0) -> Code:
        """Read one code, checked.

        Raises:
            ValueError: it is not what was written, or none.
        """
        arrays = self.arrays(tensor, part)
        said = dict(self.codes[tensor]["parts"][part]["code"])
        kind, shape = said.pop("kind"), said.pop("shape")
        return Code.of(kind, tuple(shape), arrays, said)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            headers.plain(f"{self.path}: damaged: {what} is not what was written; fetch it again")
        )


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: its header is not what was written; fetch it again")
    return value


def save(path: Path, codes: Mapping[str, Code], about: Mapping[str, Any] | None = None) -> int:
    """Write codes by the names of their tensors; return the file's size in bytes.

    Raises:
        ValueError: the file exists.
    """
    with Writer(path) as writer:
        for name, code in codes.items():
            writer.tensor(name, "F32", code.shape)
            writer.add(name, code)
        return writer.finish({"bits": writer.bits._asdict(), **(about or {})})


def load(path: Path) -> dict[str, Code]:
    """Return the codes of a file whose tensors have one part each.

    Raises:
        ValueError: as `Packed`.
    """
    packed = Packed(path)
    return {name: packed.code(name) for name in packed.codes}
