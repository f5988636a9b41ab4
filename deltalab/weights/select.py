"""Which tensors an edit touches, judged by name and shape alone.

Nothing else is looked at, so that the same selection works on a live module and on the headers of
a checkpoint that is never held in memory. Whether a tensor is floating-point the caller checks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltalab.weights.mapping import part_of

PRESETS = ("all", "matrices", "linear", "proj", "no_embed")

_LAYER_WEIGHT = re.compile(r"(^|\.)(\w+_)?(weight|\w+_proj|w[123])$")
_TABLE = re.compile(
    r"(^|\.)(embed_tokens|embed_in|embed_out_ids|wte|wpe|tok_embeddings|shared|\w*embeddings?"
    r"|pos_embed\w*|relative_attention_bias|\w*bias_table)(\.weight)?$"
)

_NOT_LEARNED = re.compile(
    r"(^|[._])(running_mean|running_var|num_batches_tracked|position_ids|(original_)?inv_freq"
    r"|masked_bias|relative_position_index|(input|output)_(min|max))$"
)
"""Statistics of the data and tables that are computed: no parameters, though files hold them."""
_MASK = re.compile(r"(^|\.)attn(\.attention)?\.bias$")  # of four dimensions, unlike a bias


@dataclass(frozen=True)
class Selection:
    """A preset, narrowed by patterns.

    A tensor is selected if its preset selects it, its name matches one of `include` (where there
    are any) and none of `exclude`. Running statistics and computed tables are never selected: they
    stay those of the post-trained model, as their layers were fine-tuned beside them.

    Args:
        preset: `all` floating-point parameters; `matrices` of at least two dimensions, embeddings
            included; `linear`, the weights of linear and convolution layers; `proj`, linear weights
            inside attention and MLP blocks; `no_embed`, all but embeddings and head.
        include: regular expressions, searched for anywhere in the name.
        exclude: regular expressions, likewise.

    Raises:
        ValueError: an unknown preset or an invalid pattern.
    """

    preset: str = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"select={self.preset}: must be one of {', '.join(PRESETS)}")
        for field in ("include", "exclude"):
            patterns = getattr(self, field)
            object.__setattr__(
                self, field, (patterns,) if isinstance(patterns, str) else tuple(patterns)
            )
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"select.{field}={pattern}: {error}") from None


def check(select: "str | Mapping[str, Any] | Selection") -> Selection:
    """Return the selection that a setting means; a mistake in it is a `ValueError`.

    >>> check("linear") == check({"preset": "linear", "include": [], "exclude": []})
    True
    >>> check("nope")
    Traceback (most recent call last):
    ValueError: select=nope: must be one of all, matrices, linear, proj, no_embed
    """
    if isinstance(select, Selection):
        return select
    if isinstance(select, str):
        return Selection(select)
    if not isinstance(select, Mapping):
        raise ValueError(f"select={select}: must be one of {', '.join(PRESETS)}")
    if unknown := sorted(set(select) - {"preset", "include", "exclude"}):
        raise ValueError(f"select.{unknown[0]}: must be one of preset, include, exclude")
    return Selection(**select)


def selected(
    select: "str | Mapping[str, Any] | Selection", name: str, shape: tuple[int, ...]
) -> bool:
    """Return whether an edit with this selection touches the tensor of this name and shape.

    >>> selected("proj", "blocks.0.attn.qkv.weight", (12, 4))
    True
    >>> selected("proj", "head.weight", (10, 4)), selected("linear", "head.weight", (10, 4))
    (False, True)
    >>> selected("all", "bn1.running_var", (4,)), selected("all", "bn1.weight", (4,))
    (False, True)
    """
    if _NOT_LEARNED.search(name) or (len(shape) > 2 and _MASK.search(name)):
        return False
    chosen = check(select)
    if chosen.include and not any(re.search(p, name) for p in chosen.include):
        return False
    if any(re.search(p, name) for p in chosen.exclude):
        return False
    match chosen.preset:
        case "all":
            return True
        case "matrices":
            return len(shape) >= 2
        case "linear":
            return _linear(name, shape)
        case "proj":
            return _linear(name, shape) and part_of(name) in ("attention", "mlp")
        case _:
            return part_of(name) not in ("embedding", "head")


def _linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear or convolution layer, not an embedding table."""
    if len(shape) < 2 or not _LAYER_WEIGHT.search(name):
        return False
    return len(shape) >= 4 or not _TABLE.search(name)
