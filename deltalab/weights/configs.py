"""Two `config.json` compared by what they mean, however their version of transformers spells it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltalab.weights.headers import plain

_OF_NO_EFFECT = {
    "_attn_implementation_autoset", "_commit_hash", "_model_name_or_path", "_name_or_path",
    "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "dtype",
    "embd_pdrop", "eos_token_id", "hidden_dropout", "id2label", "initializer_factor",
    "initializer_range", "label2id", "max_position_embeddings", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "resid_pdrop", "return_dict", "tie_word_embeddings", "torch_dtype",
    "torchscript", "transformers_version", "unk_token_id", "unsloth_version", "use_cache",
    "vocab_size",
}  # fmt: skip
"""Fields in which two models of one architecture may differ and compute the same."""
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def content(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty where there is none: others complain of damage."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(
    pre: Mapping[str, Any], post: Mapping[str, Any], complete: bool = False
) -> str | None:
    """Return the line to warn with where two configurations compute differently.

    Args:
        pre: what model.pre's `config.json` says, or all settings that transformers makes of it.
        post: likewise of model.post.
        complete: whether both have every default written out, so that what one lacks differs too.

    >>> differences({"rope_theta": 1e4, "vocab_size": 8}, {"rope_theta": 1e6, "vocab_size": 9})
    'config.json of model.pre and model.post differ in rope_theta: both run with that of model.post'
    >>> spelt = {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}
    >>> differences({"rope_theta": 1e4, "rope_scaling": None}, spelt) is None
    True
    """
    old, new = meaning(pre), meaning(post)
    both = old.keys() | new.keys() if complete else old.keys() & new.keys()
    found = sorted(name for name in both if old.get(name) != new.get(name))
    if not found:
        return None
    return (
        f"config.json of model.pre and model.post differ in {plain(', '.join(found)[:200])}: both"
        " run with that of model.post"
    )


def meaning(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide what a model computes, spelt one way.

    Rotary embeddings are `rope_theta` and `rope_scaling` in older files, `rope_parameters` in newer
    ones, by kind of layer where a model has several.

    >>> meaning({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}, "dtype": "x"})
    {'rope_theta': 10000.0, 'rope_type': 'linear', 'rope_parameters.factor': 2}
    """
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name in _OF_NO_EFFECT or name in _ROPE or value is None:
            continue
        found[name] = meaning(value) if isinstance(value, Mapping) else value
    parts = [content.get(name) for name in ("rope_scaling", "rope_parameters")]
    rope = {k: v for part in parts if isinstance(part, Mapping) for k, v in part.items()}
    theta = rope.pop("rope_theta", content.get("rope_theta"))
    kind = [rope.pop(name, None) for name in ("rope_type", "type")]
    if theta is not None:
        found["rope_theta"] = theta
    if theta is not None or rope or any(kind):
        found["rope_type"] = kind[0] or kind[1] or "default"
    return found | {f"rope_parameters.{name}": value for name, value in rope.items()}
