"""Settings, before anything is built from them: names, types, and what a config may ask for.

A config file may come from elsewhere. It can choose among the dataclasses of this package and
nothing else: what Hydra would call by name is checked here first.
"""

import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

COMPILER = os.environ.get("CC", "cc")
"""The C compiler that the person's environment names, as it was before any config was read."""
_SIMPLE = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_LISTS = dict.fromkeys((list, tuple, Sequence), "a list")
_MAPPINGS = dict.fromkeys((dict, Mapping), "a mapping")
_WANTED: dict[Any, str] = {**_SIMPLE, NoneType: "null", **_LISTS, **_MAPPINGS}
_TOP: dict[str, Any] = {
    "seed": int, "force": bool, "results": str, "nonfinite": str, "most_points": int,
    "artifacts_gb": float | None, "device_tflops": float, "label": str | None, "margin": float,
}  # fmt: skip
_REQUIRED = (*_TOP, "select", "tracker", "evaluator", "objective", "riemann", "edit", "model")


def conf_dir() -> Path:
    """Return the directory of the configs: inside an installed wheel, or beside the package."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@dataclass(frozen=True)
class Package:
    """An installed package that brings options of its own.

    Attributes:
        name: what its options are called by, as `name:option`; its top-level module.
        conf: the directory of its configs, laid out as deltalab's own.
        classes: exactly what its configs may name.
    """

    name: str
    conf: Path
    classes: frozenset[str]


@cache
def packages() -> tuple[Package, ...]:
    """Return the installed packages that name themselves by entry points of the group `deltalab`.

    Each entry point is one class, `shrink = "mypackage.shrink:Shrink"`; the configs are in `conf`
    of its top-level package. Nothing of a package is imported to learn this.
    """
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    classes: dict[str, set[str]] = {}
    for point in entry_points(group="deltalab"):
        top = point.module.partition(".")[0]
        classes.setdefault(top, set()).add(f"{point.module}.{point.attr}")
    found = []
    for name, targets in sorted(classes.items()):
        spec = find_spec(name)
        places = (spec.submodule_search_locations if spec else None) or []
        conf = next((Path(p) / "conf" for p in places if (Path(p) / "conf").is_dir()), None)
        if conf is not None:
            found.append(Package(name, conf, frozenset(targets)))
    return tuple(found)


def option_file(group: str, name: str) -> Path | None:
    """Return the file of an option, deltalab's own or an installed package's."""
    for conf in (conf_dir(), *(package.conf for package in packages())):
        if (file := conf / group / f"{name}.yaml").is_file():
            return file
    return None


@cache
def allowed_targets(group: str = "") -> frozenset[str]:
    """Return the classes that a config may name: exactly those that the packaged configs name.

    Besides those that installed packages name by entry points (`packages`), which are in no group.

    Args:
        group: a group of configs, as `hydra/launcher`; all of them where empty.

    >>> sorted(allowed_targets("riemann"))
    ['deltalab.loss.riemann.Riemann']
    """
    own = frozenset(in_configs(r"^\s*_target_:\s*[\"']?([\w.]+)", group))
    return own if group else own.union(*(package.classes for package in packages()))


def in_configs(pattern: str, group: str = "") -> Iterator[str]:
    """Yield what a pattern finds in the packaged configs, line by line."""
    for file in sorted((conf_dir() / group).rglob("*.yaml")):
        yield from re.findall(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)


@cache
def packaged(name: str) -> dict[str, Any]:
    """Return a table that ships with the package, such as `estimates.yaml`; not to be changed."""
    from omegaconf import OmegaConf

    table = OmegaConf.load(Path(__file__).parent / name)
    found: dict[str, Any] = OmegaConf.to_container(table)  # type: ignore[assignment]
    return found


def near(word: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to a message, empty where nothing is near.

    >>> near("edit.pp", ["edit.p", "edit.k"]), near("zzz", ["edit.p"])
    ('; did you mean edit.p?', '')
    """
    found = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def check_top(settings: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Check the settings that belong to no group.

    Args:
        settings: the composed config as plain containers.
        known: all top-level names there are; empty to allow any.

    Raises:
        ValueError: an unknown name, or a value of the wrong type.
    """
    known = list(known)
    for name in settings:
        if known and name not in known:
            raise ValueError(f"{name}={settings[name]}: no such setting{near(name, known)}")
    if missing := [name for name in known if name in _REQUIRED and name not in settings]:
        raise ValueError(f"{missing[0]}: missing, this setting cannot be removed")
    for name, kind in _TOP.items():
        if name in settings:
            _check_type(name, settings[name], kind)
    if (bound := settings.get("artifacts_gb")) is not None and not bound >= 0:
        raise ValueError(f"artifacts_gb={bound}: must be 0 or more, or null for no bound")
    if settings.get("results") == "":
        raise ValueError("results=: name a directory")


def tidy(value: Any) -> Any:
    """Return nested data whose numbers are without the last digits' rounding.

    >>> tidy({"p": [0.1 + 0.2, 1]})
    {'p': [0.3, 1]}
    """
    if isinstance(value, dict):
        return {key: tidy(each) for key, each in value.items()}
    if isinstance(value, list):
        return [tidy(each) for each in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def option(group: str, name: str, sources: Sequence[Any]) -> str:
    """Return an option's full name: `name` of deltalab's own, else `package:name`.

    Args:
        group: the config group.
        name: the option as it was chosen.
        sources: where Hydra looks for configs: each has a `provider`, a `schema` and a `path`.

    Raises:
        ValueError: an option of deltalab's own is hidden by one from elsewhere.
    """
    own = (conf_dir() / group / f"{name}.yaml").is_file()
    for source in sources:
        if source.schema != "file" or Path(source.path) == conf_dir():
            continue
        if (Path(source.path) / group / f"{name}.yaml").is_file():
            if own:
                raise ValueError(
                    f"{group}={name}: {source.path} has an option of this name, which is deltalab's"
                    " own; give it another"
                )
            return f"{'user' if source.provider == 'command-line' else source.provider}:{name}"
    return name


def check_results(results: Any) -> None:
    """Raise `ValueError` where a file stands in the way of the results directory."""
    if isinstance(results, str) and results:
        place = Path(results)
        there = next((p for p in (place, *place.absolute().parents) if p.exists()), place)
        if there.exists() and not there.is_dir():
            raise ValueError(f"results={results}: {there} is a file, name a directory")


def home(path: str, setting: str) -> str:
    """Return a path in which a leading `~` is a home directory.

    >>> home("a/~", "results")
    'a/~'
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"{setting}={path}: no such user; ./{path} is a directory of this name")
    return found


