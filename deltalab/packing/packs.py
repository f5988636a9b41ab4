"""A tuned checkpoint as a small file that goes with its base: packed and unpacked part by part.

`pack` writes what an edit leaves of a delta as codes (`deltalab.codes`); `unpack` puts them onto
the base and gives, byte for byte, the files that `stream` would have written. Both read and write a
part at a time. Beside the codes a file holds

* `/files/<n>`: what precedes the tensors in each file of the result, compressed by zlib;
* `/beside/<n>`: the files beside the weights, likewise, that the base does not have as they are;
* parts of kind `same`, bytes that the base has too, and `bytes`, of tensors that were not edited.

`start` of a part counts bytes of the tensor as it is stored.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deltalab.apply import editing, layout, signed, stream
from deltalab.apply.coded import no_code
from deltalab.apply.work import Work
from deltalab.checkpoints.hashing import Hashing
from deltalab.codes import NAMES, Code
from deltalab.codes.nested import Patched
from deltalab.edits import Edit
from deltalab.packing.files import Packed, Writer
from deltalab.store import digests, files, records
from deltalab.terminal import console
from deltalab.weights import contents, finite, headers
from deltalab.weights.shards import DTYPES, Buffers, Entry, item, pieces, put, read

_PART = 1 << 20
"""Entries of a part, where an edit needs no more at once."""
_BLOCK = 1 << 24
"""Bytes of a part that is no delta."""
_MOST = 1 << 28
"""Bytes that a file beside the weights may have."""
_CODE = (".py", ".so", ".pyc")
"""Endings of files that are never packed: they may be run."""
_buffers = Buffers()
_ALONE = ("lowrank",)
"""Kinds whose bits may depend on the number of threads: decoded one at a time, with all."""


def pack(
    pre: Path,
    post: Path,
    out: Path,
    edit: Edit,
    *,
    select: Any,
    seed: int,
    mismatch: str = "error",
    dequantize: bool | None = None,
    salt: str = "",
    about: dict[str, Any] | None = None,
    share: stream.Share | None = None,
) -> dict[str, Any]:
    """Write the codes of an edited pair to one file and return what the file says of itself.

    Arguments as for `stream.stream`.

    Args:
        pre: the base.
        post: the tuned checkpoint.
        out: the file to write, which must not exist.
        edit: the edit.
        select: which tensors are edited; the others are held as they are.
        seed: of the random numbers.
        mismatch: what to do with tensors that do not fit.
        dequantize: whether quantised weights are decoded.
        salt: of the random numbers.
        about: said in the file beside this.
        share: what every tensor is given of a budget.

    Raises:
        ValueError: `out` exists, the checkpoints do not fit, or the edit has no code.
    """
    if mismatch not in stream.MISMATCH:
        raise ValueError(f"mismatch={mismatch}: must be one of {', '.join(stream.MISMATCH)}")
    if type(edit).encode is Edit.encode:
        raise ValueError(f"edit: {no_code(edit)}")
    extras = stream.offline(contents.around(pre, post), edit, seed, salt, share)
    plan = stream.planned(pre, post, select, mismatch, dequantize)
    bases = layout.read(pre, "model.pre", dequantize).entries
    hashing = Hashing((pre,))
    with Writer(out) as writer, _pool() as pool:
        deltas = stream.ranked(plan, edit, extras)
        with console.steps("tensors", len(plan.post)) as step:
            for name, entry in plan.post.items():
                old = plan.pre.get(name)
                base = old if old is not None else bases.get(name)
                said = (
                    {} if base is None or base is bases.get(name) else {"base": _name(base, bases)}
                )
                writer.tensor(name, NAMES[entry.dtype] if entry.dtype else "", entry.shape, **said)
                done = 0
                if old is not None:
                    done = plan.rows[name] * item(entry)
                    given = extras.for_tensor(plan.alias[name], deltas)
                    mine = extras.seen(edit, plan.alias[name], deltas)
                    for start, code in _codes(plan, name, mine, given, pool, hashing):
                        writer.add(name, code, start * item(entry))
                _rest(writer, name, entry, base, done)
                step()
        whole = {
            **(about or {}),
            "select": str(select),
            "seed": seed,
            "salt": salt,
            "dequantize": bool(dequantize),
            "files": list(_heads(writer, plan)),
            "beside": list(_beside(writer, pre, post, plan)),
            "base": {"digest": contents.of_checkpoint(pre, known=hashing.finish())},
            "edited": {"tensors": len(plan.pre), "parameters": sum(plan.rows.values())},
            "parameters": sum(prod(entry.shape) for entry in plan.post.values()),
            "bits": writer.bits._asdict(),
        }
        told: dict[str, Any] = records.redacted(whole)
        size = writer.finish(told)
    return {**told, "bytes": size}


def _pool() -> ThreadPoolExecutor:
    workers = torch.get_num_threads()
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def _name(entry: Entry, bases: dict[str, Entry]) -> str:
    return next(name for name, each in bases.items() if each is entry or each == entry)


def _codes(
    plan: stream.Plan,
    name: str,
    edit: Edit,
    given: dict[str, Any],
    pool: ThreadPoolExecutor,
    hashing: Hashing,
) -> Iterator[tuple[int, Code]]:
    """Yield the codes of a tensor's parts in order, each with its first entry."""
    rows, width = plan.rows[name], stream.width_of(edit, plan.post[name])
    task = partial(_code, plan, name, edit, given)
    if signed.fits(edit, plan.post[name].shape):
        yield 0, _signs(plan, name, edit, hashing) or task((0, rows), 0)
        _hash(hashing, plan.pre[name], (0, rows))
        return
    if not width:  # a whole tensor, with all threads, as it is edited
        hashed = pool.submit(_hash, hashing, plan.pre[name], (0, rows))
        yield 0, task((0, rows), 0)
        hashed.result()
        return
    waiting: deque[tuple[int, Future[Code]]] = deque()
    hashes: list[Future[None]] = []
    for piece in pieces(rows, width, _PART):
        waiting.append((piece[0], pool.submit(task, piece, width)))
        hashes.append(pool.submit(_hash, hashing, plan.pre[name], piece))
        if len(waiting) > 2 * torch.get_num_threads():
            start, future = waiting.popleft()
            yield start, future.result()
    for start, future in waiting:
        yield start, future.result()
    for hashed in hashes:
        hashed.result()


