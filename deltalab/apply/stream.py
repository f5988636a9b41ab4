"""Edit a checkpoint on disk, shard by shard, in bounded memory.

The result has the layout of the post-trained checkpoint byte for byte: every file has the same
header, so the same tensor names, dtypes, shapes, order and metadata, and the same index, whatever
program wrote it. What is not edited is copied as bytes. Only of PyTorch's own files the layout is
made (`layout`).
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deltalab.apply import editing, layout
from deltalab.apply.extras import Extras, Memo, Provider, thresholds
from deltalab.apply.layout import Side
from deltalab.apply.work import Work
from deltalab.checkpoints.hashing import Hashing
from deltalab.edits import Edit
from deltalab.linear.delta import difference
from deltalab.store import files, records
from deltalab.terminal import console
from deltalab.weights import contents, finite
from deltalab.weights.mapping import PIECE, LazyWeights, Meta, part_of
from deltalab.weights.select import selected
from deltalab.weights.shards import Buffers, Entry, copy, item, keep, pieces, put, read

Share = Callable[[Any, Extras], Provider]
"""Makes of an edit with a budget, and of what it asks for beside, the provider of the shares."""
MISMATCH = ("error", "truncate", "keep_post")
_buffers = Buffers()


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor of the post-trained checkpoint.

    Attributes:
        post: its tensors, file by file in byte order.
        side: what its files become.
        pre: the pre-trained counterpart of each tensor that is edited.
        alias: the name under which a tensor is edited; tied tensors share one.
        rows: the leading entries that are edited where the vocabularies differ.
        kept: why each other tensor stays as it is.
    """

    post: dict[str, Entry]
    side: Side
    pre: dict[str, Entry]
    alias: dict[str, str]
    rows: dict[str, int]
    kept: dict[str, str]


def offline(
    post: Path, edit: Edit, seed: int, salt: str = "", share: Share | None = None
) -> Extras:
    """Return the provider of what an edit may ask for where there are checkpoints and no model.

    Args:
        post: where the tuned checkpoint's configuration is, which tells which matrices are stored
            (in, out).
        edit: the edit.
        seed: of the random numbers.
        salt: likewise.
        share: as for `stream`.
    """
    memo, turned = Memo(limit=0), layout.turned(post)
    extras = Extras(edit.needs, seed, memo=memo, salt=salt, turned=turned)
    if share is None:
        return extras
    return replace(extras, providers={"share": share(edit, extras)})


def stream(
    pre: Path,
    post: Path,
    out: Path,
    edit: Edit,
    *,
    select: Any,
    seed: int,
    mismatch: str = "error",
    kernel: str = "auto",
    describe: dict[str, Any] | None = None,
    dequantize: bool | None = None,
    salt: str = "",
    share: Share | None = None,
) -> dict[str, Any]:
    """Write the edited checkpoint to `out` and return its manifest.

    Everything goes to a temporary directory beside `out`, which is renamed when it has reached the
    disk itself: whenever the process or the machine is stopped, `out` is absent or complete. What a
    killed process has left is named at the next run.

    Args:
        pre: pre-trained checkpoint, a file or a directory as for `weights.Checkpoint`.
        post: post-trained checkpoint.
        out: directory to write, which must not exist.
        edit: the edit; it can ask for all but gradients and activations.
        select: a preset or a `select.Selection`.
        seed: seed of the random numbers.
        mismatch: what to do with a tensor that only one side has, or whose leading dimension
            (the vocabulary) differs: "error"; "truncate" edits the rows that both have and keeps
            the other rows of post; "keep_post" keeps such tensors as post has them.
        kernel: as for `apply.edited_tensor`.
        describe: said about the edit in the manifest.
        dequantize: whether quantised weights are decoded, and those of post written as bfloat16;
            None where no setting asks for it.
        salt: of the random numbers, as for `Extras`.
        share: what gives every tensor its share, of an edit with a budget.

    Raises:
        ValueError: `out` exists, another process is writing it, the checkpoints do not fit
            together, or `mismatch` is given beside an adapter.
    """
    if mismatch not in MISMATCH:
        raise ValueError(f"mismatch={mismatch}: must be one of {', '.join(MISMATCH)}")
    if out.exists():
        raise ValueError(f"out={out}: exists already; name another directory or remove it")
    adapter = contents.is_adapter(post)
    if adapter and mismatch != "error":
        raise ValueError(
            f"mismatch={mismatch}: model.post={post} is an adapter, which is put onto model.pre and"
            " has its tensors; leave mismatch out"
        )
    extras = offline(contents.around(pre, post), edit, seed, salt, share)
    plan = planned(pre, post, select, mismatch, dequantize)
    hashing = Hashing((pre, post))
    manifest: dict[str, Any] = {
        "edit": describe,
        "select": str(select),
        "seed": seed,
        "salt": salt,
        "mismatch": mismatch,
        "dequantize": bool(dequantize),
        "pre": {"path": str(pre)},
        "post": {"path": str(post), **({"adapter": True} if adapter else {})},
        "edited": {"tensors": len(plan.pre), "parameters": _parameters(plan)},
        "names": list(plan.pre),
        "kept": plan.kept,
    }
    for left, size in files.leftovers(out):
        console.fail(f"{left}: left by a run that was killed, {size / 1e9:.3g} GB; remove it")
    with files.building(out) as made:
        _write(plan, made, edit, extras, kernel, hashing)
        known = hashing.finish()
        for side, path in (("pre", pre), ("post", post)):
            manifest[side]["digest"] = contents.of_checkpoint(path, known=known)
        layout.copy_companions(post, made, plan.side)
        text = json.dumps(records.redacted(manifest), indent=1)
        files.write(made / "deltalab.json", text + "\n")
        _verify(plan, made)
    return manifest


