"""What a config may name, whoever wrote it: classes, log handlers, variables of the environment.

A config is data. Everything that Hydra or this package would import, call or run because a config
names it is looked up in a list of exact names here, after the config has been composed and before
anything that it names is called. What is executed, such as the lines of shell before a SLURM task,
comes from the person at the keyboard alone.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from deltalab.settings import allowed_targets, conf_dir, in_configs, leaves, names, near, short

HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
SETTABLE = frozenset(
    (
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF",
        "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE",
        "TRANSFORMERS_VERBOSITY", "NO_COLOR",
    )
)  # fmt: skip
"""Variables that a config may give a job: they are neither executed nor loaded, and no address."""
READABLE = frozenset(
    (
        "HOME", "USER", "LOGNAME", "HOSTNAME", "TMPDIR", "SCRATCH", "WORK", "XDG_CACHE_HOME",
        "XDG_DATA_HOME", "XDG_STATE_HOME", "HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
        "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID",
        "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_CPUS_PER_TASK", "SLURM_TMPDIR",
    )
)  # fmt: skip
"""Variables that `${oc.env:NAME}` may read, besides those that the packaged configs read."""
_LOG_FILE = re.compile(
    r"\$\{hydra\.runtime\.output_dir\}/(\$\{hydra\.job\.name\}|[\w-][\w.-]*)\.log"
)
_SECTIONS = re.compile(r"hydra\.(callbacks|launcher|sweeper)\b")
_PROVIDERS = ("hydra", "deltalab")
_COMMANDS = ("slurm_setup", "slurm_additional_parameters", "init.address")
"""Settings of launchers that are run, or say whose machines run the points."""


def check_hydra(hydra: Any, typed: Iterable[str] | None = None) -> None:
    """Check what Hydra itself would call by name, or give to a system: its part of a config.

    Args:
        hydra: the node `hydra` of a composed config, not resolved.
        typed: the overrides that the person typed, which alone may say what is executed; None
            where nothing is launched any more.

    Raises:
        ValueError: a class that is none of Hydra's or of this package, an interpolated section, a
            log handler of another kind, a variable that may not be set, or a command in a config.
    """
    from omegaconf import OmegaConf

    for where in _interpolated(hydra, "hydra"):
        raise ValueError(f"{where}: must be written out, not interpolated from elsewhere")
    plain: Mapping[str, Any] = OmegaConf.to_container(hydra, resolve=False)  # type: ignore[assignment]
    _check_classes(plain)
    for section in ("job_logging", "hydra_logging"):
        for where, key, value in leaves(plain.get(section) or {}, f"hydra.{section}"):
            _check_logging(where, key, value)
    _check_environment(plain.get("job") or {})
    for where, name in (("job.name", (plain.get("job") or {}).get("name")),
                        ("output_subdir", plain.get("output_subdir"))):  # fmt: skip
        if name not in (None, "???") and not re.fullmatch(r"\.?[\w-][\w. -]*", str(name)):
            raise ValueError(f"hydra.{where}={short(name)}: must be a plain name")
    if typed is not None:
        _check_launcher(plain.get("launcher") or {}, list(typed))


def _interpolated(node: Any, where: str) -> Iterator[str]:
    """Yield where a mapping or list comes from elsewhere, or may do so later: it was not seen."""
    from omegaconf import Container, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        name = f"{where}.{key}"
        if OmegaConf.is_interpolation(node, key):
            kept = _SECTIONS.match(name) or isinstance(node._get_node(key), Container)
            try:
                plain = isinstance(node[key], str | int | float | bool | None)
            except OmegaConfBaseException:  # what Hydra knows later, as the number of a job
                plain = not kept
            if not plain:
                yield name
        elif not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node[key]):
            yield from _interpolated(node[key], name)


def _check_classes(hydra: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a class in another place than a plugin's, or for another class."""
    for where, key, value in leaves(hydra, "hydra"):
        if key != "_target_":
            continue
        section = where.removeprefix("hydra.").removesuffix("._target_")
        if re.fullmatch(r"launcher|sweeper|callbacks\.[^.]+", section):
            kind = section.split(".")[0]
            if str(value) in _plugins(kind):
                continue
        raise ValueError(f"{where}={short(value)}: only targets of deltalab are allowed")


