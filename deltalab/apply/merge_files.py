"""Merge checkpoints on disk, tensor by tensor: as many experts as there are, in bounded memory.

In memory is one tensor of every expert at a time. The bits are those of `merging.Family` on the
same models. The result has the layout of the base; where a merge gives one model for every expert,
each goes to a directory of its own and has the layout of the expert.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltalab.apply import layout
from deltalab.apply.extras import Extras, Memo
from deltalab.apply.layout import Side
from deltalab.apply.merging import Expert, Family
from deltalab.apply.stream import tied
from deltalab.edits import Edit
from deltalab.merges import Merge
from deltalab.store import files, records
from deltalab.terminal import console
from deltalab.weights import contents, finite
from deltalab.weights.aligned import Aligned
from deltalab.weights.mapping import Meta
from deltalab.weights.shards import Entry, copy, keep, put, read


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
    ties, turned = tied(base.entries), layout.turned(pre)
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
    if onto is not None:
        other = layout.read(onto, "model.base", dequantize)
        _check_fit(base, {str(onto): other}, "model.base")
        moved = _weights({n: other.entries[n] for n in base.entries}, ties, "model.base")
        family, base, source = Family(experts, merge, merged, onto=moved), other, onto
    else:
        family, source = Family(experts, merge, merged), pre
    names = set(family.names)
    manifest = {
        **(describe or {}),
        "select": str(select),
        "merged": str(merged),
        "seed": seed,
        "pre": {"path": str(pre), "digest": contents.of_checkpoint(pre)},
        **({"base": {"path": str(onto), "digest": contents.of_checkpoint(onto)}} if onto else {}),
        "experts": {
            n: {"path": str(p), "digest": contents.of_checkpoint(p)} for n, p in posts.items()
        },
        "edited": {
            "tensors": len(names),
            "parameters": sum(prod(base.entries[name].shape) for name in names),
        },
    }
    for left, size in files.leftovers(out):
        console.fail(f"{left}: left by a run that was killed, {size / 1e9:.3g} GB; remove it")
    with files.building(out) as made:
        targets = {n: (made / n, side, posts[n]) for n, side in sides.items()}
        if not merge.each:
            targets = {"": (made, base, source)}
        elif onto is not None:
            targets = {n: (made / n, base, source) for n in sides}
        for name, (place, side, origin) in targets.items():
            _write(family, name or None, names, ties, side, place)
            layout.copy_companions(origin, place, side)
        files.write(made / "deltalab.json", json.dumps(records.redacted(manifest), indent=1) + "\n")
    return manifest


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


def _write(
    family: Family,
    expert: str | None,
    names: set[str],
    ties: Mapping[str, str],
    side: Side,
    place: Path,
) -> None:
    """Write all files of one model: headers and what is not merged as bytes."""
    weights = family.merged(expert)
    with console.steps(expert or "tensors", len(side.entries)) as step:
        for file, written in side.files.items():
            (place / written.name).parent.mkdir(parents=True, exist_ok=True)
            ours = {n: e for n, e in side.entries.items() if e.file == file}
            with (
                open(place / written.name, "wb", buffering=0) as target,
                open(file, "rb") as source,
            ):
                if written.head is None:
                    copy(source, target, 0, min((e.begin for e in ours.values()), default=None))
                else:
                    put(target, torch.frombuffer(bytearray(written.head), dtype=torch.uint8), 0)
                for name, entry in ours.items():
                    _put(target, source, entry, weights, ties.get(name, name), names)
                    step()
            if (size := (place / written.name).stat().st_size) != written.size:
                raise OSError(f"{place / written.name}: {size} bytes, not {written.size}")


def _put(target: Any, source: Any, entry: Entry, weights: Any, name: str, names: set[str]) -> None:
    if name not in names or entry.dtype is None:
        keep(source, target, entry, 0)
        return
    found = weights[name].to(entry.dtype)
    finite.check_edited({name: found})
    put(target, found.reshape(-1), entry.begin)
