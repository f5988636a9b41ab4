"""The `deltalab-apply` command: write an edited checkpoint, streamed from disk to disk.

    deltalab-apply model=timm_vit model.name=... model.pre=DIR model.post=DIR edit=dare out=OUT

takes the settings of `deltalab` that choose a model and an edit (model, edit, select, seed, draws,
label, values, budget), so that the tensors are those that a point edits, and

    out=DIR                               directory to write; it must not exist
    mismatch=error|truncate|keep_post     what to do where the two checkpoints differ
    kernel=auto|eager|compiled            whether to compile the edit; the bits are the same
"""

import gc
import logging
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SETTINGS = ("edit", "model", "select", "seed", "draws", "label", "nonfinite", "values", "budget")
"""Those of `deltalab` that decide what is written."""
OWN = {"out": None, "mismatch": "error", "kernel": "auto"}


def main() -> None:
    """Entry point of the `deltalab-apply` command. Exit code 0 on success, 2 for a mistake."""
    from deltalab.store import shown
    from deltalab.sweep import stopping
    from deltalab.terminal import console
    from deltalab.terminal.mistakes import fail, mistakes

    console.ready()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    try:
        with stopping.ending():
            manifest = save(sys.argv[1:])
    except (Exception, stopping.Stopped) as error:
        if stopping.is_stop(error):
            console.fail("stopped; nothing was written")
            sys.exit(143)
        if isinstance(error, mistakes()):
            fail(error)
        raise
    except KeyboardInterrupt:
        console.fail("interrupted; nothing was written")
        sys.exit(130)
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


@dataclass(frozen=True)
class Job:
    """What the settings of an edited checkpoint come to.

    Attributes:
        cfg: the composed config.
        experts: a family's models, by name; empty for a pair.
        pre: the base of a pair.
        post: its tuned checkpoint.
        dequantize: whether quantised weights are decoded.
        edit: the edit.
        described: what it is called, and its settings.
        select: the tensors to edit.
        seed: of the random numbers.
        salt: likewise.
        onto: another base that the edited delta is put onto; None: its own.
    """

    cfg: Any
    experts: dict[str, Any]
    pre: Any
    post: Any
    dequantize: bool | None
    edit: Any
    described: dict[str, Any]
    select: Any
    seed: int
    salt: str
    onto: Any = None

    @property
    def share(self) -> Any:
        """What gives every tensor its share of a budget; None without one."""
        from deltalab.run import shares

        return None if getattr(self.edit, "budget", None) is None else shares.provider


def job(overrides: list[str]) -> Job:
    """Compose settings as `deltalab` does, and check them.

    Raises:
        ValueError: a mistake in them.
    """
    gc.disable()  # what imports leave is never collected: a quarter of the start, most of the exit
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from deltalab import options
    from deltalab import settings as checks
    from deltalab.apply import extras
    from deltalab.keys import Choices, salt_of
    from deltalab.run.building import edit_of
    from deltalab.sweep import composing
    from deltalab.weights import configs, select

    gc.freeze()
    gc.enable()
    where = initialize_config_dir(version_base="1.3", config_dir=str(checks.conf_dir()))
    with composing.guarded(), where:
        cfg = compose("config", overrides, return_hydra_config=True)
    experts = options.models(cfg)
    settings: Any = {}
    for name in SETTINGS:
        held = cfg[name]
        plain = OmegaConf.to_container(held, resolve=True) if OmegaConf.is_config(held) else held
        settings[name] = checks.tidy(plain)  # as a point has it
    settings["model"].pop("experts", None)
    checks.check_top(settings)
    described = {k: v for k, v in settings["edit"].items() if k not in ("_target_", "select")}
    edit, chosen = edit_of(settings)
    chosen = settings["select"] or chosen
    select.check(chosen)
    runtime = cfg.hydra.runtime
    named = {
        group: checks.option(group, runtime.choices[group], runtime.config_sources)
        for group in ("model", "edit", "objective")
    }
    salt = salt_of(settings, Choices(**named))
    if cfg.nonfinite != "error":
        raise ValueError(
            f"nonfinite={cfg.nonfinite}: deltalab-apply writes no numbers that neither model has;"
            " only error"
        )
    if settings["values"] != "exact":
        described["values"] = settings["values"]
    if settings["budget"]:
        described["budget"] = settings["budget"]
    extras.check_needs(edit)
    pre, post, dequantize, onto = (None, None, None, None)
    if not experts and not cfg.merge:
        pre, post, dequantize, onto = _checkpoints(settings["model"])
        if onto is None:
            old, new = (configs.content(p / "config.json") for p in (pre, post))  # none of files
            if line := configs.differences(old, new):
                logging.getLogger("deltalab").warning(line)
    described = {"name": settings["edit"]["_target_"].split(".")[-2], **described}
    return Job(
        cfg,
        experts,
        pre,
        post,
        dequantize,
        edit,
        described,
        chosen,
        settings["seed"],
        salt,
        onto,
    )


def _merge(found: Job, out: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Merge a family's checkpoints and return the manifest.

    Raises:
        ValueError: a merge of a pair, none of a family, or one that files do not suffice for.
    """
    from omegaconf import OmegaConf

    from deltalab.apply import merge_files
    from deltalab.models import families
    from deltalab.run import experts as family
    from deltalab.run.building import merging

    cfg, experts, edit = found.cfg, found.experts, found.edit
    _check_own(own, "model.experts")
    node: Any = OmegaConf.to_container(cfg.merge, resolve=True) if cfg.merge else None
    merge, merged = merging(node, tuple(experts), ())
    sides = {name: _checkpoints(model) for name, model in experts.items()}
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


def _checkpoints(model: dict[str, Any]) -> tuple[Any, Any, bool | None, Any]:
    """Return both checkpoints' paths, whether they are decoded, and the path of another base.

    They are fetched if need be.
    """
    from deltalab.run.building import build

    spec: Any = None
    missing = [side for side in ("pre", "post") if model.get(side, "") in (None, "???")]
    if not missing:  # what else is not given concerns the module, of which there is none here
        spec = build({k: "" if v == "???" else v for k, v in model.items()}, "model")
    if not hasattr(spec, "checkpoints"):
        side = missing[0] if missing else "pre"
        raise ValueError(f"model.{side}=: name the checkpoint (a file, a directory, a hub id)")
    pre, post = spec.checkpoints
    return pre, post, getattr(spec, "dequantize", None), getattr(spec, "other_base", None)


class _Callable(ModuleType):
    """A module that is called as the front door's function of its name is."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from deltalab import api

        return api.save(*arguments, **named)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
