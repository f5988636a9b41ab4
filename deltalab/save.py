"""The `deltalab-apply` command: write an edited checkpoint, streamed from disk to disk.

    deltalab-apply model=timm_vit model.name=... model.pre=DIR model.post=DIR edit=dare out=OUT

takes the settings of `deltalab` that choose a model and an edit (model, edit, select, seed, draws,
label, values, budget), so that the tensors are those that a point edits, and

    out=DIR                               directory to write; it must not exist
    mismatch=error|truncate|keep_post     what to do where the two checkpoints differ
    kernel=auto|eager|compiled            whether to compile the edit; the bits are the same
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
        manifest = save(sys.argv[1:])
    edited = manifest["edited"]
    print(
        f"{edited['tensors']} tensors, {edited['parameters']} parameters edited:"
        f" {shown.line(manifest['out'])}"
    )


def save(arguments: list[str]) -> dict[str, Any]:
    """Compose the settings, write the checkpoint and return its manifest with `out`.

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
    from deltalab.sweep.jobs import job

    found = job(overrides)
    out = Path(own["out"]).expanduser()
    if found.experts or found.cfg.merge:
        manifest = _merge(found, out, own)
        return {**manifest, "out": str(out)}
    from deltalab.apply import merge_files, stream
    from deltalab.merges.sum import Sum

    if found.onto is not None:
        _check_own(own, "model.base")
        manifest = merge_files.merge(
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
        return {**manifest, "out": str(out)}
    manifest = stream.stream(
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
    return {**manifest, "out": str(out)}


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