def planned(
    pre: Path, post: Path, select: Any, mismatch: str, dequantize: bool | None = None
) -> Plan:
    """Decide from the headers alone, tied tensors apart, what happens to every tensor.

    Raises:
        ValueError: the sides differ and `mismatch` does not allow it, or one holds no weights.
    """
    olds = layout.read(pre, "model.pre", dequantize).entries
    side = layout.read(post, "model.post", dequantize, onto=pre)
    news = side.entries
    ties, old_ties = tied(news), tied(olds)
    chosen = {name for name, new in news.items() if selected(select, name, new.shape)}
    same = {name: name for name in news}
    plan = Plan(news, side, pre={}, alias=same, rows={}, kept={})
    for one, other in ties.items():
        if one in chosen or other in chosen:  # one tensor under two names: edited once, under the
            lead = other if other in chosen else one  # name that is selected, the table's if both
            plan.alias[one] = plan.alias[other] = lead
            chosen |= {one, other}
    for name in olds:
        if name not in news and name not in old_ties and mismatch == "error":
            raise ValueError(
                f"tensor {name!r} is in the pre-trained model only; see mismatch=keep_post"
            )
    for name, new in news.items():
        old = olds.get(name) or olds.get(ties.get(name, plan.alias[name]))
        if new.dtype is None:
            plan.kept[name] = "not a floating-point tensor that can be edited"
        elif name not in chosen:
            plan.kept[name] = "not selected"
        elif old is None or old.dtype is None or not _fits(old, new, mismatch):
            if mismatch != "keep_post":
                raise ValueError(_complaint(name, old, new))
            plan.kept[name] = "no counterpart in the pre-trained model"
        else:
            plan.pre[name] = old
            plan.rows[name] = min(prod(old.shape), prod(new.shape))
    return plan


def _fits(old: Entry, new: Entry, mismatch: str) -> bool:
    if old.shape == new.shape:
        return True
    same_rows = len(old.shape) == len(new.shape) > 0 and old.shape[1:] == new.shape[1:]
    return mismatch == "truncate" and same_rows


def _complaint(name: str, old: Entry | None, new: Entry) -> str:
    if old is None:
        return f"tensor {name!r} is in the post-trained model only; see mismatch=keep_post"
    if old.dtype is None:
        return f"tensor {name!r} is no floating-point tensor in the pre-trained model"
    return (
        f"tensor {name!r}: shape {old.shape} in the pre-trained model, {new.shape} in the "
        "post-trained; see mismatch=truncate and mismatch=keep_post"
    )


def tied(found: dict[str, Entry]) -> dict[str, str]:
    """Map each tied head to its embedding: both were saved, with equal bytes."""
    matrices = [name for name in found if len(found[name].shape) == 2]
    heads = [name for name in matrices if part_of(name) == "head"]
    tables = [name for name in matrices if part_of(name) == "embedding"]
    return {h: t for h in heads for t in tables if _equal(found[h], found[t])}


