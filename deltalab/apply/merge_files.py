"""Merge checkpoints on disk, tensor by tensor: as many experts as there are, in bounded memory.

In memory is a part of a tensor of every expert at a time, or all of one where a merge needs it.
The bits are those of `merging.Family` on the same models. The result has the layout of the base;
where a merge gives one model for every expert, each goes to a directory of its own and has the
layout of the expert.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deltalab.apply import layout
from deltalab.apply.extras import Extras, Memo
from deltalab.apply.layout import Side
from deltalab.apply.merging import Expert, Family
from deltalab.apply.stream import tied
from deltalab.apply.work import Work
from deltalab.checkpoints.hashing import Hashing
from deltalab.edits import Edit
from deltalab.merges import Merge
from deltalab.store import files, records
from deltalab.terminal import console
from deltalab.weights import configs, contents, finite
from deltalab.weights.aligned import Aligned
from deltalab.weights.mapping import Meta
from deltalab.weights.shards import Buffers, Entry, copy, keep, pieces, put, read

PART = 1 << 16
"""Entries of every model that are merged at once where that can be: they stay in the cache."""
_buffers = Buffers()


def merge(
    pre: Path,
    posts: Mapping[str, Path],
    out: Path,
    merge: Merge,
    edits: Mapping[str, tuple[Edit, str]],
    *,
    select: Any,
    merged: Any,
    seed: int,
    describe: dict[str, Any] | None = None,
    dequantize: bool | None = None,
    onto: Path | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint to `out`, or one for each expert below it; return the manifest.

    Args:
        pre: the base, a file or a directory as for `weights.Checkpoint`.
        posts: every expert, by name.
        out: directory to write, which must not exist; it appears when all is written.
        merge: the merge; it can ask for all that experts suffice for.
        edits: what every expert's delta undergoes first, and what sets its random numbers apart.
        select: the tensors that the edit touches.
        merged: the tensors that are merged; others are the base's, or each expert's own.
        seed: of random edits.
        describe: said about merge and edit in the manifest.
        dequantize: as for `stream.stream`.
        onto: another base that the merged delta is put onto, and whose layout is written.

    Raises:
        ValueError: `out` exists, experts that do not fit the base, or numbers that are none.
    """
    if out.exists():
        raise ValueError(f"out={out}: exists already; name another directory or remove it")
    base = layout.read(pre, "model.pre", dequantize)
    sides = {n: layout.read(p, f"model.experts.{n}", dequantize) for n, p in posts.items()}
    _check_fit(base, sides, "model.experts")
    further = [*sides.values()]
    onto_side = None
    if onto is not None:
        onto_side = layout.read(onto, "model.base", dequantize)
        _check_fit(base, {str(onto): onto_side}, "model.base")
        further.append(onto_side)
    ties, turned = _ties(base, further), layout.turned(pre)
    one = _weights(base.entries, ties, "the base")
    experts = {
        name: Expert(
            one,
            _weights({n: side.entries[n] for n in base.entries}, ties, f"model.experts.{name}"),
            edits[name][0],
            select,
            Extras(edits[name][0].needs, seed, {}, Memo(limit=0), edits[name][1], turned),
        )
        for name, side in sides.items()
    }
    if onto_side is not None:
        entries = {n: onto_side.entries[n] for n in base.entries}
        family = Family(experts, merge, merged, onto=_weights(entries, ties, "model.base"))
    else:
        family = Family(experts, merge, merged)
    written = [onto or posts[n] for n in family.models if n] or [onto or pre]
    _check_ties([head for head in tied(base.entries) if head not in ties], written)
    hashing = Hashing((pre, *posts.values()))
    manifest: dict[str, Any] = {
        **(describe or {}),
        "select": str(select),
        "merged": str(merged),
        "seed": seed,
        "pre": {"path": str(pre)},
        **({"base": {"path": str(onto), "digest": contents.of_checkpoint(onto)}} if onto else {}),
        "experts": {n: {"path": str(p)} for n, p in posts.items()},
        "edited": {
            "tensors": len(family.names),
            "parameters": sum(prod(base.entries[name].shape) for name in family.names),
        },
    }
    for left, size in files.leftovers(out):
        console.fail(f"{left}: left by a run that was killed, {size / 1e9:.3g} GB; remove it")
    with files.building(out) as made:
        laid, source = onto_side or base, onto or pre
        targets = [
            _Target(made / n, onto_side or sides[n], onto or posts[n]) for n in family.models if n
        ] or [_Target(made, laid, source)]
        with ExitStack() as stack:
            _write(family, base, sides, ties, [t.opened(stack) for t in targets], hashing)
        known = hashing.finish()
        _digests(manifest, pre, posts, known)
        for target in targets:
            target.check()
            layout.copy_companions(target.source, target.place, target.side)
        text = json.dumps(records.redacted(manifest), indent=1)
        files.write(made / contents.MANIFEST, text + "\n")
    return manifest


