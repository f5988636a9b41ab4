"""The `deltalab-apply` command: write an edited checkpoint, streamed from disk to disk.

    deltalab-apply model=timm_vit model.name=... model.pre=DIR model.post=DIR edit=dare out=OUT

takes the settings of `deltalab` that choose a model and an edit (model, edit, select, seed, draws,
label, values, budget), so that the tensors are those that a point edits, and

    out=DIR                               directory to write; it must not exist
    mismatch=error|truncate|keep_post     what to do where the two checkpoints differ
    kernel=auto|eager|compiled            whether to compile the edit; the bits are the same

Beside the weights lie a model card, README.md, and the digests of all files, SHA256SUMS;
`deltalab-apply verify DIR` checks them.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltalab.sweep.jobs import Job

OWN = {"out": None, "mismatch": "error", "kernel": "auto"}


def main() -> None:
    """Entry point of the `deltalab-apply` command. Exit code 0 on success, 2 for a mistake."""
    from deltalab.store import shown
    from deltalab.sweep.jobs import writing
    from deltalab.terminal import console

    console.ready()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    with writing():
        if sys.argv[1:2] == ["verify"]:
            print(verified(sys.argv[2:]))
            return
        manifest = save(sys.argv[1:])
    if manifest.get("post", {}).get("adapter"):
        print("model.post is an adapter: put onto model.pre, then edited")
    edited = manifest["edited"]
    print(
        f"{edited['tensors']} tensors, {edited['parameters']} parameters edited:"
        f" {shown.line(manifest['out'])}"
    )


def verified(arguments: list[str]) -> str:
    """Check a written checkpoint against its digests, and say so.

    Raises:
        ValueError: no directory, or one that differs.
    """
    from pathlib import Path

    from deltalab import cards

    if len(arguments) != 1:
        raise ValueError("verify: name one directory that deltalab-apply has written")
    place = Path(arguments[0]).expanduser()
    return f"{place}: whole, {cards.verify(place)} files"


def save(arguments: list[str]) -> dict[str, Any]:
    """Write the checkpoint, its card and digests, and return its manifest with `out`.

    Args:
        arguments: `name=value` overrides, as on the command line.

    Raises:
        ValueError: a mistake in them.
    """
    from pathlib import Path

    own: dict[str, Any] = dict(OWN)
    overrides = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in OWN:
            own[name] = value
        else:
            overrides.append(argument)
    if not own["out"]:
        raise ValueError("out=: name the directory to write")
    from deltalab import cards
    from deltalab.sweep.jobs import job

    found = job(overrides)
    out = Path(own["out"]).expanduser()
    manifest = _written(found, out, own)
    sides = [found.onto, found.pre, found.post] if not found.experts else _named(found)
    cards.write(out, manifest, [str(side) for side in sides if side is not None], arguments)
    return {**manifest, "out": str(out)}


def _named(found: "Job") -> list[Any]:
    """Return the checkpoints of a family, the base first."""
    from deltalab.sweep.jobs import checkpoints

    sides = [checkpoints(model) for model in found.experts.values()]
    return [sides[0][0], *(post for _, post, *_ in sides)]


def _written(found: "Job", out: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint and return its manifest.

    Raises:
        ValueError: a mistake in the settings.
    """
    if found.experts or found.cfg.merge:
        return _merge(found, out, own)
    from deltalab.apply import merge_files, stream
    from deltalab.merges.sum import Sum

    if found.onto is not None:
        _check_own(own, "model.base")
        return merge_files.merge(
            found.pre,
            {"post": found.post},
            out,
            Sum(weight=1.0, weights=None),
            {"post": (found.edit, found.salt)},
            select=found.select,
            merged="all",
            seed=found.seed,
            describe={"edit": found.described},
            dequantize=found.dequantize,
            onto=found.onto,
        )
    return stream.stream(
        found.pre,
        found.post,
        out,
        found.edit,
        select=found.select,
        seed=found.seed,
        mismatch=own["mismatch"],
        kernel=own["kernel"],
        dequantize=found.dequantize,
        salt=found.salt,
        describe=found.described,
        share=found.share,
    )


def _merge(found: "Job", out: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Merge a family's checkpoints and return the manifest.

    Raises:
        ValueError: a merge of a pair, none of a family, or one that files do not suffice for.
    """
    from omegaconf import OmegaConf

    from deltalab.apply import merge_files
    from deltalab.models import families
    from deltalab.run import experts as family
    from deltalab.run.building import merging
    from deltalab.sweep.jobs import checkpoints

    cfg, experts, edit = found.cfg, found.experts, found.edit
    _check_own(own, "model.experts")
    node: Any = OmegaConf.to_container(cfg.merge, resolve=True) if cfg.merge else None
    merge, merged = merging(node, tuple(experts), ())
    sides = {name: checkpoints(model) for name, model in experts.items()}
    pre, _, dequantize, onto = next(iter(sides.values()))
    families.check_base(pre, {name: post for name, (_, post, *_) in sides.items()})
    nodes: Any = {"edit": OmegaConf.to_container(cfg.edit, resolve=True), "merge": node}
    described = {
        key: {k: v for k, v in value.items() if k not in ("_target_", "select")}
        for key, value in nodes.items()
    }
    names = {"edit": type(getattr(edit, "edit", edit)), "merge": type(merge)}
    return merge_files.merge(
        pre,
        {name: post for name, (_, post, *_) in sides.items()},
        out,
        merge,
        {name: family.drawing(edit, found.salt, name, [*experts]) for name in experts},
        select=found.select,
        merged=merged,
        seed=found.seed,
        describe={k: {"name": names[k].__name__.lower(), **v} for k, v in described.items()},
        dequantize=dequantize,
        onto=onto,
    )


def _check_own(own: dict[str, Any], setting: str) -> None:
    """Raise `ValueError` where a setting of this command does not go with one of the model."""
    for name, value in OWN.items():
        if name != "out" and own[name] != value:
            raise ValueError(f"{name}={own[name]}: is for a pair, not with {setting}")


class _Callable(ModuleType):
    """A module that is called as the front door's function of its name is."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from deltalab import api

        return api.save(*arguments, **named)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
