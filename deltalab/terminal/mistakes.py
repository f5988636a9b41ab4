"""A user's mistake in one line: which exceptions are one, and what may have been meant."""

import re
import sys
from functools import cache
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltalab import settings
from deltalab.settings import conf_dir
from deltalab.terminal import console


def mistakes() -> tuple[type[Exception], ...]:
    """Return the exceptions that tell of a user's mistake: one line, no traceback, exit code 2."""
    from hydra.errors import HydraException

    return (ValueError, OSError, HydraException, OmegaConfBaseException)


@cache
def top_level() -> list[str]:
    """Return all names that a config may have at its top: settings and groups."""
    primary = OmegaConf.load(conf_dir() / "config.yaml")
    groups = (p.name for p in conf_dir().iterdir() if p.is_dir())
    return [str(name) for name in [*primary, *groups] if name not in ("defaults", "hydra")]


def fail(error: BaseException, code: int = 2) -> NoReturn:
    """Print an error in one line, with the nearest name for one that does not exist, and exit."""
    message = console.one_line(error)
    key = re.search(r"Could not override '([^']*)'", message)
    known = known_names(sys.argv[1:]) if key else []
    hint = settings.suggestion(message, known)
    if key and not any(name.endswith(f".{key[1]}") for name in known):
        hint = owners(key[1]) or hint
    if key and hint:
        message = f"Could not override '{key[1]}'"
    console.fail(message + hint)
    sys.exit(code)


def owners(setting: str) -> str:
    """Say which options have a setting that none of the chosen ones has; empty where none has it.

    >>> owners("edit.alpha"), owners("rank")
    ('; edit.alpha=... needs edit=expo', '; edit.rank=... needs edit=twin')
    """
    group, _, name = setting.lstrip("+").rpartition(".")
    for folder in sorted(conf_dir().iterdir()):
        if not folder.is_dir() or group not in ("", folder.name):
            continue
        files = sorted(folder.glob("*.yaml"))
        if found := [file.stem for file in files if name in OmegaConf.load(file)]:
            one_of = "" if len(found) == 1 else "one of "
            return f"; {folder.name}.{name}=... needs {one_of}{folder.name}={', '.join(found)}"
    return ""


def known_names(arguments: list[str]) -> list[str]:
    """Return all settings of the config with the groups that the arguments choose, as `edit.p`."""
    from hydra import compose, initialize_config_dir

    groups = [a for a in arguments if a.split("=")[0] in top_level() and "=" in a]
    for chosen in (groups, []):
        try:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                return settings.names(OmegaConf.to_container(compose("config", chosen)))
        except Exception:  # the arguments are what is wrong
            continue
    return []
