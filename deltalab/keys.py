"""What of a composed config decides a result: the key of its record and of every artefact.

A key is a digest of the options' names, their values and the contents that they name. A class is
known by its own name, never by its module, so that files may move. It says of itself, as literal
class variables that are read from the source (`deltalab.classes`):

* `version`: raised when a mended fault changes what it computes; only its own records are stale;
* `reads`: which of `READERS` stand beneath it, each with a version of its own;
* `beside`: fields that decide no result, such as a cache's place or the retries of a service;
* `contents`: fields whose content decides it, and of which of `KINDS` each is;
* `options`: fields that list options of a config group, by name or with settings.

A default counts as if it were written out, so that another default is another key. What is new
enters `NEUTRAL` with the value that does what was done before it, and leaves old keys alone.
Nothing here imports torch.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from deltalab.classes import described
from deltalab.data import folders
from deltalab.models import embedded, hub
from deltalab.settings import option_file
from deltalab.store import digests, pairs
from deltalab.weights import configs, contents, orientation

READERS = {
    "apply": 1, "checkpoint": 1, "images": 1, "lm_eval": 1, "passes": 1, "rng": 1, "rows": 1,
    "tokens": 1, "turned": 1,
}  # fmt: skip
"""Versions of what many classes share: a mended fault makes the records stale that used it."""
ALWAYS = ("apply", "passes", "rng")
"""Readers beneath every point."""
NEUTRAL: dict[str, Any] = {
    "model.dequantize": False,
    "riemann.dtype": None,
    "salt": "",
    "model.experts": None,
    "model.classes": None,
    "model.weights": None,
    "model.base": None,
    "edit.masks": None,
    "objective.data.classes": None,
    "evaluator.data.classes": None,
    "merge": None,
    "merge.spread": "model",
    "calibration": {
        "model": "post", "data": None, "objective": None, "sequential": False, "fisher": None,
    },
    "calibration.fisher": None,
    "peers": None,
    "values": "exact",
    "budget": None,
}  # fmt: skip
"""Settings that came later, each with the value that reproduces what was done without it."""
AFTER_FAMILIES = ("model.base", "model.weights", "peers", "calibration.fisher")
"""Those of them that came after families did, and are left out of what an expert is too."""
_OF_EXPERT = re.compile(r"^model\.experts\.[^.]+\.")
BESIDE = (
    "results", "artifacts", "artifacts_gb", "force", "plan", "tracker", "sweeps", "scale", "data",
    "draws", "label", "margin", "most_points", "device_tflops", "verify",
)  # fmt: skip
"""Settings that decide no result; `data` and `draws` do it through what is made of them."""


@dataclass(frozen=True)
class Choices:
    """Which option of a config group was chosen, by name.

    An option that does not come with deltalab is `package:name`, or `user:name` where it lies in a
    directory that the command line gives.
    """

    model: str
    edit: str
    objective: str
    experiment: str | None = None


class Unmade(Exception):
    """A content that opening the model makes, and that is not there yet."""


def salt_of(settings: Mapping[str, Any], choices: Choices) -> str:
    """Return what the random numbers are salted with beside seed and tensor name.

    Nothing with `draws=paired`: pairs with equal tensor names get equal masks, as for curves that
    are to be compared; the pair's label with `draws=independent`.

    Raises:
        ValueError: another value of `draws`.
    """
    draws = settings.get("draws", "paired")
    if draws not in ("paired", "independent"):
        raise ValueError(f"draws={draws}: must be one of paired, independent")
    return "" if draws == "paired" else str(settings.get("label") or choices.model)


def determinants(
    settings: Mapping[str, Any], choices: Choices, full: bool = False
) -> dict[str, Any]:
    """Return all that decides a point's result, ready for JSON.

    Args:
        settings: the composed config as plain containers.
        choices: the names of the chosen options.
        full: read contents again whose digests are remembered.

    Raises:
        FileNotFoundError: a model that is not there.
        ValueError: a damaged one, or a class that does not exist.
        Unmade: a content that only opening makes.
    """
    settings = {**settings, "salt": salt_of(settings, choices)}
    edit = dict(settings["edit"])
    select = edit.pop("select", None)
    found = {
        name: node(value, name, full)
        for name, value in {**settings, "edit": edit}.items()
        if name not in BESIDE and name != "select" and not _neutral(name, value)
    }
    return {
        "keys": 2,
        **found,
        "select": canonical(settings["select"] or select),
        "names": {kind: getattr(choices, kind) for kind in ("model", "edit", "objective")},
        "reads": {name: READERS[name] for name in _readers(settings["model"], edit)},
    }


def _readers(model: Mapping[str, Any], edit: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the readers beneath a point as such: of one more where its edit may see files turned.

    Nothing else of the point tells that the model has matrices stored (in, out), and the edit sees
    them as (out, in).
    """
    kind = described(edit["_target_"])
    blind = kind.get("unit", "") == "entry" or kind.get("axes", True) is False
    if blind or described(model["_target_"]).get("contents", {}).get("post") != "model":
        return ALWAYS
    for expert in (model.get("experts") or {}).values():
        return _readers(expert["model"], edit)  # all experts have their base's layout
    place = _described(model)
    content = configs.content((place if place.is_dir() else place.parent) / "config.json")
    return (*ALWAYS, "turned") if orientation.patterns(content) else ALWAYS