def check_node(node: Any, setting: str) -> None:
    """Check a config node, and all within it, against the dataclasses that it names.

    Args:
        node: plain containers; every mapping with a `_target_` names a dataclass.
        setting: the node's name, for messages.

    Raises:
        ValueError: a target that is no dataclass of this package, Hydra's special keys, an unknown
            key, or a number or text of the wrong type.
    """
    for where, found in _targets(node, setting):
        kind = _dataclass_of(str(found["_target_"]), f"{where}._target_")
        hints, names = get_type_hints(kind), [f.name for f in fields(kind) if f.init]
        for key, value in found.items():
            if key == "_target_":
                continue
            if key not in names:
                hint = near(f"{where}.{key}", (f"{where}.{n}" for n in names))
                hint = hint or f"; it has {', '.join(names) or 'none'}"
                raise ValueError(f"{where}.{key}={value}: no such setting{hint}")
            _check_type(f"{where}.{key}", value, hints[key])
        required = [f.name for f in fields(kind) if f.init and _required(f)]
        if missing := [name for name in required if name not in found]:
            raise ValueError(f"{where}.{missing[0]}: missing, a value must be given")
    for where, key, value in leaves(node, setting):
        if key.startswith("_") and key.endswith("_") and key != "_target_":
            raise ValueError(f"{where}={short(value)}: no such setting")


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _targets(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping with a `_target_` in nested containers, and where it is."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from _targets(value, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _targets(value, f"{where}[{index}]")


def class_of(node: Mapping[str, Any], setting: str) -> type | None:
    """Return the dataclass that a config node names; None where it names none.

    Raises:
        ValueError: a target that is no dataclass of this package.
    """
    return (
        _dataclass_of(str(node["_target_"]), f"{setting}._target_") if "_target_" in node else None
    )


def _dataclass_of(target: str, setting: str) -> type:
    """Return the dataclass that a target names, which must be one of `allowed_targets`."""
    moved = [t for t in allowed_targets() if t.rpartition(".")[2] == target.rpartition(".")[2]]
    refused = ValueError(
        f"{setting}={short(target)}: only targets of deltalab are allowed, and classes that an"
        " installed package names by an entry point of the group deltalab"
        + (f"; did you mean {moved[0]}?" if moved else "")
    )
    if target not in allowed_targets():
        raise refused
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"{setting}={target}: needs the package {error.name}") from None
    if not isinstance(found, type) or not is_dataclass(found) or found.__module__ != module:
        raise refused
    return found