def _plugins(kind: str) -> set[str]:
    """Return the launchers, sweepers or callbacks of this package and of Hydra's core."""
    from hydra.core.config_store import ConfigStore

    stored = ConfigStore.instance().repo.get("hydra", {}).get(kind, {}).values()
    own = {str(n.node.get("_target_")) for n in stored if n.provider in _PROVIDERS}
    return own | allowed_targets(f"hydra/{kind}")


def _check_logging(where: str, key: str, value: Any) -> None:
    """Raise `ValueError` for what logging would import, call, send or write elsewhere."""
    text = str(value)
    if key == "()" or (key == "class" and text not in HANDLERS):
        raise ValueError(
            f"{where}={short(value)}: only handlers of logging are allowed: {', '.join(HANDLERS)}"
        )
    if key == "filename":
        if not _LOG_FILE.fullmatch(text):
            raise ValueError(
                f"{where}={short(value)}: must be ${{hydra.runtime.output_dir}}/NAME.log"
            )
    elif isinstance(value, str) and (
        "${" in value or ("://" in value and value not in STREAMS and key != "format")
    ):
        raise ValueError(f"{where}={short(value)}: must be a plain value, or ext://sys.stderr")


def _check_environment(job: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a variable that a config may not give to a job; never its value."""
    for field in ("env_set", "env_copy"):
        for name in job.get(field) or ():
            if name not in SETTABLE:
                raise ValueError(
                    f"hydra.job.{field}: a config may not set {short(name)}; it may set"
                    f" {', '.join(sorted(SETTABLE))}; set others in the shell"
                )


def _check_launcher(launcher: Mapping[str, Any], typed: list[str]) -> None:
    """Raise `ValueError` for a command, or an unknown setting, that the person did not type."""
    given = [override.lstrip("+~").split("=")[0] for override in typed]
    known = _launcher_settings(str(launcher.get("_target_")))
    for where, _, value in leaves(launcher, "hydra.launcher"):
        name = where.removeprefix("hydra.launcher.")
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{where}={value!r}: must be one line of plain text")
        if value in (None, [], {}) or (name in known and not _within(name, _COMMANDS)):
            continue
        if not any(_within(where, [override]) for override in given):
            raise ValueError(
                f"{where}={short(value)}: must be given on the command line, not by a config"
            )


def _within(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith((f"{place}.", f"{place}[")) for place in places)


@cache
def _launcher_settings(target: str) -> frozenset[str]:
    """Return the settings that the packaged configs of a launcher have, by dotted name."""
    from omegaconf import OmegaConf

    files = [OmegaConf.load(f) for f in sorted((conf_dir() / "hydra/launcher").glob("*.yaml"))]
    own = [OmegaConf.to_container(file) for file in files]
    of_it = [file for file in own if isinstance(file, dict) and file.get("_target_") == target]
    return frozenset(["_target_", *(name for file in of_it for name in names(file))])


def check_search_path(places: Iterable[Any]) -> None:
    """Raise `ValueError` for a place of configs whose look-up would import a package."""
    for place in places:
        if str(place).startswith("pkg:"):
            raise ValueError(f"hydra.searchpath=[{place}]: would run a package; name a directory")


def restrict_environment() -> None:
    """From now on let `${oc.env:NAME}` read a few variables that hold no secret, and no others."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("oc.env", _read, replace=True)


_NOTHING = object()


def _read(name: Any, default: Any = _NOTHING) -> Any:
    """Return a variable of the environment, or the default, as `oc.env` does."""
    if name not in (known := readable()):
        raise ValueError(
            f"a config may not read {short(name)} from the environment{near(str(name), known)};"
            f" it may read {', '.join(sorted(known))}"
        )
    if name in os.environ:
        return os.environ[name]
    if default is _NOTHING:
        raise KeyError(f"Environment variable '{name}' not found")
    return None if default is None else str(default)


@cache
def readable() -> frozenset[str]:
    """Return the variables that a config may read.

    >>> {"DELTALAB_JUDGE_MODEL", "HOME"} <= readable(), "OPENAI_API_KEY" in readable()
    (True, False)
    """
    return READABLE.union(in_configs(r"\$\{oc\.env:\s*(\w+)"))