def _hash(hashing: Hashing, entry: Entry, piece: tuple[int, int]) -> None:
    start, stop = (count * item(entry) for count in piece)
    hashing.read(entry, start, stop)


def _signs(plan: stream.Plan, name: str, edit: Edit, hashing: Hashing) -> Code | None:
    """Return the code of a tensor of one scale, read and hashed as it is made; None: not so."""
    old, new, rows = plan.pre[name], plan.post[name], plan.rows[name]
    if old.load is not None or new.load is not None:  # which is decoded whole
        return None

    def sides(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return _read_hashed(old, start, stop, hashing), _read("post", new, start, stop)

    shape = stream.shape_of(new.shape, rows, 0)
    return signed.coded(edit, shape, (old.dtype, new.dtype), sides)


def _read(side: str, entry: Entry, start: int, stop: int) -> Tensor:
    """Read entries into memory that the thread uses again for this side."""
    assert entry.dtype is not None
    return read(entry, start, stop, _buffers.take(side, entry.dtype, stop - start))


def _read_hashed(entry: Entry, start: int, stop: int, hashing: Hashing) -> Tensor:
    """Read entries of the base, and hash them while they are at hand."""
    out, size = _read("pre", entry, start, stop), item(entry)
    hashing.read(entry, start * size, stop * size, out.view(torch.uint8).numpy().data)
    return out


def _code(
    plan: stream.Plan,
    name: str,
    edit: Edit,
    given: dict[str, Any],
    piece: tuple[int, int],
    width: int,
) -> Code:
    """Return the code of one part, exact as it is stored."""
    old, new, (start, stop) = plan.pre[name], plan.post[name], piece
    shape = stream.shape_of(new.shape, stop - start, width)
    assert old.dtype is not None
    held = _buffers.take("pre", old.dtype, stop - start)
    pre, post = (
        read(entry, start, stop, out).reshape(shape) for entry, out in ((old, held), (new, None))
    )
    needs = {k: v.at(start) if k == "rng" else v for k, v in given.items()}
    if not (finite.all_finite(pre) and finite.all_finite(post)):
        stream.blame(plan, name)
    delta = _delta(pre, post)
    code = edit.encode(delta, post=post, **needs)
    if code is None:
        raise ValueError(f"edit: {no_code(edit)}")
    if _is_tame(pre, code) and code.is_exact(pre, post, delta):
        return code
    stored = editing.edited_tensor(pre, post, edit, **needs)
    if not finite.all_finite(stored):
        stream.blame(plan, name)
        finite.check_edited({name: stored})
    return Patched.exact(code, pre, stored)


def _is_tame(pre: Tensor, code: Code) -> bool:
    """Whether no entry can overflow as it is stored: weights and scales far below what is held."""
    scales = [float(v) for name, v in code.settings.items() if name == "scale"]
    scales += [float(code.arrays["scale"].abs().max())] if "scale" in code.arrays else []
    most = max(scales, default=1.0)
    wide = pre.dtype != torch.float16 and pre.numel() > 0
    return wide and most < 1e9 and max(-float(pre.min()), float(pre.max())) < 1e25


def _delta(pre: Tensor, post: Tensor) -> Tensor:
    """Return the delta of finite entries, in memory that the thread uses again.

    No code holds it where there is W_post. Slice by slice, with the bits of `difference`: a sum
    with zero has no zero with a sign.
    """
    delta = _buffers.take("delta", torch.float32, pre.numel()).view(pre.shape)
    old, new, into = (tensor.reshape(-1) for tensor in (pre, post, delta))
    for start in range(0, len(into), editing.SLICE["cpu"]):
        part = slice(start, start + editing.SLICE["cpu"])
        torch.sub(new[part].float(), old[part].float(), out=into[part]).add_(0.0)
    return delta


def _rest(writer: Writer, name: str, entry: Entry, base: Entry | None, done: int) -> None:
    """Add the bytes of a tensor that are not edited, from `done` on."""
    if done == entry.size:
        return
    parts = blocks(entry, done)
    alike = base is not None and (base.dtype, base.shape) == (entry.dtype, entry.shape)
    if base is not None and alike and all(bytes_of(base, *b) == bytes_of(entry, *b) for b in parts):
        writer.plain(name, "same", done, entry.size - done, None)
        return
    for begin, end in parts:
        data = torch.frombuffer(bytearray(bytes_of(entry, begin, end)), dtype=torch.uint8)
        writer.plain(name, "bytes", begin, end - begin, data)


def blocks(entry: Entry, start: int = 0) -> list[tuple[int, int]]:
    """Cut a tensor's bytes from `start` on into blocks."""
    return [(at, min(at + _BLOCK, entry.size)) for at in range(start, entry.size, _BLOCK)]


def bytes_of(entry: Entry, begin: int, end: int) -> bytes:
    """Return bytes of a tensor as it is stored."""
    if entry.load is not None:
        part = entry.load(begin // item(entry), end // item(entry))
        return part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    with open(entry.file, "rb", buffering=0) as handle:
        found = os.pread(handle.fileno(), end - begin, entry.begin + begin)
    if len(found) != end - begin:
        raise ValueError(f"{entry.file}: ends too early")
    return found


def _heads(writer: Writer, plan: stream.Plan) -> Iterator[dict[str, Any]]:
    """Add what precedes the tensors in each file of the result, and say what it is."""
    for number, (file, written) in enumerate(plan.side.files.items()):
        head = written.head
        if head is None:
            begins = [entry.begin for entry in plan.post.values() if entry.file == file]
            with open(file, "rb") as source:
                head = source.read(min(begins, default=written.size))
        _squeezed(writer, f"/files/{number}", head)
        yield {"name": written.name.as_posix(), "size": written.size, "head": len(head)}


def _squeezed(writer: Writer, name: str, data: bytes) -> None:
    packed = bytearray(zlib.compress(data, 9))
    writer.array(name, torch.frombuffer(packed, dtype=torch.uint8))


def _beside(writer: Writer, pre: Path, post: Path, plan: stream.Plan) -> Iterator[dict[str, Any]]:
    """Add the files beside the weights that the base does not have as they are."""
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        layout.copy_companions(post, Path(folder), plan.side)
        for file in sorted(f for f in Path(folder).rglob("*") if f.is_file()):
            name, data = file.relative_to(folder).as_posix(), file.read_bytes()
            said = {"name": name, "size": len(data), "digest": digests.of_file(file)}
            own = pre / name if pre.is_dir() else None
            if own is not None and own.is_file() and own.read_bytes() == data:
                yield said
            elif file.suffix not in _CODE:
                _squeezed(writer, f"/beside/{number}", data)
                yield {**said, "at": number}
                number += 1


def unpack(file: Path, base: Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint that a file of codes makes of its base, and return what the file says.

    Args:
        file: from `pack`.
        base: the checkpoint that it was packed from.
        out: directory to write, which must not exist.

    Raises:
        ValueError: `out` exists, the file is damaged or of another version, or another base.
    """
    packed = Packed(file)
    if out.exists():
        raise ValueError(f"out={out}: exists already; name another directory or remove it")
    told = packed.about
    old = layout.read(base, "onto", told.get("dequantize") or None).entries
    hashing = Hashing((base,))
    if hashing.known:
        _check_base(packed, base, {})
    for left, size in files.leftovers(out):
        console.fail(f"{left}: left by a run that was killed, {size / 1e9:.3g} GB; remove it")
    with files.building(out) as made, _pool() as pool:
        with console.steps("tensors", len(packed.codes)) as step:
            for number, each in enumerate(told["files"]):
                place = _inside(packed, made, each["name"])
                place.parent.mkdir(parents=True, exist_ok=True)
                head = _released(packed, f"/files/{number}", each["head"])
                with open(place, "xb", buffering=0) as target:
                    put(target, torch.frombuffer(bytearray(head), dtype=torch.uint8), 0)
                    os.truncate(place, each["size"])
                    work = Work(pool, hashing)
                    try:
                        for name, there in headers.read(place).items():
                            _tensor(packed, name, there, old, target, work)
                            step()
                        work.wait()
                    finally:
                        work.stop()
        _check_base(packed, base, hashing.finish())
        for each in told["beside"]:
            _put_beside(packed, base, made, each)
        said = {**told, "unpacked": {"file": file.name, "base": str(base)}}
        files.write(made / "deltalab.json", json.dumps(records.redacted(said), indent=1) + "\n")
    return told


def _check_base(packed: Packed, base: Path, known: dict[Path, dict[str, str]]) -> None:
    wanted, found = packed.about["base"]["digest"], contents.of_checkpoint(base, known=known)
    if found != wanted:
        raise ValueError(
            f"onto={base}: another base: its digest is {found}, {packed.path.name} goes with"
            f" {wanted}"
        )


def _inside(packed: Packed, root: Path, name: str) -> Path:
    """Return a path below a directory; the name comes from the file."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") for part in parts)
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or hidden:
        raise ValueError(headers.plain(f"{packed.path}: {name!r} leads out of the directory"))
    return root.joinpath(*parts)


def _released(packed: Packed, name: str, size: int) -> bytes:
    """Return the bytes of an array that zlib has compressed, no more than it claims."""
    if not 0 <= size <= _MOST:
        raise ValueError(f"{packed.path}: {name} of {size} bytes, must be at most {_MOST}")
    try:
        data = zlib.decompressobj().decompress(packed.array(name).numpy().tobytes(), size + 1)
    except zlib.error:
        data = b""
    if len(data) != size:
        raise ValueError(f"{packed.path}: damaged: {name} is not what was written; fetch it again")
    return data


def _tensor(
    packed: Packed,
    name: str,
    there: headers.Entry,
    old: dict[str, Entry],
    target: BinaryIO,
    work: Work,
) -> None:
    """Write one tensor, part by part."""
    said = packed.codes.get(name)
    size, at = there.end - there.begin, 0
    if said is None or tuple(said["shape"]) != there.shape:
        raise ValueError(headers.plain(f"{packed.path}: damaged: tensor {name!r} has no parts"))
    base = old.get(said.get("base", name))
    for number, part in enumerate(said["parts"]):
        kind, shape = part["code"]["kind"], tuple(part["code"]["shape"])
        width = 1 if kind in ("same", "bytes") else size // prod(there.shape) if size else 1
        count = prod(shape)
        if part["start"] != at or at + count * width > size:
            raise ValueError(headers.plain(f"{packed.path}: damaged: parts of tensor {name!r}"))
        if kind != "bytes" and not _there(base, kind == "same", at // width + count):
            raise ValueError(
                headers.plain(f"onto: another base: tensor {name!r} is not in it as it was")
            )
        place = there.begin + at
        task: Callable[..., None]
        if kind in ("same", "bytes"):
            task = partial(_put_bytes, packed, name, number, base, (at, at + count), target, place)
        else:
            assert base is not None
            task = partial(
                _put_code, packed, name, number, base, at // width, there, target, place, work
            )
            if kind != "signs":  # which are hashed as they are put
                work.hash(base, (at // width, at // width + count))
        if any(value in _ALONE for value in part["code"].values() if isinstance(value, str)):
            task()
        else:
            work.submit(task)
        at += count * width
    if at != size:
        raise ValueError(headers.plain(f"{packed.path}: damaged: parts of tensor {name!r}"))


def _there(base: Entry | None, in_bytes: bool, end: int) -> bool:
    """Whether the base has a tensor's bytes, or its entries, up to `end`."""
    return base is not None and end <= (base.size if in_bytes else prod(base.shape))


def _put_bytes(
    packed: Packed,
    name: str,
    number: int,
    base: Entry | None,
    span: tuple[int, int],
    target: BinaryIO,
    place: int,
) -> None:
    arrays = packed.arrays(name, number)
    if base is None or arrays:
        data = arrays.get("bytes", torch.empty(0, dtype=torch.uint8))
        if data.numel() != span[1] - span[0]:
            raise ValueError(headers.plain(f"{packed.path}: damaged: tensor {name!r}"))
        put(target, data, place)
        return
    for begin in range(*span, _BLOCK):
        end = min(begin + _BLOCK, span[1])
        data = torch.frombuffer(bytearray(bytes_of(base, begin, end)), dtype=torch.uint8)
        put(target, data, place + begin - span[0])


def _put_code(
    packed: Packed,
    name: str,
    number: int,
    base: Entry,
    start: int,
    there: headers.Entry,
    target: BinaryIO,
    place: int,
    work: Work,
) -> None:
    code = packed.code(name, number)
    dtype = DTYPES.get(there.dtype)
    if dtype is None:
        raise ValueError(headers.plain(f"{packed.path}: tensor {name!r} is no floating-point one"))
    if code.kind == "signs":
        if _put_signs(code, base, start, dtype, target, place, work.hashing):
            return
        work.hashing.read(base, start * item(base), (start + code.count) * item(base))
    pre = read(base, start, start + code.count).reshape(code.shape)
    put(target, code.onto(pre, dtype), place)


def _put_signs(
    code: Code,
    base: Entry,
    start: int,
    dtype: torch.dtype,
    target: BinaryIO,
    place: int,
    hashing: Hashing,
) -> bool:
    """Write a code of signs and one scale piece by piece; return whether that could be done."""
    if base.load is not None:  # which is decoded whole
        return False
    step = max(8, min(_PART, signed.PIECE) // 8 * 8)  # whole bytes of signs
    for begin in range(0, code.count, step):
        end = min(begin + step, code.count)
        old = _read_hashed(base, start + begin, start + end, hashing)
        out = _buffers.take("out", dtype, end - begin)
        if not signed.decoded(code, begin, old, out):
            return False
        put(target, out, place + begin * out.itemsize)
    return code.count > 0


def _put_beside(packed: Packed, base: Path, made: Path, each: dict[str, Any]) -> None:
    """Write one file beside the weights, from the file of codes or from the base."""
    place, name = _inside(packed, made, each["name"]), each["name"]
    if (place.suffix in _CODE and "at" in each) or place.exists():
        raise ValueError(headers.plain(f"{packed.path}: {name!r} has no place beside weights"))
    place.parent.mkdir(parents=True, exist_ok=True)
    if "at" in each:
        place.write_bytes(_released(packed, f"/beside/{each['at']}", each["size"]))
    else:
        own = base / name
        if not own.is_file():
            raise FileNotFoundError(f"{own}: no such file; {packed.path.name} counts on it")
        shutil.copyfile(own, place)
    if digests.of_file(place) != each["digest"]:
        raise ValueError(headers.plain(f"onto={base}: its {name!r} is not what it was"))


def beside(folder: Path) -> list[Packed]:
    """Return the files of codes in a directory, by the digest of their base and by name."""
    files = sorted(folder.glob("*.safetensors"))
    found = [Packed(file) for file in files if "codes" in headers.metadata(file)]
    return sorted(found, key=lambda packed: str(packed.about["base"]["digest"]))


def base_beside(file: Path) -> Path:
    """Return the base of a file of codes: the checkpoint beside it that has the digest.

    Raises:
        ValueError: none has.
    """
    wanted = Packed(file).about["base"]["digest"]
    codes = {packed.path for packed in beside(file.parent)}
    places = [d for d in sorted(file.parent.iterdir()) if d.is_dir() and contents.candidates(d)]
    places += [f for f in sorted(file.parent.glob("*.safetensors")) if f not in codes]
    for place in places:
        try:
            if contents.of_checkpoint(place) == wanted:
                return place
        except (OSError, ValueError):  # no whole checkpoint
            continue
    raise ValueError(f"onto=: no checkpoint beside {file} has the digest {wanted}; name the base")


def verify(file: Path, base: Path | None = None) -> dict[str, Any]:
    """Read all of a file of codes and check it against its digests; return what it says.

    Args:
        file: from `pack`.
        base: checked to be the one that it goes with; None: not checked.

    Raises:
        ValueError: damaged, of another version, or another base.
    """
    packed = Packed(file)
    for name, said in packed.codes.items():
        for number in range(len(said["parts"])):
            packed.arrays(name, number)
    for number, each in enumerate(packed.about["files"]):
        _released(packed, f"/files/{number}", each["head"])
    for each in packed.about["beside"]:
        if "at" in each:
            _released(packed, f"/beside/{each['at']}", each["size"])
    if base is not None:
        _check_base(packed, base, {})
    return packed.about


def stored(packed: Packed, old: dict[str, Entry], name: str) -> Iterator[tuple[Code, Tensor]]:
    """Yield the codes of a tensor's parts with the base's entries beneath them."""
    said = packed.codes[name]
    base, at = old[said.get("base", name)], 0
    for number, part in enumerate(said["parts"]):
        if part["code"]["kind"] in ("same", "bytes"):
            continue
        code = packed.code(name, number)
        yield code, read(base, at, at + code.count).reshape(code.shape)
        at += code.count