def pair_id(found: Mapping[str, Any]) -> str:
    """Return a digest of what decides how the unedited models score, as far as more than rounding.

    Points that have it in common were made of one pair and measured on the same contents.

    Args:
        found: a point's `determinants`; empty where they are not known.

    >>> small, large = ({"objective": {"class": "Answers", "limit": n}} for n in (64, 128))
    >>> pair_id(small) != pair_id(large), pair_id({})
    (True, '')
    """
    own = {name: found[name] for name in pairs.MEASURED if name in found}
    return digests.key_of({"measured": _lasting(own)})[:8] if own else ""


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: each for name, each in value.items() if name not in pairs.ROUNDING}
        return {name: _lasting(each) for name, each in kept.items()}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def canonical(value: Any) -> Any:
    """Return nested data with every number written one way.

    >>> canonical([0.1 + 0.2, 1.0, True, "1.0"])
    [0.3, 1, True, '1.0']
    """
    if isinstance(value, Mapping):
        return {str(key): canonical(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(each) for each in value]
    if isinstance(value, float) and abs(value) < 1e300:  # what is not finite stays what it is
        rounded = float(f"{value:.12g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded
    return value


def node(value: Any, where: str, full: bool) -> Any:
    """Return what decides results of one config node; `where` is its dotted place."""
    if isinstance(value, list | tuple):
        return [node(each, where, full) for each in value]
    if not isinstance(value, Mapping):
        return canonical(value)
    if "_target_" not in value:
        return {
            str(name): node(each, at, full)
            for name, each in value.items()
            if not _neutral(at := f"{where}.{name}", each)
        }
    kind = described(value["_target_"])
    given = {**kind.defaults, **{k: v for k, v in value.items() if k != "_target_"}}
    fields = {}
    for name, each in given.items():
        at = f"{where}.{name}"
        if name in kind.get("beside", ()) or _neutral(at, each):
            continue
        if name in (groups := kind.get("options", {})):
            fields[name] = [_option(groups[name], step, where, full) for step in each]
        elif name in (kinds := kind.get("contents", {})):
            fields[name] = KINDS[kinds[name]](each, at, given, full)
        else:
            fields[name] = node(each, at, full)
    reads = {name: READERS[name] for name in kind.get("reads", ())}
    return {"class": kind.name, "version": kind.get("version", 1), "reads": reads, **fields}


def _neutral(where: str, value: Any) -> bool:
    """Whether a setting is as if it were not there; of an expert those alone that came later."""
    if (own := _OF_EXPERT.sub("", where)) in AFTER_FAMILIES:
        where = own
    return where in NEUTRAL and bool(canonical(value) == canonical(NEUTRAL[where]))


def _option(group: str, step: Any, where: str, full: bool) -> Any:
    """Return an option of a group, given by name or as `{name: settings}`, with its defaults."""
    name: Any = step
    given: Mapping[str, Any] = {}
    if isinstance(step, Mapping) and len(step) == 1:
        name, given = next(iter(step.items()))
    file = option_file(group, str(name))
    if file is None:
        return canonical(step)  # building says what is wrong with it
    option: Any = OmegaConf.to_container(OmegaConf.load(file))
    settings = {**option, **(given or {})}
    settings.pop("select", None)
    return {"name": name, **node(settings, where, full)}


def _file(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    place = Path(value).expanduser() if isinstance(value, str) else None
    return digests.of_file(place, full) if place and place.is_file() else value


def _tree(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_tree(each, where, given, full) for each in value]
    place = Path(value).expanduser() if isinstance(value, str) else None
    if place is not None and place.is_dir():
        return contents.of_tree(place, full)
    return _file(value, where, given, full)


def _rows(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    if isinstance(value, str) and value.startswith("package:"):
        value = str(embedded.ZOO / value.removeprefix("package:"))
    return _tree(value, where, given, full)


def _images(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    """Of one split the files, and of all splits the classes' names, by which they are numbered."""
    root, split = Path(str(value)).expanduser(), given.get("split")
    place = root / str(split or "")
    if not place.is_dir():
        return _tree(value, where, given, full)
    files = contents.of_tree(place, full, folders.is_hidden)
    if split is None:
        return files
    return digests.key_of({"files": files, "classes": sorted(folders.of_all_splits(root))})


def _model(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    if value is None:
        return None
    return hub.identity(str(value), where, given.get(f"{where.rpartition('.')[2]}_revision"), full)


def _tokenizer(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    place = Path(value).expanduser() if isinstance(value, str) else None
    if place is None or not place.is_dir():
        return _model(value, where, given, full)
    return contents.of_paths(contents.beside(place), full)


def _described(model: Mapping[str, Any]) -> Path:
    """Return where the configuration of the tuned model is: of an adapter, beside its base."""
    place = hub.described(str(model["post"]), "model.post", model.get("post_revision"))
    if not contents.is_adapter(place):
        return place
    return hub.described(str(model["pre"]), "model.pre", model.get("pre_revision"))


def _dtype(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    """`auto` is the dtype that it stands for, whose key it shares."""
    if value != "auto":
        return value
    try:
        place = _described(given)
    except (OSError, ValueError):  # the model's own content says what is wrong with it
        return value
    return contents.dtype_of(place) or value


def _unpacked(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
    place = Path(str(value)).expanduser()
    if not place.is_dir():
        raise Unmade(f"{where}={value}")
    return contents.of_model(place, full)


def _packaged(files: Callable[[str], list[Path]]) -> Callable[..., Any]:
    def digest(value: Any, where: str, given: Mapping[str, Any], full: bool) -> Any:
        try:
            return contents.of_paths(files(str(value)), full)
        except (KeyError, FileNotFoundError):
            return value  # building says which there are

    return digest


KINDS: dict[str, Callable[..., Any]] = {
    "dtype": _dtype,
    "file": _file,
    "images": _images,
    "model": _model,
    "packaged images": _packaged(lambda task: [embedded.images(task)]),
    "packaged llm": _packaged(embedded.llm),
    "packaged vit": _packaged(embedded.vit),
    "rows": _rows,
    "tokenizer": _tokenizer,
    "tree": _tree,
    "unpacked": _unpacked,
}
"""How the content of a field is digested: from its value, its place in the config, the other fields
of its class, and whether to read again what is remembered. Each gives the value back where it names
nothing that lies here."""