def _equal(a: Entry, b: Entry) -> bool:
    if a.dtype is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(torch.equal(read(a, *p), read(b, *p)) for p in pieces(prod(a.shape), 1))


def _write(
    plan: Plan, out: Path, edit: Edit, extras: Extras, kernel: str, hashing: Hashing
) -> None:
    """Write all files: headers and untouched tensors as bytes, edited tensors piece by piece.

    Pieces are independent: each worker reads one, edits it with one thread and writes it to its
    place, and another hashes it. Threads within an edit would wait for one another wherever a
    worker reads or writes.
    """
    deltas = ranked(plan, edit, extras)
    workers = torch.get_num_threads()
    with (
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        console.steps("tensors", len(plan.post)) as step,
    ):
        for file, written in plan.side.files.items():
            (out / written.name).parent.mkdir(parents=True, exist_ok=True)
            with open(out / written.name, "wb", buffering=0) as target, open(file, "rb") as source:
                ours = {n: e for n, e in plan.post.items() if e.file == file}
                if written.head is None:
                    copy(source, target, 0, min((e.begin for e in ours.values()), default=None))
                else:
                    put(target, torch.frombuffer(bytearray(written.head), dtype=torch.uint8), 0)
                work = Work(pool, hashing)
                try:
                    for name, entry in ours.items():
                        rows = plan.rows.get(name, 0)
                        work.hash(entry, (rows, prod(entry.shape)))
                        keep(source, target, entry, rows)
                        if name in plan.pre:
                            sides = plan.pre[name], entry
                            given = extras.for_tensor(plan.alias[name], deltas)
                            mine = extras.seen(edit, plan.alias[name], deltas)
                            task = partial(_edit_piece, plan, name, mine, given, kernel, target)
                            if width := width_of(mine, entry):
                                for piece in pieces(rows, width):
                                    work.submit(task, piece, width)
                                    for side in sides:
                                        work.hash(side, piece)
                            else:  # a whole tensor: one at a time, with all threads
                                for side in sides:
                                    work.hash(side, (0, rows))
                                task((0, rows), 0, pool)
                        step()
                    work.wait()
                finally:
                    work.stop()  # none may write to a closed file


def ranked(plan: Plan, edit: Edit, extras: Extras) -> "_Deltas":
    """Return the deltas of all tensors that are edited, ranked where the edit asks for it."""
    names = list(dict.fromkeys(plan.alias[n] for n in plan.pre))
    deltas = _Deltas(plan, names)
    if edit.whole_model and "quantile" in edit.needs and names:
        with console.steps("ranking", 2 * len(names)) as deltas.step:
            thresholds(edit, extras.for_tensor(names[0], deltas))
    return deltas


def _edit_piece(
    plan: Plan,
    name: str,
    edit: Edit,
    given: dict[str, Any],
    kernel: str,
    target: BinaryIO,
    piece: tuple[int, int],
    width: int,
    pool: ThreadPoolExecutor | None = None,
) -> None:
    """Read, edit, check and write the entries of one piece; a pool shares all but the edit."""
    old, new, (start, stop) = plan.pre[name], plan.post[name], piece
    needs = {k: v.at(start) if k == "rng" else v for k, v in given.items()}
    dtypes, shape = (_dtype(old), _dtype(new)), shape_of(new.shape, stop - start, width)
    plain = old.load is None and new.load is None
    with open(old.file, "rb") as one, open(new.file, "rb") as other:
        places = (
            (one.fileno(), old.begin + start * item(old)),
            (other.fileno(), new.begin + start * item(new)),
            (target.fileno(), new.begin + start * item(new)),
        )
        if plain and editing.edited_files(edit, dtypes, places, shape, kernel, **needs):
            return
    _each(partial(_check_sides, plan, name), list(pieces(stop - start, 1, at=start)), pool)
    a, b, out = (
        _buffers.take(use, dtype, stop - start)
        for use, dtype in zip(("pre", "post", "out"), (*dtypes, dtypes[1]), strict=True)
    )

    def load(part: tuple[int, int]) -> None:
        for entry, into in ((old, a), (new, b)):
            read(entry, start + part[0], start + part[1], into[slice(*part)])

    def save(part: tuple[int, int]) -> None:
        if not finite.all_finite(out[slice(*part)]):
            blame(plan, name)
            finite.check_edited({name: out[slice(*part)]})
        put(target, out[slice(*part)], new.begin + (start + part[0]) * item(new))

    parts = list(pieces(stop - start, 1))
    _each(load, parts, pool)
    editing.edited_tensor(a.view(shape), b.view(shape), edit, kernel, out.view(shape), **needs)
    _each(save, parts, pool)


