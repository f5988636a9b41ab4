"""What the settings of an edited checkpoint come to, for commands that go from disk to disk."""

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SETTINGS = ("edit", "model", "select", "seed", "draws", "label", "nonfinite", "values", "budget")
"""Those of `deltalab` that decide what is written."""


@contextmanager
def writing() -> Iterator[None]:
    """Run what such a command does, and end the process as it must where that fails.

    Exit code 2 after a user's mistake, 143 and 130 after a signal; then nothing was written.
    """
    from deltalab.sweep import stopping
    from deltalab.terminal import console
    from deltalab.terminal.mistakes import fail, mistakes

    try:
        with stopping.ending():
            yield
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
        pre, post, dequantize, onto = checkpoints(settings["model"])
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


def checkpoints(model: dict[str, Any]) -> tuple[Any, Any, bool | None, Any]:
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
