"""The `deltalab-delta` command: a tuned checkpoint as a small file that goes with its base.

    deltalab-delta pack model=hf_llm model.pre=BASE model.post=DIR edit=dare out=FILE.safetensors
    deltalab-delta unpack FILE.safetensors onto=BASE out=DIR
    deltalab-delta inspect FILE.safetensors|DIR
    deltalab-delta verify FILE.safetensors [onto=BASE]
    deltalab-delta lora FILE.safetensors onto=BASE out=DIR [extras=keep|drop]
    deltalab-delta patch model=... edit=ties out=FILE.safetensors

`pack` takes the settings of `deltalab-apply`, and `record=FILE`, a point's record, whose measured
change the file then tells. What `unpack` writes is what `deltalab-apply` would have written, byte
for byte, but for card and digests. Without `onto=`, the base is looked for beside the file: several
deltas of one base, in one directory with it, share it. `lora` writes an adapter of PEFT of what is
of low rank (twin), and `extras=drop` leaves out what is not; `patch` writes the changed entries
alone, which overwrite.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PACK = {"out": None, "mismatch": "error", "record": None}


def main() -> None:
    """Entry point of the `deltalab-delta` command. Exit code 0 on success, 2 for a mistake."""
    from deltalab.store import shown
    from deltalab.sweep.jobs import writing
    from deltalab.terminal import console

    console.ready()
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(__doc__)
        return
    with writing():
        for line in run(arguments):
            print(shown.line(line))


def run(arguments: list[str]) -> list[str]:
    """Do what the arguments say, and return what there is to say of it, line by line.

    Raises:
        ValueError: a mistake in them.
    """
    command, *rest = arguments
    if command not in COMMANDS:
        raise ValueError(f"{command}: must be one of {', '.join(COMMANDS)}")
    return COMMANDS[command](rest)


def _taken(arguments: list[str], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a command's own settings, and what else it was given."""
    own, others = dict(known), []
    for argument in arguments:
        name, is_setting, value = argument.partition("=")
        if is_setting and name in known:
            own[name] = value
        else:
            others.append(argument)
    return own, others


