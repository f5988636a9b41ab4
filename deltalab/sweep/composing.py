"""Every config that Hydra composes, checked before Hydra calls anything that it names.

Only light imports here: `deltalab --help` and tab completion load this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deltalab import settings
from deltalab.store import eviction


@contextmanager
def guarded() -> Iterator[None]:
    """Check every config that Hydra composes before Hydra calls anything that it names.

    Callbacks, plugins and log handlers are called before a job starts, so that no check within the
    job comes in time; Hydra has a list of what is forbidden, and here is what is allowed.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    original = ConfigLoaderImpl.load_configuration

    def checked(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = original(self, *args, **kwargs)
        settings.check_hydra(OmegaConf.to_container(cfg.hydra, resolve=False))  # type: ignore[arg-type]
        settings.check_results(cfg.get("results"))
        check_store(cfg.get("artifacts"))
        check_optional(cfg.hydra.runtime.choices, self)
        return cfg

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = original  # type: ignore[method-assign]


def check_store(artifacts: Any) -> None:
    """Raise `ValueError` where a store of artefacts would lie among things of somebody else."""
    if isinstance(artifacts, str) and artifacts:
        with suppress(OSError):
            eviction.check(Path(artifacts))


def check_optional(choices: Any, loader: Any) -> None:
    """Raise `ValueError` for an option that does not exist: Hydra ignores it in optional groups."""
    for group in ("experiment", "grid"):
        chosen = choices.get(group)
        if chosen is None or (group == "grid" and chosen == choices.get("edit")):
            continue
        if chosen not in (options := _options(loader, group)):
            hint = settings.near(chosen, options)
            raise ValueError(f"{group}={chosen}: must be one of {', '.join(options)}{hint}")


@cache
def _options(loader: Any, group: str) -> list[str]:
    """Return the options of a group; a sweep composes many configs from the same directories."""
    options: list[str] = loader.get_group_options(group)
    return options
