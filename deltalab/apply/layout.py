"""A checkpoint as it is written: what files it has, and where in them each tensor lies.

A safetensors checkpoint is written with its own files, headers and index, byte for byte. PyTorch's
own files become safetensors of the usual names, one for one; of decoded weights names, dtypes and
headers are new, and the configuration says no more that they are quantised.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from deltalab.checkpoints import opened, quantised
from deltalab.checkpoints.adapted import Adapted
from deltalab.checkpoints.decoded import Dequantised
from deltalab.models import hub
from deltalab.weights import configs, contents, orientation, pickles
from deltalab.weights.headers import BITS
from deltalab.weights.mapping import Checkpoint
from deltalab.weights.shards import DTYPES, Entry, entries

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_UNCOPIED = ("README.md", "SHA256SUMS", "deltalab.json", ".gitattributes", contents.ADAPTER)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Written:
    """One file of the result.

    Attributes:
        name: its path in the directory written.
        head: what precedes its tensors; None where the source has the same bytes there.
        size: its bytes.
    """

    name: Path
    head: bytes | None
    size: int


@dataclass(frozen=True)
class Side:
    """One checkpoint, read.

    Attributes:
        entries: its tensors, file by file in byte order, at the places where they are written.
        files: what becomes of each of its files.
        index: the index to write, empty for none; None where that of the source fits.
        decoded: whether its weights were quantised.
        base: where the base is, whose configuration goes with an adapter; else None.
    """

    entries: dict[str, Entry]
    files: dict[Path, Written]
    index: dict[str, object] | None
    decoded: bool
    base: Path | None = None


def read(
    path: Path, setting: str, dequantize: bool | None = None, onto: Path | None = None
) -> Side:
    """Read the headers of a checkpoint.

    Args:
        path: as for `weights.Checkpoint`.
        setting: the setting that names it, for messages.
        dequantize: as for `checkpoints.opened`.
        onto: likewise.

    Raises:
        ValueError: as `checkpoints.opened`.
    """
    checkpoint = opened(path, setting, dequantize, onto)
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    base = checkpoint.base if isinstance(checkpoint, Adapted) else None
    decoded = isinstance(checkpoint if base is None else base, Dequantised)
    side = Side({}, {}, None, decoded, None if base is None else base.path)
    for file in dict.fromkeys(checkpoint.shards.values()):
        name = file.relative_to(root)
        if decoded or base is not None or file.suffix in pickles.ENDINGS:
            _make(side, file, _renamed(name), checkpoint)
        else:
            side.entries.update(entries(file))
            side.files[file] = Written(name, None, file.stat().st_size)
    if all(written.head is None for written in side.files.values()):
        return side
    places = {n: str(side.files[e.file].name) for n, e in side.entries.items()}
    total = sum(entry.size for entry in side.entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return replace(side, index=index if len(side.files) > 1 else {})


def _renamed(name: Path) -> Path:
    """Return the name under which transformers looks for a PyTorch file as safetensors."""
    stem = name.stem.replace("pytorch_model", "model", 1)
    return name.with_name(f"{stem}.safetensors")


def _make(side: Side, file: Path, name: Path, checkpoint: Checkpoint) -> None:
    """Add a file that has no header of safetensors yet, and its tensors."""
    kinds = {n: checkpoint.dtype(n) for n, place in checkpoint.shards.items() if place == file}
    names = sorted(kinds, key=lambda n: -BITS[kinds[n]])  # so that all are aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes, position = {}, 0
    for n in names:
        shape = checkpoint.shape(n)
        sizes[n] = prod(shape) * BITS[kinds[n]] // 8
        offsets = [position, position := position + sizes[n]]
        header[n] = {"dtype": kinds[n], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    side.files[file] = Written(name, head, len(head) + position)
    begin = len(head)
    for n in names:
        part, shape = _part(checkpoint, n), checkpoint.shape(n)
        side.entries[n] = Entry(file, DTYPES.get(kinds[n]), shape, begin, sizes[n], part)
        begin += sizes[n]


def _part(checkpoint: Checkpoint, name: str) -> Callable[[int, int], Tensor]:
    """Return the function that gives a part of a flat tensor."""
    if isinstance(checkpoint, Dequantised | Adapted):
        return partial(checkpoint.part, name)
    return lambda start, stop: checkpoint[name].reshape(-1)[start:stop]


def copy_companions(post: Path, out: Path, side: Side) -> None:
    """Copy configuration, tokenizer, templates and generation files, and the index last of all.

    Args:
        post: the checkpoint, a directory or a file; of a file nothing is beside it but the index
            that it is.
        out: the directory written.
        side: what was read of the checkpoint.
    """
    indices = [post] if _is_index(post) else []
    for place in (p for p in (side.base, post) if p is not None and p.is_dir()):
        files = [f for f in sorted(place.iterdir()) if f.is_file() and f.name not in _UNCOPIED]
        files = [f for f in files if not f.name.startswith(".")]
        files += sorted(f for f in (place / hub.TEMPLATES).glob("*") if f.is_file())
        for file in (f for f in files if f.suffix not in _WEIGHTS and not _is_index(f)):
            if side.decoded and file.name in quantised.BESIDE:
                continue
            target = out / file.relative_to(place)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        indices = [f for f in files if f.name.endswith(".safetensors.index.json")]
    if side.decoded and (config := configs.content(out / "config.json")):
        (out / "config.json").write_text(json.dumps(_decoded(config), indent=2) + "\n")
    if side.index is None:
        for file in indices:
            shutil.copyfile(file, out / file.name)
    elif side.index:
        (out / INDEX).write_text(json.dumps(side.index, indent=1) + "\n")


def _decoded(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of decoded weights."""
    found = {
        name: _decoded(value) if isinstance(value, dict) and name.endswith("config") else value
        for name, value in config.items()
        if name not in quantised.DECLARED
    }
    names = [name for name in ("dtype", "torch_dtype") if name in found]
    return found | dict.fromkeys(names, "bfloat16")


def _is_index(file: Path) -> bool:
    return file.name.endswith(".index.json")


def turned(path: Path) -> Callable[[str], bool]:
    """Return which matrices of a checkpoint are stored (in, out), as its configuration has it."""
    place = path if path.is_dir() else path.parent
    return orientation.turned(configs.content(place / "config.json"))