def _one_file(arguments: list[str], known: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    own, others = _taken(arguments, known)
    if len(others) != 1 or "=" in others[0]:
        wanted = " ".join(["FILE", *(f"{name}=" for name in known)])
        raise ValueError(f"{' '.join(others) or 'no file'}: must be one file, as {wanted}")
    return Path(others[0]).expanduser(), own


def _path(own: Mapping[str, Any], name: str) -> Path:
    if not own[name]:
        raise ValueError(f"{name}=: name a path")
    return Path(own[name]).expanduser()


def pack(arguments: list[str]) -> list[str]:
    """Pack a pair.

    Raises:
        ValueError: a mistake in the settings.
    """
    from deltalab.packing import packs

    own, overrides = _taken(arguments, PACK)
    out = _path(own, "out")
    if out.suffix != ".safetensors":
        raise ValueError(f"out={out}: must end in .safetensors")
    found = _pair(overrides, "packed")
    about: dict[str, Any] = {"edit": found.described}
    if own["record"]:
        about["change"] = _change(_path(own, "record"), found)
    told = packs.pack(
        found.pre,
        found.post,
        out,
        found.edit,
        select=found.select,
        seed=found.seed,
        mismatch=own["mismatch"],
        dequantize=found.dequantize,
        salt=found.salt,
        about=about,
        share=found.share,
    )
    return [_size(told, told["bytes"], str(out))]


def _pair(overrides: list[str], done: str) -> Any:
    """Compose the settings of an edited pair.

    Raises:
        ValueError: a mistake in them, a family, or a delta that is put onto another base.
    """
    from deltalab.sweep.jobs import job

    found = job(overrides)
    if found.experts or found.cfg.merge:
        raise ValueError(f"merge=: a merged family is {done} as a pair: write it to disk first")
    if found.onto is not None:
        raise ValueError(
            f"model.base={found.onto}: a file goes with the base that its delta is of; write the"
            " checkpoint with deltalab-apply"
        )
    return found


def _change(path: Path, found: Any) -> dict[str, Any]:
    """Return the measured change of a point's record.

    Raises:
        ValueError: it is no record, or one of another edit or seed.
    """
    from deltalab.store import record

    try:
        point = record.parse(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"record={path}: not a record ({error})") from None
    wanted = {k: v for k, v in found.described.items() if k != "name"}
    made: dict[str, tuple[Any, Any]] = {
        "edit": (point.edit, found.described["name"]),
        "seed": (point.seed, found.seed),
        "settings": (dict(point.settings), wanted),
    }
    for name, (held, here) in made.items():
        if held != here:
            raise ValueError(f"record={path}: of {name} {held}, here it is {here}")
    return {"value": point.change, "error": point.error, "objective": point.objective}


def _size(told: Mapping[str, Any], size: int, name: str) -> str:
    from deltalab.store import record

    bits, count = told["bits"], max(1, told["parameters"])
    edit = {k: v for k, v in told["edit"].items() if k != "name"}
    label = record.label(told["edit"].get("name", ""), edit)
    return (
        f"{name}: {label}, {size:,} bytes, {8 * size / count:.4g} bits a weight"
        f" ({bits['payload'] / count:.4g} payload)"
    )


def unpack(arguments: list[str]) -> list[str]:
    """Unpack a file onto its base.

    Raises:
        ValueError: a mistake in the settings.
    """
    from deltalab.packing import packs

    file, own = _one_file(arguments, {"onto": None, "out": None})
    out = _path(own, "out")
    base = _path(own, "onto") if own["onto"] else packs.base_beside(file)
    told = packs.unpack(file, base, out)
    return [f"{len(told['files'])} files, {told['parameters']} parameters: {out}"]


def inspect(arguments: list[str]) -> list[str]:
    """Say what a file holds; of a directory, what each of its files does, by base.

    Raises:
        ValueError: no such file.
    """
    from deltalab.packing import packs

    path, _ = _one_file(arguments, {})
    if path.is_dir():
        return [
            _size(p.about, p.path.stat().st_size, p.path.name)
            + f"; onto {p.about['base']['digest']}"
            for p in packs.beside(path)
        ]
    from deltalab.packing.files import Packed

    packed = Packed(path)
    told = packed.about
    lines = [_size(told, path.stat().st_size, path.name)]
    lines += [f"base {told['base']['digest']}, seed {told['seed']}, select {told['select']}"]
    if told.get("change"):
        change = told["change"]
        lines += [f"measured change {change['value']:+.4g} on {change['objective']}"]
    found: dict[str, list[int]] = {}
    for name, said in packed.codes.items():
        for number, part in enumerate(said["parts"]):
            own = found.setdefault(part["code"]["kind"], [0, 0])
            own[0] += 1
            own[1] += packed.size(name, number)
    lines += [f"{kind}: {parts} parts, {size:,} bytes" for kind, (parts, size) in found.items()]
    bound = told["bits"]["bound"] / max(1, told["parameters"])
    lines += [f"{bound:.4g} bits a weight, were places entropy coded"]
    return lines


def verify(arguments: list[str]) -> list[str]:
    """Check a file against its digests.

    Raises:
        ValueError: it is damaged, or goes with another base.
    """
    from deltalab.packing import packs

    file, own = _one_file(arguments, {"onto": None})
    told = packs.verify(file, _path(own, "onto") if own["onto"] else None)
    return [f"{file}: whole, {told['parameters']} parameters onto {told['base']['digest']}"]


def lora(arguments: list[str]) -> list[str]:
    """Write what is of low rank as a LoRA adapter.

    Raises:
        ValueError: a mistake in the settings.
    """
    from deltalab.packing import adapters, packs

    file, own = _one_file(arguments, {"onto": None, "out": None, "extras": "keep"})
    out = _path(own, "out")
    base = _path(own, "onto") if own["onto"] else packs.base_beside(file)
    told = adapters.export(file, base, out, own["extras"])
    ranks = sorted(told["ranks"].values())
    line = f"{out}: {len(ranks)} modules of rank {ranks[0]} to {ranks[-1]}"
    if told["lost"]:
        return [f"{line}; {100 * told['lost']:.2g} % of the delta's energy is left out"]
    return [f"{line}, {len(told['extras'])} tensors in full"]


def patch(arguments: list[str]) -> list[str]:
    """Write the entries that an edited checkpoint changes of its base.

    Raises:
        ValueError: a mistake in the settings.
    """
    from deltalab.packing import patches

    own, overrides = _taken(arguments, {"out": None})
    found = _pair(overrides, "patched")
    told = patches.write(
        found.pre,
        found.post,
        _path(own, "out"),
        found.edit,
        select=found.select,
        seed=found.seed,
        salt=found.salt,
        share=found.share,
    )
    share = 100 * told["changed"] / max(1, told["parameters"])
    return [
        f"{own['out']}: {told['changed']:,} entries changed, {share:.3g} %, {told['bytes']:,} bytes"
    ]


COMMANDS: dict[str, Callable[[list[str]], list[str]]] = {
    "pack": pack,
    "unpack": unpack,
    "inspect": inspect,
    "verify": verify,
    "lora": lora,
    "patch": patch,
}

if __name__ == "__main__":
    main()
