"""Every config that Hydra composes, checked before Hydra calls anything that it names.

Only light imports here: `deltalab --help` and tab completion load this module.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig, ListConfig, OmegaConf

from deltalab import allowed, settings
from deltalab.store import eviction

LONGEST = 120
"""Bytes of an experiment's name, which is a file's and a folder's too."""


@contextmanager
def guarded() -> Iterator[None]:
    """Check every config that Hydra composes before Hydra calls anything that it names.

    Callbacks, plugins and log handlers are called before a job starts, so that no check within the
    job comes in time; Hydra has a list of what is forbidden, and here is what is allowed.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    allowed.restrict_environment()
    loader: Any = ConfigLoaderImpl
    original, search = loader.load_configuration, loader._process_config_searchpath

    def checked(
        self: Any, config_name: str | None, overrides: list[str], run_mode: Any, **kwargs: Any
    ) -> DictConfig:
        overrides = as_text(overrides, self)
        cfg: DictConfig = original(self, config_name, overrides, run_mode, **kwargs)
        allowed.check_hydra(cfg.hydra, overrides)
        alternatives(cfg, overrides)
        expand(cfg)
        settings.check_results(cfg.get("results"))
        check_store(cfg.get("artifacts"))
        check_options(cfg.hydra.runtime.choices, overrides, self)
        return cfg

    def searched(self: Any, config_name: str | None, overrides: list[Any], repo: Any) -> None:
        places = [o.value() for o in overrides if o.get_key_element() == "hydra.searchpath"]
        loaded = None if config_name is None else repo.load_config(config_path=config_name)
        if loaded is not None and OmegaConf.is_dict(loaded.config):
            places.append(OmegaConf.select(loaded.config, "hydra.searchpath"))
        for place in places:
            allowed.check_search_path(place if isinstance(place, list | ListConfig) else [])
        search(self, config_name, overrides, repo)

    loader.load_configuration, loader._process_config_searchpath = checked, searched
    try:
        yield
    finally:
        loader.load_configuration, loader._process_config_searchpath = original, search


def alternatives(cfg: DictConfig, overrides: list[str]) -> None:
    """Let one of two settings of an edit, of which only one can be given, take the other's place.

    `edit=twin edit.rank=5` is meant without the default of `edit.rate`.
    """
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    edit = cfg.get("edit")
    both = OmegaConf.is_dict(edit) and {"rank", "rate"} <= set(edit)
    if both and "edit.rank" in given and "edit.rate" not in given and edit.rank is not None:
        edit.rate = None


def check_store(artifacts: Any) -> None:
    """Raise `ValueError` where a store of artefacts would lie among things of somebody else."""
    if isinstance(artifacts, str) and artifacts:
        with suppress(OSError):
            eviction.check(Path(artifacts))


def check_options(choices: Any, overrides: list[str], loader: Any) -> None:
    """Raise `ValueError` for an option that does not exist: Hydra ignores it in optional groups.

    Args:
        choices: the option of every group, as composed.
        overrides: what was typed, where a group may have a list of options.
        loader: Hydra's.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen: list[tuple[str, Any]] = [
        (str(group).split("@")[0], [option]) for group, option in choices.items()
    ]
    listed = OverridesParser.create().parse_overrides([o for o in overrides if "=[" in o])
    is_group = loader.repository.group_exists
    chosen += [(o.key_or_group, o.value()) for o in listed if is_group(o.key_or_group)]
    name = str(choices.get("experiment") or "")
    if len(quote(name, safe="")) > LONGEST:
        raise ValueError(f"experiment={settings.short(name)}: must be a name of {LONGEST} bytes")
    follow = {"grid": "edit", "evaluator/tasks": "data"}  # an option of that name, if there is one
    for group, named in chosen:
        for option in named:
            if option is None or option == choices.get(follow.get(group, "")):
                continue
            if str(option) not in (options := _options(loader, group)):
                hint = settings.near(str(option), options)
                raise ValueError(f"{group}={option}: must be one of {', '.join(options)}{hint}")


def as_text(overrides: list[str], loader: Any) -> list[str]:
    """Return overrides with quotes where Hydra would take no text: `edit=2`, `results=~/x`."""
    found = []
    for line in overrides:
        key, _, value = line.partition("=")
        number = re.fullmatch(r"[\d.+-][\w.+-]*|true|false", value)
        group = number and loader.repository.group_exists(key.lstrip("+").split("@")[0])
        found.append(f"{key}='{value}'" if group or re.fullmatch(r"~[^',]*", value) else line)
    return found


def expand(cfg: DictConfig) -> None:
    """Write out a `~` in the directories that a run writes to.

    Raises:
        ValueError: a home directory of nobody.
    """
    hydra = cfg.hydra
    for node, key in (
        (cfg, "results"),
        (cfg, "artifacts"),
        (hydra.run, "dir"),
        (hydra.sweep, "dir"),
    ):
        kept = OmegaConf.to_container(node, resolve=False).get(key)  # type: ignore[union-attr]
        given = node.get(key) if node is cfg else kept
        if isinstance(given, str) and given.startswith("~"):
            node[key] = settings.home(given, "hydra.dir" if node is not cfg else key)


@cache
def _options(loader: Any, group: str) -> list[str]:
    """Return the options of a group; a sweep composes many configs from the same directories."""
    options: list[str] = loader.get_group_options(group)
    return options
