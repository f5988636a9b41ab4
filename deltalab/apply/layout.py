"""A checkpoint as it is written: what files it has, and where in them each tensor lies.

A safetensors checkpoint is written with its own files, headers and index, byte for byte. PyTorch's
own files become safetensors of the usual names, one for one.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from deltalab.weights import pickles
from deltalab.weights.checkpoints import opened
from deltalab.weights.mapping import Checkpoint
from deltalab.weights.shards import DTYPES, Entry, entries

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_UNCOPIED = ("README.md", "deltalab.json", ".gitattributes")
_DIRECTORIES = ("additional_chat_templates",)
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
        index: the index to write; None where that of the source fits, or there is none.
    """

    entries: dict[str, Entry]
    files: dict[Path, Written]
    index: dict[str, object] | None


def read(path: Path, setting: str) -> Side:
    """Read the headers of a checkpoint.

    Args:
        path: as for `weights.Checkpoint`.
        setting: the setting that names it, for messages.

    Raises:
        ValueError: as `checkpoints.opened`.
    """
    checkpoint = opened(path, setting)
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    side = Side({}, {}, None)
    for file in dict.fromkeys(checkpoint.shards.values()):
        name = file.relative_to(root)
        if file.suffix in pickles.ENDINGS:
            _make(side, file, _renamed(name), checkpoint)
        else:
            side.entries.update(entries(file))
            side.files[file] = Written(name, None, file.stat().st_size)
    made = any(written.head is not None for written in side.files.values())
    if made and len(side.files) > 1:
        places = {n: str(side.files[e.file].name) for n, e in side.entries.items()}
        total = sum(entry.size for entry in side.entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        return Side(side.entries, side.files, index)
    return side


def _renamed(name: Path) -> Path:
    """Return the name under which transformers looks for a PyTorch file as safetensors."""
    stem = name.stem.replace("pytorch_model", "model", 1)
    return name.with_name(f"{stem}.safetensors")


def _make(side: Side, file: Path, name: Path, checkpoint: Checkpoint) -> None:
    """Add a file that has no header of safetensors yet, and its tensors."""
    names = [n for n, place in checkpoint.shards.items() if place == file]
    kinds = {n: checkpoint[n].dtype for n in names}
    names.sort(key=lambda n: -kinds[n].itemsize)  # the widest first, so that all are aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes, position = {}, 0
    for n in names:
        shape = checkpoint.shape(n)
        sizes[n] = prod(shape) * kinds[n].itemsize
        offsets = [position, position := position + sizes[n]]
        header[n] = {"dtype": _NAMES[kinds[n]], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    side.files[file] = Written(name, head, len(head) + position)
    begin = len(head)
    for n in names:
        dtype = kinds[n] if kinds[n] in _FLOATING else None
        load = _loader(checkpoint, n)
        side.entries[n] = Entry(file, dtype, checkpoint.shape(n), begin, sizes[n], load)
        begin += sizes[n]


_FLOATING = tuple(DTYPES.values())


def _loader(checkpoint: Checkpoint, name: str) -> Callable[[int, int], Tensor]:
    return lambda start, stop: checkpoint[name].reshape(-1)[start:stop]


def copy_companions(post: Path, out: Path, index: Mapping[str, object] | None) -> None:
    """Copy configuration, tokenizer, templates and generation files, and the index last of all.

    Args:
        post: the checkpoint, a directory or a file; of a file nothing is beside it but the index
            that it is.
        out: the directory written.
        index: the index to write in place of its own.
    """
    if post.is_dir():
        files = [f for f in sorted(post.iterdir()) if f.is_file() and f.name not in _UNCOPIED]
        files = [f for f in files if not f.name.startswith(".")]
        for name in _DIRECTORIES:
            files += sorted(f for f in (post / name).glob("*") if f.is_file())
        for file in (f for f in files if f.suffix not in _WEIGHTS and not _is_index(f)):
            target = out / file.relative_to(post)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        indices = [f for f in files if f.name.endswith(".safetensors.index.json")]
    else:
        indices = [post] if _is_index(post) else []
    if index is not None:
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        return
    for file in indices:
        shutil.copyfile(file, out / file.name)


def _is_index(file: Path) -> bool:
    return file.name.endswith(".index.json")
