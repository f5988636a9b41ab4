"""Two checkpoints under the names of one architecture; tied tensors once, whatever was saved."""

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.weights.headers import plain
from deltalab.weights.layouts import Group, Layout, renamed
from deltalab.weights.mapping import Checkpoint, LazyWeights, Meta, Weights, part_of

MISMATCH = ("error", "keep_post")
_FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")
"""Tables that older versions saved and every version computes: no parameters."""


class Aligned(LazyWeights):
    """Weights that list a tied tensor once and give it under each of its saved names.

    Args:
        saved: every name listed, with all names under which the checkpoint has the tensor.
        load: as for `LazyWeights`, called with the name listed.
        meta: likewise.
        buffers: the names listed that are no parameters, such as a router's correction: they belong
            to either model, and no edit applies to them.

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
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(saved, load, meta)
        self.saved = saved
        self.buffers = buffers
        self._listed = {alias: name for name, aliases in saved.items() for alias in aliases}

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(self._listed.get(name, name))

    def meta(self, name: str) -> Meta:
        """Return a tensor's shape and dtype, by any of its names."""
        return super().meta(self._listed.get(name, name))

    def __contains__(self, name: object) -> bool:
        return name in self._listed or super().__contains__(name)

    def loading(self, load: Callable[[str], Tensor]) -> "Aligned":
        """Return weights of the same names, tied and fixed alike, computed otherwise."""
        return Aligned(self.saved, load, self._meta, self.buffers)


def saved_names(weights: Weights, name: str) -> tuple[str, ...]:
    """Return all names under which a tensor was saved, the one that is listed first."""
    return weights.saved[name] if isinstance(weights, Aligned) else (name,)


def is_parameter(weights: Weights, name: str) -> bool:
    """Whether a tensor is a parameter as far as the weights say, and no buffer of a module."""
    return not (isinstance(weights, Aligned) and name in weights.buffers)


