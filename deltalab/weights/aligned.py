"""Two checkpoints under the names of one architecture; tied tensors once, whatever was saved."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.weights.headers import plain
from deltalab.weights.mapping import Checkpoint, LazyWeights, Meta, Weights, cast, part_of

MISMATCH = ("error", "keep_post")
_FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")
"""Tables that older versions saved and every version computes: no parameters."""


class Aligned(LazyWeights):
    """Weights that list a tied tensor once and give it under each of its saved names.

    Args:
        saved: every name listed, with all names under which the checkpoint has the tensor.
        load: as for `LazyWeights`, called with the name listed.
        meta: likewise.

    >>> one = Meta((1,), torch.float32)
    >>> tied = Aligned({"table": ("table", "head")}, lambda name: torch.ones(1), lambda name: one)
    >>> list(tied), tied["head"], saved_names(tied, "table")
    (['table'], tensor([1.]), ('table', 'head'))
    """

    def __init__(
        self,
        saved: Mapping[str, tuple[str, ...]],
        load: Callable[[str], Tensor],
        meta: Callable[[str], Meta],
    ) -> None:
        super().__init__(saved, load, meta)
        self.saved = saved
        self._listed = {alias: name for name, aliases in saved.items() for alias in aliases}

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(self._listed.get(name, name))

    def meta(self, name: str) -> Meta:
        """Return a tensor's shape and dtype, by any of its names."""
        return super().meta(self._listed.get(name, name))

    def __contains__(self, name: object) -> bool:
        return name in self._listed or super().__contains__(name)


def saved_names(weights: Weights, name: str) -> tuple[str, ...]:
    """Return all names under which a tensor was saved, the one that is listed first."""
    return weights.saved[name] if isinstance(weights, Aligned) else (name,)


@dataclass(frozen=True, eq=False)
class Side:
    """One checkpoint of a pair.

    Attributes:
        checkpoint: its tensors.
        setting: how messages call it, as `model.pre`.
        names: all names that it has for each of the architecture's tensors, by its first name.
    """

    checkpoint: Checkpoint
    setting: str
    names: dict[str, tuple[str, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return self.checkpoint.shape(self.names[name][0])


def matched(module: nn.Module, checkpoint: Checkpoint, setting: str) -> Side:
    """Find every tensor of a module in a checkpoint.

    Raises:
        ValueError: a tensor is missing, is none of the architecture's, or was saved under two
            names, tied in the architecture, with two values.
    """
    known: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        known.setdefault(id(tensor), []).append(name)
    found, others = {}, _others(module, checkpoint)
    for names in known.values():
        saved = tuple(name for name in names if name in checkpoint)
        if not saved:
            raise ValueError(
                f"{setting}: tensor {names[0]!r} is missing, which the architecture of its"
                f" config.json has{_hint(others)}"
            )
        for other in saved[1:]:
            if not torch.equal(checkpoint[saved[0]], checkpoint[other]):
                raise ValueError(
                    f"{setting}: {saved[0]!r} and {other!r} are one tensor by config.json"
                    " (tie_word_embeddings) but differ in the files; set it to false there if they"
                    " are two"
                )
        found[names[0]] = saved
    if others:
        raise ValueError(
            f"{setting}: tensor {_quoted(others[0])} is none of the architecture of config.json"
        )
    return Side(checkpoint, setting, found)


def _others(module: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Return the tensors that are none of the module's, nor such as every version may ignore."""
    state = module.state_dict()
    ignored = (*_FORMER_BUFFERS, *(getattr(module, "_keys_to_ignore_on_load_unexpected", ()) or ()))
    left = [name for name in checkpoint if name not in state]
    return [name for name in left if not any(re.search(pattern, name) for pattern in ignored)]


def _hint(others: list[str]) -> str:
    if not others:
        return ""
    return (
        f", while {_quoted(others[0])} is none of it; where transformers renames or joins tensors"
        " on loading, deltalab-apply can edit them, the live model cannot"
    )


def _quoted(name: str) -> str:
    return repr(plain(name[:100]))


def paired(pre: Side, post: Side, mismatch: str, dtype: torch.dtype) -> tuple[Aligned, Aligned]:
    """Return both sides under the post-trained model's names, in the dtype evaluated.

    Args:
        pre: the pre-trained checkpoint.
        post: the post-trained checkpoint.
        mismatch: what to do where the vocabularies differ: "error", or "keep_post" to leave such
            tensors out, so that no edit touches them.
        dtype: of the floating-point tensors.

    Raises:
        ValueError: shapes differ and `mismatch` does not allow it.
    """
    if mismatch not in MISMATCH:
        raise ValueError(f"model.mismatch={mismatch}: must be one of {', '.join(MISMATCH)}")
    kept = [name for name in post.names if not _fits(pre, post, name, mismatch)]
    names = {name: saved for name, saved in post.names.items() if name not in kept}
    listed = {saved[0]: saved for saved in names.values()}
    origin = {saved[0]: pre.names[name][0] for name, saved in names.items()}
    old, new = cast(pre.checkpoint, dtype), cast(post.checkpoint, dtype)
    return (
        Aligned(listed, lambda name: old[origin[name]], lambda name: old.meta(origin[name])),
        Aligned(listed, new.__getitem__, new.meta),
    )


def _fits(pre: Side, post: Side, name: str, mismatch: str) -> bool:
    """Whether a tensor can be edited; an error if it cannot and that is not allowed."""
    old, new = pre.shape(name), post.shape(name)
    if old == new:
        return True
    vocabulary = part_of(name) in ("embedding", "head") and old[1:] == new[1:]
    if not vocabulary:
        raise ValueError(
            f"tensor {name!r}: shape {old} in the pre-trained model, {new} in the post-trained"
        )
    if mismatch == "error":
        raise ValueError(
            f"tensor {name!r}: a vocabulary of {old[0]} rows in the pre-trained model, of {new[0]}"
            " in the post-trained; model.mismatch=keep_post leaves it as the post-trained has it"
        )
    return False


def fill(module: nn.Module, side: Side) -> None:
    """Copy a checkpoint into a module, each tensor once.

    Raises:
        ValueError: a shape is not the architecture's.
    """
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in side.names:
            if side.shape(name) != tuple(state[name].shape):
                raise ValueError(
                    f"{side.setting}: tensor {name!r} has shape {side.shape(name)}, the"
                    f" architecture of config.json {tuple(state[name].shape)}"
                )
            state[name].copy_(side.checkpoint[side.names[name][0]])