def _check_type(setting: str, value: Any, hint: Any) -> None:
    """Raise `ValueError` where the value's type is not one that the hint names.

    Of containers the kind alone is checked; what is in them, the dataclass itself must check.
    """
    union = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in union]
    if Any in kinds or any(_allows(kind, value) for kind in kinds):
        return
    wanted = " or ".join(dict.fromkeys(_WANTED.get(kind, "a component") for kind in kinds))
    raise ValueError(f"{setting}={short(value)}: must be {wanted}")


def _allows(kind: Any, value: Any) -> bool:
    if kind in _SIMPLE or kind is NoneType:
        return type(value) is kind or (kind is float and type(value) is int)
    if kind in (list, tuple, Sequence):  # a mapping too, which a dataclass turns into pairs
        return isinstance(value, list | tuple) or (kind is tuple and isinstance(value, Mapping))
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, Mapping) and "_target_" in value


def leaves(node: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """Yield everything in nested containers: where it is, its key, and the value."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{where}.{key}", str(key), value
            yield from leaves(value, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield f"{where}[{index}]", "", value
            yield from leaves(value, f"{where}[{index}]")


def suggestion(message: str, known: Iterable[str]) -> str:
    """Return what to append to Hydra's complaint about a name: the nearest one there is.

    Args:
        message: the complaint in one line.
        known: all settings of the composed config, as `edit.p`.

    >>> suggestion("Could not override 'edit.pp'. Key 'pp' is not in struct", ["edit.p"])
    '; did you mean edit.p?'
    >>> suggestion("Could not override 'p'. Key 'p' is not in struct", ["edit", "edit.p"])
    '; did you mean edit.p?'
    >>> suggestion("Could not find 'edit/dre'. Available options in 'edit': dare, ties", [])
    '; did you mean edit=dare?'
    """
    if option := re.search(r"Could not find '([^']*)/([^'/]*)'.*? in '[^']*': (.*)", message):
        group, word, options = option.groups()
        return near(f"{group}={word}", (f"{group}={o.strip()}" for o in options.split(",")))
    if key := re.search(r"Could not override '([^']*)'", message):
        known = list(known)
        own = [name for name in known if name.endswith(f".{key[1]}")]
        return f"; did you mean {own[0]}?" if own else near(key[1], known)
    return ""


def names(node: Any, prefix: str = "") -> list[str]:
    """Return all settings of a config by dotted name.

    >>> names({"edit": {"p": 0.5}, "seed": 0})
    ['edit', 'edit.p', 'seed']
    """
    if not isinstance(node, Mapping):
        return []
    found = []
    for key, value in node.items():
        found += [f"{prefix}{key}", *names(value, f"{prefix}{key}.")]
    return found


def short(value: Any) -> str:
    """Return a value as a message shows it: its beginning."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
