"""Where transformers would put the tensors of a file: its own renaming, joining and turning.

What `from_pretrained` does to names and tensors between a file and a module, transformers is asked
name by name here, so that a pair's edits see the tensors that its files have, and the live module
those that transformers would have loaded.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any
from weakref import proxy

import torch
from torch import Tensor, nn

from deltalab.weights.aligned import Found, same_names, unknown
from deltalab.weights.layouts import Group
from deltalab.weights.mapping import Checkpoint


def found(module: nn.Module, checkpoint: Checkpoint) -> Found:
    """Say where a checkpoint has a module's tensors, as transformers finds them.

    Args:
        module: a language model of transformers, its weights of no matter.
        checkpoint: a pre- or post-trained model of its architecture.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key
    from transformers.core_model_loading import rename_source_key as rename

    if not hasattr(module, "base_model_prefix"):
        return same_names(module, checkpoint)
    model: Any = module
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    plain: dict[str, tuple[str, ...]] = {}
    joined: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    left = []
    for name in sorted(checkpoint, key=dot_natural_key):
        made, pattern = rename(name, renamings, converters, prefix, state)
        if made not in state and name in state:
            made, pattern = rename(name, [], [], prefix, state)
        if made not in state:
            if unknown(model, (name,)) and unknown(model, (made,)):
                left.append(name)
        elif pattern is None:
            plain[made] = (*plain.get(made, ()), name)
        else:
            joined.setdefault(made, (by_pattern[pattern], []))[1].append((pattern, name))
    groups = [_group(model, checkpoint, first, *parts) for first, parts in joined.items()]
    return Found(plain, {group.makes[0]: group for group in groups}, tuple(left))


def _group(
    model: Any, checkpoint: Checkpoint, first: str, converter: Any, files: list[tuple[str, str]]
) -> Group:
    """Return the group of tensors that a converter makes one or more of the module's of.

    Args:
        model: the module.
        checkpoint: what holds the tensors, of which the shapes alone are asked.
        first: the module's name of the first tensor made.
        converter: transformers' own.
        files: every tensor's pattern and name, in the order in which they are collected.
    """
    owner = proxy(model)  # the module holds its layout

    def join(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        one = deepcopy(converter)
        for pattern, name in files:
            one.add_tensor(first, name, pattern, held[name])
        made = one.convert(first, model=owner, config=owner.config)
        return {name: _one(value) for name, value in made.items()}

    like = {name: torch.empty(checkpoint.shape(name), device="meta") for _, name in files}
    makes = tuple(join(like))
    order: dict[str, list[str]] = {}
    for pattern, name in files:
        order.setdefault(pattern, []).append(name)

    def split(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        back = converter.reverse_transform()
        parts: dict[str, Any] = {
            pattern: [held[name]] for pattern, name in zip(back.source_patterns, makes, strict=True)
        }
        for operation in back.operations:
            parts = operation.convert(
                parts,
                source_patterns=back.source_patterns,
                target_patterns=back.target_patterns,
                full_layer_name=first,
                model=owner,
                config=owner.config,
            )
        named = {}
        for pattern, target in zip(converter.source_patterns, back.target_patterns, strict=True):
            for number, name in enumerate(order.get(pattern, ())):
                key = target.replace("*", str(number)) if "*" in target else target
                named[name] = _one(parts[key])
        return named

    return Group(tuple(name for _, name in files), makes, join, split)


def _one(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
