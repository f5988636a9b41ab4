"""Which matrices of a checkpoint are stored (in, out), where all others are (out, in).

transformers' `Conv1D` multiplies from the right, so files of GPT-2 and its kin have the weights of
their linear layers transposed. Edits that look at axes see every matrix as (out, in) all the same
(`deltalab.edits.turning`). Nothing here imports torch.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_CONV1D = r"(^|\.)(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)\.weight$"
TURNED = {
    "clvp": r"(^|\.)mlp\.(c_fc|c_proj)\.weight$",
    "decision_transformer": _CONV1D,
    "gpt2": _CONV1D,
    "imagegpt": _CONV1D,
    "openai-gpt": _CONV1D,
}
"""By the `model_type` of a configuration, what the names of such matrices match."""


def turned(content: Mapping[str, Any], further: Iterable[str] = ()) -> Callable[[str], bool]:
    """Return the function that says of a tensor's name whether it is a matrix stored (in, out).

    Args:
        content: what `config.json` says; a model of several parts says it of each.
        further: patterns of more such names, as for a module without a configuration.

    >>> found = turned({"model_type": "gpt2"})
    >>> found("transformer.h.0.attn.c_attn.weight"), found("transformer.wte.weight")
    (True, False)
    >>> turned({"model_type": "gpt_bigcode"})("transformer.h.0.attn.c_attn.weight")
    False
    """
    known = [*patterns(content), *further]
    return lambda name: any(re.search(pattern, name) for pattern in known)


def patterns(content: Mapping[str, Any]) -> list[str]:
    """Return what the names of matrices stored (in, out) match, nothing for most models.

    >>> patterns({"model_type": "llama"})
    []
    """
    parts = [content, *(part for part in content.values() if isinstance(part, Mapping))]
    kinds = [part.get("model_type") for part in parts]
    return [TURNED[kind] for kind in kinds if isinstance(kind, str) and kind in TURNED]