@dataclass(frozen=True, eq=False)
class Found:
    """Where a module's tensors are in a file.

    Attributes:
        plain: the file's names of every tensor of the module that it has as it is.
        groups: the tensors that are others in the file, by the first of the module's names.
        others: what the file has beside.
    """

    plain: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, Group]
    others: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Side:
    """One checkpoint of a pair.

    Attributes:
        checkpoint: its tensors.
        setting: how messages call it, as `model.pre`.
        names: all names that it has for each of the architecture's tensors, by its first name.
        groups: the tensors that the architecture has in another form, by its first name.
        renamed: those that it has under another name: the file's, and its own.
    """

    checkpoint: Checkpoint
    setting: str
    names: dict[str, tuple[str, ...]]
    groups: Mapping[str, Group]
    renamed: Mapping[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return self.checkpoint.shape(self.names[name][0])

    def layout(self, module: nn.Module) -> Layout:
        """Return how this file's tensors make the module's."""
        groups = [*(renamed(*names) for names in self.renamed.items()), *self.groups.values()]
        shapes = {n: self.checkpoint.shape(n) for group in groups for n in group.files}
        return Layout(groups, shapes, {n: tuple(t.shape) for n, t in module.state_dict().items()})


def matched(
    module: nn.Module,
    checkpoint: Checkpoint,
    setting: str,
    find: Callable[[nn.Module, Checkpoint], Found],
    untied: bool = False,
) -> Side:
    """Find every tensor of a module in a checkpoint.

    Args:
        module: the module, of the post-trained model's architecture.
        checkpoint: a pre- or post-trained checkpoint.
        setting: how messages call it.
        find: says where the checkpoint has the module's tensors.
        untied: whether the head may be the embedding, as in a base that ties the two.

    Raises:
        ValueError: a tensor is missing, is none of the architecture's, or was saved under two
            names, tied in the architecture, with two values.
    """
    where = find(module, checkpoint)
    made = {name for group in where.groups.values() for name in group.makes}
    known: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        known.setdefault(id(tensor), []).append(name)
    heads = _heads(module) if untied else {}
    found, other_names = {}, {}
    for names in known.values():
        if made.intersection(names):
            continue
        saved = tuple(file for name in names for file in where.plain.get(name, ()))
        if not saved and names[0] in heads:
            saved = where.plain.get(heads[names[0]], ())
        if not saved:
            raise ValueError(
                f"{setting}: tensor {names[0]!r} is missing, which the architecture of"
                f" {'its' if setting == 'model.post' else 'the post-trained'} config.json has"
                f"{_hint(where.others)}"
            )
        for other in saved[1:]:
            if not torch.equal(checkpoint[saved[0]], checkpoint[other]):
                raise ValueError(
                    f"{setting}: {saved[0]!r} and {other!r} are one tensor by config.json"
                    " (tie_word_embeddings) but differ in the files; set it to false there if they"
                    " are two"
                )
        found[names[0]] = saved
        if saved[0] not in names:
            other_names[saved[0]] = names[0]
    if where.others:
        raise ValueError(
            f"{setting}: tensor {_quoted(where.others[0])} is none of the architecture of"
            f" {'' if setting == 'model.post' else 'the post-trained '}config.json"
        )
    return Side(checkpoint, setting, found, where.groups, other_names)


def _heads(module: Any) -> dict[str, str]:
    """Return the name of the module's head and that of its embedding, which a base may tie."""
    parts = [getattr(module, f"get_{side}put_embeddings", lambda: None)() for side in ("out", "in")]
    weights = [getattr(part, "weight", None) for part in parts]
    names = {id(p): name for name, p in module.state_dict(keep_vars=True).items()}
    found = [names[id(weight)] for weight in weights if id(weight) in names]
    return {found[0]: found[1]} if len(set(found)) == 2 else {}


def same_names(module: nn.Module, checkpoint: Checkpoint) -> Found:
    """Say where a checkpoint has a module's tensors that has them under their own names."""
    state = module.state_dict()
    left = unknown(module, (name for name in checkpoint if name not in state))
    return Found({name: (name,) for name in checkpoint if name in state}, {}, left)


def unknown(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the names that no version of a module's class may ignore."""
    ignored = (*_FORMER_BUFFERS, *(getattr(module, "_keys_to_ignore_on_load_unexpected", ()) or ()))
    return tuple(n for n in names if not any(re.search(pattern, n) for pattern in ignored))


def _hint(others: Sequence[str]) -> str:
    return f", while {_quoted(others[0])} is none of it" if others else ""


def _quoted(name: str) -> str:
    return repr(plain(name[:100]))


def paired(
    pre: Side, post: Side, mismatch: str, dtypes: Mapping[str, torch.dtype], buffers: Container[str]
) -> tuple[Aligned, Aligned]:
    """Return both sides under the post-trained model's names, in the dtype evaluated.

    Args:
        pre: the pre-trained checkpoint.
        post: the post-trained checkpoint.
        mismatch: what to do where the vocabularies differ: "error", or "keep_post" to leave such
            tensors out, so that no edit touches them.
        dtypes: of the module's tensors, by its names.
        buffers: those of them that are no parameters.

    Raises:
        ValueError: shapes differ and `mismatch` does not allow it.
    """
    if mismatch not in MISMATCH:
        raise ValueError(f"model.mismatch={mismatch}: must be one of {', '.join(MISMATCH)}")
    kept = [name for name in post.names if not _fits(pre, post, name, mismatch)]
    names = {name: saved for name, saved in post.names.items() if name not in kept}
    listed = {saved[0]: saved for saved in names.values()}
    origin = {saved[0]: pre.names[name][0] for name, saved in names.items()}
    kinds = {saved[0]: dtypes[name] for name, saved in names.items()}
    for name, group in post.groups.items():
        other = _counterpart(pre, post, name, group)
        listed |= {file: (file,) for file in group.files}
        origin |= dict(zip(group.files, other.files, strict=True))
        kinds |= dict.fromkeys(group.files, dtypes[name])
    fixed = frozenset(saved[0] for name, saved in names.items() if name in buffers)
    return (
        _evaluated(pre.checkpoint, listed, origin, kinds, fixed),
        _evaluated(post.checkpoint, listed, {name: name for name in listed}, kinds, fixed),
    )


def _evaluated(
    held: Checkpoint,
    listed: Mapping[str, tuple[str, ...]],
    origin: Mapping[str, str],
    kinds: Mapping[str, torch.dtype],
    fixed: frozenset[str],
) -> Aligned:
    """Return a checkpoint's tensors under names of the pair, in the dtypes evaluated."""

    def told(name: str) -> Meta:
        own = held.meta(origin[name])
        return replace(own, dtype=kinds[name]) if own.floating else own

    return Aligned(listed, lambda name: held[origin[name]].to(told(name).dtype), told, fixed)


def _counterpart(pre: Side, post: Side, name: str, group: Group) -> Group:
    """Return the pre-trained model's tensors that correspond, one by one, to those of a group."""
    other = pre.groups.get(name)
    if other is None or len(other.files) != len(group.files):
        has = ", ".join(map(_quoted, (other.files if other else pre.names.get(name, (name,)))[:2]))
        raise ValueError(
            f"tensor {name!r}: made of {_quoted(group.files[0])} and others in the post-trained"
            f" model, of {has} in the pre-trained: save both in one layout"
        )
    for old, new in zip(other.files, group.files, strict=True):
        one, two = pre.checkpoint.shape(old), post.checkpoint.shape(new)
        if one != two:
            raise ValueError(
                f"tensor {_quoted(new)}: shape {one} in the pre-trained model, {two} in the"
                " post-trained"
            )
    return other


def _fits(pre: Side, post: Side, name: str, mismatch: str) -> bool:
    """Whether a tensor can be edited; an error if it cannot and that is not allowed."""
    if name not in pre.names:
        raise ValueError(
            f"tensor {name!r}: made of {_quoted(pre.groups[name].files[0])} and others in the"
            f" pre-trained model, one in the post-trained: save both in one layout"
        )
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
    files = [name for group in side.groups.values() for name in group.files]
    read = LazyWeights(files, side.checkpoint.__getitem__, side.checkpoint.meta)
    joined = side.layout(module).live(read)
    with torch.no_grad():
        for name, saved in side.names.items():
            _check_shape(side, name, side.shape(name), state[name])
            state[name].copy_(side.checkpoint[saved[0]])
        for group in side.groups.values():
            for name in group.makes:
                value = joined[name]
                _check_shape(side, name, tuple(value.shape), state[name])
                state[name].copy_(value)


def _check_shape(side: Side, name: str, shape: tuple[int, ...], target: Tensor) -> None:
    if shape != tuple(target.shape):
        raise ValueError(
            f"{side.setting}: tensor {name!r} has shape {shape}, the architecture of config.json"
            f" {tuple(target.shape)}"
        )
