"""What settings name by option inside their value: experts, peers, data to calibrate on.

    model.experts={a: DIR, b: {post: DIR, data: gsm8k, objective: answers, evaluator: null}}
    calibration={data: {questions: {path: FILE}}, fisher: {model: pre, data: OPTION}}
    peers={unaligned: DIR}

An option is a name, or `{name: settings}`. Each expert becomes the settings of a pair of its own:
model, data, objective, evaluator and calibration as they would be composed for it alone; what it
does not name is that of the point. Each peer becomes the settings of the point's model, with itself
for post-trained model. Everything after this works on plain settings.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deltalab.settings import conf_dir, near, option_file, short

GROUPS = ("data", "objective", "evaluator")
"""What an expert may have of its own, beside fields of its model."""
OWN = ("model", *GROUPS, "calibration", "peers")
"""The settings of a point that are an expert's own."""
STATISTICS = ("model", "data", "objective")
"""What says on whose layers and which data a statistic is taken."""


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain containers, with the options that it names in place.

    Of a family `model.experts` holds every expert's settings, and the point has no data, objective,
    evaluator and post-trained model beside them.

    Raises:
        ValueError: an option or a setting of an expert that does not exist, or no experts.
        OmegaConfBaseException: a value that is missing.
    """
    given = OmegaConf.select(cfg, "model.experts")
    own = _copy(cfg)
    if given is not None:
        experts: Any = _contained(given)
        own.model.experts = _each(cfg, experts, _expert)
        _emptied(own, experts)
    elif "experts" in own.model:
        del own.model["experts"]
    if given is None:
        _spelt(own)
    elif "peers" in own:
        del own["peers"]
    found: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    return dict(found)


def member(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of one expert's pair within those of a family."""
    return {**settings, "merge": None, **settings["model"]["experts"][name]}


def experts_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a family's experts, in order; none of a pair.

    >>> experts_of({"model": {"post": "a"}}), experts_of({"model": {"experts": {"b": {}}}})
    ((), ('b',))
    """
    model = settings.get("model")
    found = model.get("experts") if isinstance(model, Mapping) else None
    return tuple(map(str, found or ()))


def _copy(cfg: DictConfig) -> DictConfig:
    own = copy.deepcopy(cfg)
    OmegaConf.set_readonly(own, False)
    OmegaConf.set_struct(own, False)
    return own


def _each(
    cfg: DictConfig, experts: Any, settings: Callable[[DictConfig, str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return settings of every expert, made of the config of its pair."""
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError(
            f"model.experts={short(experts)}: must name experts, as {{a: PATH, b: PATH}}"
        )
    if not OmegaConf.is_missing(cfg.model, "post") and cfg.model.get("post") is not None:
        raise ValueError(
            f"model.post={cfg.model.post}: a family has model.experts in its place, give one of the"
            " two"
        )
    found = {}
    for name, given in experts.items():
        if not str(name).replace("-", "_").isidentifier():
            raise ValueError(f"model.experts: {name!r} is no name of an expert: letters, digits, _")
        where = f"model.experts.{name}"
        found[str(name)] = settings(_alone(cfg, given, where), where)
    return found


def models(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of the model of every expert of a family alone; none of a pair.

    Raises:
        ValueError: as `plain`.
    """
    experts: Any = _contained(OmegaConf.select(cfg, "model.experts"))
    if experts is None:
        return {}
    return _each(cfg, experts, lambda own, where: dict(_contained(own.model)))


def _alone(cfg: DictConfig, given: Any, where: str) -> DictConfig:
    """Return the config of one expert's pair, as it would be composed for it alone."""
    about = {"post": given} if isinstance(given, str) else given
    if not isinstance(about, Mapping) or not isinstance(about.get("post"), str):
        raise ValueError(f"{where}={short(given)}: must be a path or id, or {{post: PATH, ...}}")
    own = _copy(cfg)
    del own.model["experts"]
    for key, value in about.items():
        if key in GROUPS:
            own[key] = _option(own, key, value, f"{where}.{key}")
        elif key in list(own.model):  # of a mapping that is asked itself, what is missing is none
            own.model[key] = value
        else:
            known = [*(str(each) for each in own.model if each != "_target_"), *GROUPS]
            raise ValueError(
                f"{where}.{key}: no such setting{near(str(key), known)}; an expert has"
                f" {', '.join(known)}"
            )
    return own


def _expert(own: DictConfig, where: str) -> dict[str, Any]:
    """Return one expert's settings, given the config of its pair."""
    _spelt(own)
    found = {}
    for name in OWN:
        if name in own:
            node = own[name]
            kept = name != "data"  # what of it is used is in the objective and the evaluator
            found[name] = _contained(node, throw_on_missing=kept)
    return found


def _contained(node: Any, throw_on_missing: bool = False) -> Any:
    """Return a node as plain containers, what is none as it is."""
    if not OmegaConf.is_config(node):
        return node
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=throw_on_missing)


