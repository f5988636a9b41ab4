"""The entries that an edited checkpoint changes of its base, as a file that overwrites them.

A plain safetensors file with two tensors of bytes: `__positions__` and `__values__`, and in
`__metadata__` a `manifest`: JSON, for every tensor that changes its `name`, `dtype`, `shape`,
`count`, where in the two its bytes are (`positions`, `values`: [begin, end]), and the `encoding` of
its positions, whichever is smaller:

* `int32`: flat indices, ascending;
* `gaps16`: for each entry the number of entries left out since the one before as an unsigned word
  of 16 bits; 65535 says that an unsigned word of 32 bits follows, which is the number.

Values are the new weights themselves, bit for bit, in the tensor's dtype; all numbers are little
endian. What does not change is not held, so that nothing is lost.
"""

import json
import tempfile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from deltalab.apply import editing, layout, stream
from deltalab.codes import NAMES
from deltalab.edits import Edit
from deltalab.packing import packs
from deltalab.store import files
from deltalab.terminal import console
from deltalab.weights import contents, finite
from deltalab.weights.shards import read

ESCAPE = (1 << 16) - 1


def write(
    pre: Path,
    post: Path,
    out: Path,
    edit: Edit,
    *,
    select: Any,
    seed: int,
    salt: str = "",
    share: stream.Share | None = None,
) -> dict[str, Any]:
    """Write a patch and return how many entries of how many it changes, and its size.

    Memory is that of one tensor. Arguments as for `stream.stream`.

    Args:
        pre: the base.
        post: the tuned checkpoint, of the same tensors, dtypes and shapes.
        out: the file to write, which must not exist.
        edit: the edit.
        select: which tensors are edited; the others become those of `post`.
        seed: of the random numbers.
        salt: likewise.
        share: what every tensor is given of a budget.

    Raises:
        ValueError: `out` exists, or a tensor is not of the same dtype and shape in both.
    """
    if out.exists():
        raise ValueError(f"out={out}: exists already; name another file or remove it")
    extras = stream.offline(contents.around(pre, post), edit, seed, salt, share)
    plan = stream.planned(pre, post, select, "error")
    olds = layout.read(pre, "model.pre").entries
    deltas = stream.ranked(plan, edit, extras)
    manifest: list[dict[str, Any]] = []
    changed = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryFile(dir=out.parent) as positions,
        tempfile.TemporaryFile(dir=out.parent) as values,
        console.steps("tensors", len(plan.post)) as step,
    ):
        for name, new in plan.post.items():
            old = plan.pre.get(name, olds.get(name))
            if old is None or (old.dtype, old.shape, old.size) != (new.dtype, new.shape, new.size):
                raise ValueError(f"tensor {name!r}: a patch needs it alike in both checkpoints")
            if new.dtype is None:
                if any(
                    packs.bytes_of(old, *b) != packs.bytes_of(new, *b) for b in packs.blocks(new)
                ):
                    raise ValueError(f"tensor {name!r}: changed, and no patch holds its dtype")
                step()
                continue
            before = read(old)
            after = read(new)
            if name in plan.pre:
                given = extras.for_tensor(plan.alias[name], deltas)
                mine = extras.seen(edit, plan.alias[name], deltas)
                after = editing.edited_tensor(before, after, mine, **given)
                finite.check_edited({name: after})
            at = np.flatnonzero(_words(before) != _words(after))
            if len(at):
                encoding, places = _encoded(at)
                held = torch.from_numpy(_words(after)[at])
                spans = [
                    [f.tell(), f.tell() + n]
                    for f, n in ((positions, len(places)), (values, held.nbytes))
                ]
                positions.write(places)
                values.write(held.numpy().tobytes())
                manifest.append({
                    "name": name, "dtype": NAMES[new.dtype], "shape": list(new.shape),
                    "count": len(at), "encoding": encoding,
                    "positions": spans[0], "values": spans[1],
                })  # fmt: skip
                changed += len(at)
            step()
        digest = contents.of_checkpoint(pre)
        _finish(out, manifest, {"__positions__": positions, "__values__": values}, digest)
    total = sum(prod(entry.shape) for entry in plan.post.values())
    return {"changed": changed, "parameters": total, "bytes": out.stat().st_size}


def _words(tensor: Tensor) -> "np.ndarray[Any, Any]":
    """Return the bits of numbers as integers."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    found: np.ndarray[Any, Any] = tensor.contiguous().reshape(-1).view(words).numpy()
    return found


def _encoded(at: "np.ndarray[Any, Any]") -> tuple[str, bytes]:
    r"""Return ascending indices as the smaller of both encodings, and which it is.

    >>> _encoded(np.array([0, 5, 70000]))
    ('gaps16', b'\x00\x00\x04\x00\xff\xffj\x11\x01\x00')
    >>> _encoded(np.array([70000]))
    ('int32', b'p\x11\x01\x00')
    """
    gaps = np.diff(at, prepend=-1) - 1
    far = gaps >= ESCAPE
    words = np.minimum(gaps, ESCAPE).astype("<u2")
    sizes = 2 * len(at) + 4 * int(far.sum())
    if sizes >= 4 * len(at) and at[-1] < 1 << 31:
        return "int32", at.astype("<i4").tobytes()
    out = np.zeros(len(at) + 2 * int(far.sum()), dtype="<u2")
    first = np.cumsum(1 + 2 * far) - (1 + 2 * far)
    out[first] = words
    for half in (0, 1):
        out[first[far] + 1 + half] = (gaps[far] >> (16 * half)) & ESCAPE
    return "gaps16", out.tobytes()


def _finish(
    out: Path, manifest: list[dict[str, Any]], blobs: dict[str, IO[bytes]], digest: str
) -> None:
    """Write the file, to the disk itself, and give it its name.

    Raises:
        OSError: the disk failed, or is full; then there is no file.
    """
    header: dict[str, Any] = {
        "__metadata__": {"manifest": json.dumps(manifest, separators=(",", ":")), "base": digest}
    }
    position = 0
    for name, blob in blobs.items():
        size = blob.tell()
        offsets = [position, position := position + size]
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    files.join(out, text, list(blobs.values()))