def _digests(
    manifest: dict[str, Any],
    pre: Path,
    posts: Mapping[str, Path],
    known: Mapping[Path, Mapping[str, str]],
) -> None:
    """Put the digests of all inputs into the manifest.

    Raises:
        ValueError: two experts are the same.
    """
    manifest["pre"]["digest"] = contents.of_checkpoint(pre, known=known)
    found: dict[str, str] = {}
    for name, path in posts.items():
        digest = manifest["experts"][name]["digest"] = contents.of_checkpoint(path, known=known)
        if (other := found.setdefault(digest, name)) != name:
            raise ValueError(f"model.experts: {other} and {name} are the same model")


def _ties(base: Side, others: Sequence[Side]) -> dict[str, str]:
    """Map each head that is tied in the base and in all other checkpoints to its embedding.

    Where one has a head of its own, heads are merged as the matrices that they are.
    """
    each = [tied({n: side.entries[n] for n in base.entries}) for side in others]
    return {h: t for h, t in tied(base.entries).items() if all(found.get(h) == t for found in each)}


def _check_ties(heads: Sequence[str], sources: Sequence[Path]) -> None:
    """Raise `ValueError` where a configuration that is written ties a head that is none's.

    Args:
        heads: those that some checkpoints tie and others do not.
        sources: whose configurations are written.
    """
    for source in sources if heads else ():
        place = (source if source.is_dir() else source.parent) / "config.json"
        if configs.content(place).get("tie_word_embeddings") is True:
            raise ValueError(
                f"{heads[0]}: tied to the embedding by {place}, and of its own in an expert:"
                " whoever loads what is written would lose it; untie that model first"
            )


def _check_fit(base: Side, sides: Mapping[str, Side], setting: str) -> None:
    """Raise `ValueError` naming all experts that do not fit the base, and the first difference."""
    wrong: dict[str, str] = {}
    for name, side in sides.items():
        for tensor in dict.fromkeys([*base.entries, *side.entries]):
            old, new = base.entries.get(tensor), side.entries.get(tensor)
            if old is None or new is None:
                where = "base" if new is None else "expert"
                wrong[name] = f"tensor {tensor!r} is in the {where} only"
            elif old.shape != new.shape:
                wrong[name] = (
                    f"tensor {tensor!r}: shape {old.shape} in the base, {new.shape} in the expert"
                )
            else:
                continue
            break
    if wrong:
        raise ValueError(f"{setting}: {', '.join(wrong)}: {next(iter(wrong.values()))}")


def _weights(entries: Mapping[str, Entry], ties: Mapping[str, str], who: str) -> Aligned:
    """Return the tensors of a checkpoint, read when asked for, tied ones listed once."""
    saved: dict[str, tuple[str, ...]] = {}
    for name in entries:
        lead = ties.get(name, name)
        saved[lead] = (*saved.get(lead, ()), name)

    def load(name: str) -> Tensor:
        entry = entries[name]
        found = read(entry, 0, prod(entry.shape))
        if not finite.all_finite(found):
            bad = int((~found.isfinite()).sum())
            raise ValueError(f"{who}: tensor {name!r}: NaN or infinite entries, {bad}")
        return found.reshape(entry.shape)

    def told(name: str) -> Meta:
        entry = entries[name]
        return Meta(tuple(entry.shape), entry.dtype or torch.uint8)

    return Aligned(
        {lead: tuple(sorted(n, key=lead.__ne__)) for lead, n in saved.items()}, load, told
    )


