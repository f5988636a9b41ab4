"""What a pair of models is called, and what sets two pairs, or two ways to measure one, apart.

Everything is told from the settings that a record holds, so that old records have it too.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from deltalab.store.fields import flatten, mapping

MEASURED = ("model", "objective", "evaluator", "nonfinite")
"""Settings that decide what the unedited models score."""
ROUNDING = ("device", "batch_size", "attn", "cache", "cache_dir")
"""Settings within them that decide no more than the last digits."""


def label(option: str, model: Any) -> str:
    """Return the name of a pair: its option's, with the checkpoint's where the option names none.

    Args:
        option: what was chosen as `model`.
        model: its settings, as the record holds them.

    >>> label("mnist_vit", {"post": "mnist"}), label("hf_llm", {"post": "Qwen/Qwen2-7B-Instruct/"})
    ('mnist_vit', 'hf_llm Qwen2-7B-Instruct')
    """
    post = model.get("post") if isinstance(model, Mapping) else None
    if not isinstance(post, str) or f"post: {post}" in _lines(option):
        return option
    return f"{option} {_stem(post)}"


@cache
def _lines(option: str) -> frozenset[str]:
    """Return the lines of an option's YAML, without comments; none for one from elsewhere."""
    if not option.isidentifier():  # a record of anyone's names it
        return frozenset()
    places = Path(__file__).parents[1:3]  # an installed package holds `conf`, a checkout beside it
    files = [place / "conf" / "model" / f"{option}.yaml" for place in places]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return frozenset(line.split("#")[0].strip() for text in texts for line in text.splitlines())


def data(config: Mapping[str, Any]) -> str | None:
    """Return the name of a point's data: the option's own, its path, its split.

    >>> data({"data": {"name": "gsm8k", "path": "openai/gsm8k", "split": "train"}})
    'gsm8k train'
    >>> data({"data": {"name": "images", "dir": "~/imagenette"}}), data({})
    ('images imagenette', None)
    """
    node = config.get("data")
    if not isinstance(node, Mapping):
        return None
    name = node.get("name")
    words = [str(name)] if name else []
    place = node.get("dir") or node.get("path")
    if isinstance(place, str) and _stem(place) != name:
        words.append(_stem(place))
    if isinstance(split := node.get("split"), str):
        words.append(split)
    return " ".join(words) or None


def evaluator(config: Mapping[str, Any]) -> str | None:
    """Return the name of a point's evaluator, from its class's.

    >>> evaluator({"evaluator": {"_target_": "deltalab.evaluators.lm_eval.LmEval"}})
    'lm_eval'
    >>> evaluator({"evaluator": None}), evaluator({})
    ('none', None)
    """
    node = config.get("evaluator")
    if not isinstance(node, Mapping) or "_target_" not in node:
        return "none" if "evaluator" in config else None
    name = str(node["_target_"]).rpartition(".")[2]
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).removeprefix("_")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide what the unedited models score, by flat names.

    >>> settings({"model": {"_target_": "deltalab.models.zoo.Vit", "device": "cpu"}, "seed": 0})
    {'model._target_': 'Vit'}
    """
    found: dict[str, Any] = {}
    for name, value in flatten({name: config[name] for name in MEASURED if name in config}):
        parts = name.split("/")
        if parts[-1] == "_target_":
            value = str(value).rpartition(".")[2]  # the class, wherever it lives
        if not set(parts) & set(ROUNDING):
            found[".".join(parts)] = value
    return found


def identity(config: Mapping[str, Any]) -> str:
    """Return a short digest of `settings`; empty where there are none.

    >>> small, large = ({"objective": {"limit": limit}} for limit in (64, 128))
    >>> identity(small) != identity(large), identity({})
    (True, '')
    """
    if not (found := settings(config)):
        return ""
    text = json.dumps(found, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def shared(config: Any) -> dict[str, Any]:
    """Return a record's settings, of which all records that agree in a part hold one copy."""
    nodes = mapping(config, "config") if isinstance(config, Mapping) else {}
    return {
        name: _once(json.dumps(node, sort_keys=True)) if isinstance(node, Mapping) else node
        for name, node in nodes.items()
    }


_known: dict[str, Any] = {}


def _once(text: str) -> Any:
    if len(_known) > 4096:
        _known.clear()
    if text not in _known:
        _known[text] = json.loads(text)
    return _known[text]


def _stem(place: str) -> str:
    """Return what a checkpoint or data set is called, from its path or id.

    >>> _stem("org/Model-7B"), _stem("~/runs/tuned.safetensors"), _stem("/")
    ('Model-7B', 'tuned', '/')
    """
    name = PurePath(place).name
    for ending in (".safetensors", ".json", ".jsonl"):
        name = name.removesuffix(ending)
    return name or place