def _check_sides(plan: Plan, name: str, part: tuple[int, int]) -> None:
    """Raise `ValueError` for a number that is none: an edit may drop it, and nobody would know."""
    for use, entry in (("pre", plan.pre[name]), ("post", plan.post[name])):
        held = read(entry, *part, _buffers.take(use, _dtype(entry), part[1] - part[0]))
        if not finite.all_finite(held):
            blame(plan, name)


def blame(plan: Plan, name: str) -> None:
    """Raise `ValueError` where a tensor's own entries or its delta are no numbers, counting all."""
    old, new, bad = plan.pre[name], plan.post[name], [0, 0, 0]
    for piece in pieces(plan.rows[name], 1):
        a, b = read(old, *piece), read(new, *piece)
        for index, held in enumerate((a, b, difference(a, b))):
            bad[index] += int((~held.isfinite()).sum())
    if any(bad):
        raise ValueError(finite.complaint(name, *bad))


def _each(
    function: Callable[[Any], None], parts: list[Any], pool: ThreadPoolExecutor | None
) -> None:
    """Call a function for all parts, by a pool if any, and wait for all even if one fails."""
    if pool is None:
        for part in parts:
            function(part)
        return
    futures = [pool.submit(function, part) for part in parts]
    wait(futures)
    for future in futures:
        future.result()


def _dtype(entry: Entry) -> torch.dtype:
    assert entry.dtype is not None, "only such tensors are edited"
    return entry.dtype


def width_of(edit: Edit, entry: Entry) -> int:
    """Return the entries that must stay together, or 0 for a whole tensor."""
    if edit.unit == "row":
        return prod(entry.shape[1:]) if len(entry.shape) > 1 else 0
    return 1 if edit.unit == "entry" else 0


def shape_of(shape: tuple[int, ...], count: int, width: int) -> tuple[int, ...]:
    """Return the shape of a piece of `count` entries of a tensor of this shape."""
    return (count,) if width == 1 or not shape else (count // prod(shape[1:]), *shape[1:])


class _Deltas(LazyWeights):
    """The deltas of the tensors that are edited, for edits that need more than a piece of one."""

    def __init__(self, plan: Plan, names: list[str]) -> None:
        super().__init__(names, self._whole, self._meta_of)
        self._plan = plan
        self.step: Callable[[], None] = lambda: None

    def _whole(self, name: str) -> Tensor:
        """Return one delta: the rows that both sides have."""
        new, count = self._plan.post[name], self._plan.rows[name]
        flat = difference(read(self._plan.pre[name], 0, count), read(new, 0, count))
        if not finite.all_finite(flat):
            blame(self._plan, name)
        return flat.reshape(shape_of(new.shape, count, 0))

    def _meta_of(self, name: str) -> Meta:
        shape = shape_of(self._plan.post[name].shape, self._plan.rows[name], 0)
        return Meta(shape, torch.float32)

    def pieces(self, name: str) -> Iterator[Callable[[], Tensor]]:
        """Yield what `weights.pieces` does, without the whole delta."""
        for start, stop in pieces(self._plan.rows[name], 1, PIECE):
            yield partial(self._piece, name, start, stop)
        self.step()

    def _piece(self, name: str, start: int, stop: int) -> Tensor:
        sides = {"pre": self._plan.pre[name], "post": self._plan.post[name]}
        a, b = (
            read(entry, start, stop, _buffers.take(side, _dtype(entry), stop - start))
            for side, entry in sides.items()
        )
        delta = difference(a, b)
        if not finite.all_finite(delta):
            blame(self._plan, name)
        return delta


def _verify(plan: Plan, out: Path) -> None:
    for written in plan.side.files.values():
        if (found := (out / written.name).stat().st_size) != written.size:
            raise OSError(f"{out / written.name}: {found} bytes were written, not {written.size}")


def _parameters(plan: Plan) -> int:
    return sum(plan.rows[name] for name in plan.pre)
