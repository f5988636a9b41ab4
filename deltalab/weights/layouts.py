"""How the tensors of a file make those of a live module, where the two differ.

Files of the hub name tensors as their publisher did, without a prefix or by other words, and hold
every expert's matrices by themselves, where the live module has one tensor of all. Edits act on the
tensors that a file has; losses, gradients and terms are of the module's.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.weights.mapping import LAYOUT, LazyWeights, Meta, Weights, meta

Shapes = Mapping[str, tuple[int, ...]]
Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors of a file that make tensors of a module together, entry by entry in another order.

    Attributes:
        files: the file's names.
        makes: the module's names.
        join: makes the module's tensors of the file's.
        split: takes them apart again.
    """

    files: tuple[str, ...]
    makes: tuple[str, ...]
    join: Convert = field(repr=False)
    split: Convert = field(repr=False)


def renamed(file: str, module: str) -> Group:
    """Return the group of a tensor that has another name and is the same.

    >>> renamed("wte.weight", "transformer.wte.weight").join({"wte.weight": torch.ones(1)})
    {'transformer.wte.weight': tensor([1.])}
    """
    return Group(
        (file,), (module,), lambda held: {module: held[file]}, lambda held: {file: held[module]}
    )


class Layout:
    """The groups of a pair; tensors in none are the same under the same name.

    Args:
        groups: no two of which share a name.
        filed: shape of every tensor of the file that is in a group.
        made: shape of every tensor of the module.
    """

    def __init__(self, groups: Iterable[Group], filed: Shapes, made: Shapes) -> None:
        self.groups = tuple(groups)
        self._shapes = filed
        self._made = made
        self._of_file = {name: group for group in self.groups for name in group.files}
        self._of_module = {name: group for group in self.groups for name in group.makes}
        self._other = self._of_file.keys() - self._of_module.keys()

    def live(self, weights: Weights, rest: Weights | None = None) -> Weights:
        """Return weights under the module's names.

        Args:
            weights: under the file's names, or the module's, as which they are returned.
            rest: what the other members of a group are where `weights` has some of them alone;
                zero where None, as for a shift.
        """
        if self._other.isdisjoint(weights):
            return weights
        names = dict.fromkeys(
            made
            for name in weights
            for made in (self._of_file[name].makes if name in self._of_file else (name,))
        )
        last: dict[int, dict[str, Tensor]] = {}  # of a group that makes several, the one at hand

        def load(name: str) -> Tensor:
            if name not in self._of_module:
                return weights[name]
            group = self._of_module[name]
            if id(group) not in last:
                last.clear()
                last[id(group)] = _join(group, self._members(group, weights, rest))
            made = last[id(group)]
            found = made.pop(name)
            if not made:
                last.clear()
            return found

        def told(name: str) -> Meta:
            if name not in self._of_module:
                return meta(weights, name)
            member = next(file for file in self._of_module[name].files if file in weights)
            return Meta(self._made[name], meta(weights, member).dtype)

        return LazyWeights(names, load, told)

    def _members(self, group: Group, weights: Weights, rest: Weights | None) -> dict[str, Tensor]:
        found = {name: weights[name] for name in group.files if name in weights}
        like = next(iter(found.values()))
        for name in group.files:
            if name not in found:
                zero = torch.zeros(self._shapes[name], dtype=like.dtype, device=like.device)
                found[name] = zero if rest is None else rest[name].to(like.device)
        return {name: found[name] for name in group.files}

    def filed(self, weights: Weights) -> Weights:
        """Return tensors of the module, such as its gradient, under the file's names."""
        if not self.groups:
            return weights
        names = dict.fromkeys(
            file
            for name in weights
            for file in (self._of_module[name].files if name in self._of_module else (name,))
        )
        last: dict[int, dict[str, Tensor]] = {}

        def load(name: str) -> Tensor:
            if name not in self._of_file:
                return weights[name]
            group = self._of_file[name]
            if id(group) not in last:
                last.clear()
                last[id(group)] = group.split({made: weights[made] for made in group.makes})
            return last[id(group)][name]

        def told(name: str) -> Meta:
            if name not in self._of_file:
                return meta(weights, name)
            return Meta(self._shapes[name], meta(weights, self._of_file[name].makes[0]).dtype)

        return LazyWeights(names, load, told)

    def of_layers(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is known of layers by the module's names of their weights, by the file's.

        Such as the mean input: layers that are one in a file, or several, have one input.
        """
        named = {name: value for name, value in found.items() if name not in self._of_module}
        for group in self.groups:
            if all(name in found for name in group.makes):
                named |= dict.fromkeys(group.files, found[group.makes[0]])
        return named


class _Joined(torch.autograd.Function):
    """Joining as an operation with a gradient: taking apart is its transpose."""

    @staticmethod
    def forward(context: Any, group: Group, *files: Tensor) -> tuple[Tensor, ...]:
        context.group = group
        made = group.join(dict(zip(group.files, files, strict=True)))
        return tuple(made[name] for name in group.makes)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group = context.group
        parts = group.split(dict(zip(group.makes, gradients, strict=True)))
        return (None, *(parts[name] for name in group.files))


def _join(group: Group, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not any(tensor.requires_grad for tensor in held.values()):
        return group.join(held)
    made = _Joined.apply(group, *(held[name] for name in group.files))
    return dict(zip(group.makes, made, strict=True))


SAME = Layout((), {}, {})
"""Of a module whose names and tensors are the file's."""


def layout_of(module: nn.Module) -> Layout:
    """Return how a live module's tensors come from those of its pair's files.

    >>> layout_of(nn.Linear(2, 2)).groups
    ()
    """
    found: Layout = module.__dict__.get(LAYOUT, SAME)
    return found


def set_layout(module: nn.Module, layout: Layout) -> None:
    """Note a module's layout; whoever loads weights into it asks for it."""
    module.__dict__[LAYOUT] = layout