@dataclass(eq=False)
class _Target:
    """A checkpoint that is written.

    Attributes:
        place: its directory.
        side: how it is laid out.
        source: where its files come from.
    """

    place: Path
    side: Side
    source: Path
    _open: dict[Path, BinaryIO] = field(default_factory=dict)

    def opened(self, stack: ExitStack) -> "_Target":
        """Make its files, with their headers."""
        for file, written in self.side.files.items():
            path = self.place / written.name
            path.parent.mkdir(parents=True, exist_ok=True)
            target = self._open[file] = stack.enter_context(path.open("wb", buffering=0))
            if written.head is None:
                begins = [e.begin for e in self.side.entries.values() if e.file == file]
                with open(file, "rb") as source:
                    copy(source, target, 0, min(begins, default=None))
            else:
                put(target, torch.frombuffer(bytearray(written.head), dtype=torch.uint8), 0)
        return self

    def keep(self, name: str) -> None:
        """Write a tensor as it is."""
        entry = self.side.entries[name]
        with open(entry.file, "rb") as source:
            keep(source, self._open[entry.file], entry, 0)

    def put(self, name: str, found: Tensor, start: int) -> None:
        """Write entries of a merged tensor, the first of them at `start`."""
        entry = self.side.entries[name]
        assert entry.dtype is not None, "only such tensors are merged"
        own = found.to(entry.dtype)
        finite.check_edited({name: own})
        put(self._open[entry.file], own.reshape(-1), entry.begin + start * entry.dtype.itemsize)

    def check(self) -> None:
        """Raise `OSError` where a file is not as long as it must be."""
        for written in self.side.files.values():
            if (size := (self.place / written.name).stat().st_size) != written.size:
                raise OSError(f"{self.place / written.name}: {size} bytes, not {written.size}")


def _write(
    family: Family,
    base: Side,
    sides: Mapping[str, Side],
    ties: Mapping[str, str],
    targets: Sequence[_Target],
    hashing: Hashing,
) -> None:
    """Write all tensors: what is not merged as bytes, the others in parts where they can be.

    Parts are independent: each worker reads those of all models, merges them with one thread and
    writes the result to its place; what has been read is hashed beside it.
    """
    saved: dict[str, list[str]] = {}  # tied ones are merged once
    for name in base.entries:
        saved.setdefault(ties.get(name, name), []).append(name)
    names, threads = set(family.names), torch.get_num_threads()
    read_from = [base, *sides.values()]
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        console.steps("tensors", len(saved)) as step,
    ):
        work = Work(pool, hashing)
        try:
            for lead, also in saved.items():
                entries = [side.entries[lead] for side in read_from]
                count = prod(entries[0].shape)
                into = [target.side.entries[lead] for target in targets]
                if lead not in names or any(e.dtype is None for e in (*entries, *into)):
                    for target, name in product(targets, also):
                        target.keep(name)
                elif family.sliced:
                    task = partial(_part, family, lead, also, entries, targets)
                    for part in pieces(count, 1, PART):
                        work.submit(task, part)
                        for entry in entries:
                            work.hash(entry, part)
                else:
                    for target, found in zip(targets, family.of(lead), strict=True):
                        for name in also:
                            target.put(name, found, 0)
                    for entry in entries:
                        work.hash(entry, (0, count))
                step()
            work.wait()
        finally:
            work.stop()  # none may write to a closed file


def _part(
    family: Family,
    lead: str,
    also: Sequence[str],
    entries: Sequence[Entry],
    targets: Sequence[_Target],
    part: tuple[int, int],
) -> None:
    """Read, merge and write the entries of one part of a tensor."""
    held = []
    for index, entry in enumerate(entries):
        assert entry.dtype is not None, "only such tensors are merged"
        into = _buffers.take(str(index), entry.dtype, part[1] - part[0])
        held.append(read(entry, *part, into))
        if not finite.all_finite(into):
            models = [next(iter(family.experts.values())).pre]
            models += [each.post for each in family.experts.values()]
            models[index][lead]  # says whose it is, and counts
    for target, found in zip(targets, family.part(lead, part[0], held[0], held[1:]), strict=True):
        for name in also:
            target.put(name, found, part[0])