def _emptied(own: DictConfig, experts: Mapping[str, Any]) -> None:
    """Take out of a family's settings what its experts have each by itself."""
    own.model.post = None
    for key in list(own.model):
        if OmegaConf.is_missing(own.model, key) and all(
            isinstance(each, Mapping) and key in each for each in experts.values()
        ):
            own.model[key] = None
    for group in GROUPS:
        own[group] = None
    if "calibration" in own:
        del own["calibration"]


def _spelt(own: DictConfig) -> None:
    """Put in place what calibration and peers of a pair name."""
    if OmegaConf.is_dict(own.get("calibration")):
        own.calibration = _calibration(own)
    if own.get("peers") is not None:
        own.peers = _peers(own)


def _calibration(own: DictConfig) -> Any:
    """Return the settings of a calibration, with the objectives that its data make."""
    found = _calibrated(own, own.calibration, "calibration", (*STATISTICS, "sequential", "fisher"))
    if (apart := own.calibration.get("fisher")) is not None:
        if not OmegaConf.is_dict(apart):
            raise ValueError(
                f"calibration.fisher={short(apart)}: must be null, or {{model: pre, data: OPTION}}"
            )
        found["fisher"] = _calibrated(own, apart, "calibration.fisher", STATISTICS)
    return found


def _calibrated(own: DictConfig, node: DictConfig, where: str, known: tuple[str, ...]) -> Any:
    for key in map(str, node):
        if key not in known:
            raise ValueError(f"{where}.{key}: no such setting{near(key, known)}")
    found = _contained(node)
    if node.get("data") is None and node.get("objective") is None:
        return found
    apart = _copy(own)
    for group in ("data", "objective"):
        if (given := node.get(group)) is not None:
            apart[group] = _option(apart, group, _contained(given), f"{where}.{group}")
    made = _contained(apart.objective, throw_on_missing=True)
    return {**found, "data": None, "objective": made}


def _peers(own: DictConfig) -> dict[str, Any]:
    """Return the settings of every peer's model, of the same base as the point's."""
    given: Any = _contained(own.peers)
    if not isinstance(given, Mapping) or not all(isinstance(p, str) for p in given.values()):
        raise ValueError(f"peers={short(given)}: must be null, or name models, as {{a: PATH}}")
    model = _contained(own.model, throw_on_missing=True)
    alone = {key: None if key == "post_revision" else value for key, value in model.items()}
    return {name: {**alone, "post": place} for name, place in given.items()}


def _is_of(now: DictConfig, group: str, name: str, option: DictConfig) -> bool:
    """Whether a composed node was made of an option: of those of its class none is nearer to it.

    Args:
        now: the node.
        group: of the option.
        name: of the option.
        option: its file's content; another may have the same class (`answers` and `refusals`).
    """
    if now.get("_target_", "") != option.get("_target_"):
        return False

    composed = _written(now)

    def alike(other: Any) -> int:
        return sum(composed.get(key) == value for key, value in _written(other).items())

    files = sorted((conf_dir() / group).glob("*.yaml"))
    others: list[Any] = [OmegaConf.load(file) for file in files if file.stem != name]
    same = [each for each in others if each.get("_target_") == option.get("_target_")]
    return all(alike(option) > alike(each) for each in same)


def _written(node: Any) -> dict[str, Any]:
    """Return a node as plain containers, references to other settings as they are written."""
    found: Any = OmegaConf.to_container(node, resolve=False)
    return dict(found)


def _option(own: DictConfig, group: str, given: Any, where: str) -> Any:
    """Return the node of an option, given by name or as `{name: settings}`.

    Raises:
        ValueError: no such option or setting.
    """
    if given is None:
        return None
    name: Any = given
    changes: Mapping[str, Any] = {}
    if isinstance(given, Mapping):
        if len(given) != 1:
            raise ValueError(f"{where}={short(given)}: must be an option, or {{option: settings}}")
        name, changes = next(iter(given.items()))
    file = option_file(group, str(name))
    if file is None:
        known = sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))
        raise ValueError(
            f"{where}={short(name)}: must be one of {', '.join(known)}{near(str(name), known)}"
        )
    node: Any = OmegaConf.load(file)
    node.pop("defaults", None)
    now = own.get(group)
    if OmegaConf.is_dict(now) and _is_of(now, group, str(name), node):
        node = _copy(now)  # with the tasks, or the judge, that were composed for it
    for key, value in (changes or {}).items():
        if key not in list(node):
            known = [str(each) for each in node if each != "_target_"]
            raise ValueError(f"{where}.{name}.{key}: no such setting{near(str(key), known)}")
        node[key] = value
    return node
