"""Merge the experts of a family: every delta edited, then one delta of all, or one for each."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from deltalab.apply import editing
from deltalab.apply.extras import NEEDS, Extras, Provider, handed
from deltalab.edits import Edit
from deltalab.edits.keep import Keep
from deltalab.merges import Learn, Merge, Parts
from deltalab.weights.aligned import saved_names
from deltalab.weights.mapping import LazyWeights, Meta, Weights, difference, meta
from deltalab.weights.threshold import ModelThreshold

FAMILY = ("experts", "base", "total", "name", "quantile")
"""What a family and its edited deltas suffice for."""


def check_merge(merge: Merge, others: Collection[str], experts: Sequence[str]) -> None:
    """Check that a merge can be of these experts and that all it asks for will be there.

    Args:
        merge: the merge.
        others: the needs that are provided for every expert beside `FAMILY`.
        experts: their names.

    Raises:
        ValueError: it keeps no contract, asks for what nobody provides, or is of other experts.
    """
    name = type(merge).__name__
    if not isinstance(merge, Merge):
        raise ValueError(f"merge {name}: must be derived from deltalab.merges.Merge")
    there = [*FAMILY, *others]
    for need in merge.needs:
        if need not in NEEDS or need not in there:
            raise ValueError(f"merge {name} needs {need!r}, which is none of {', '.join(there)}")
    merge.check(experts)


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert of a family, with the edit that its delta undergoes before it is merged.

    Attributes:
        pre: the base's weights.
        post: the expert's, same names and shapes.
        edit: the edit.
        select: the tensors that it touches; the deltas of the others are merged as they are.
        extras: provider of what the edit asks for.
        providers: of what a merge may ask for of every expert.
    """

    pre: Weights
    post: Weights
    edit: Edit = field(default_factory=Keep)
    select: Any = "all"
    extras: Extras = field(default_factory=Extras)
    providers: Mapping[str, Provider] = field(default_factory=dict)

    def edited(self, name: str, device: Any) -> Tensor:
        """Return the edited delta of one tensor, by its listed name."""
        old, new = self.pre[name].to(device), self.post[name].to(device)
        return self.of(name, difference(old, new))

    def of(self, name: str, before: Tensor) -> Tensor:
        """Return the edited delta of one tensor, given the delta."""
        own = self._chosen.get(name)
        if own is None or isinstance(self.edit, Keep):
            return before
        needs = handed(self.extras.for_tensor(own, self._deltas), before.device)
        with torch.no_grad():
            return self.extras.seen(self.edit, own, self._deltas)(before, **needs)

    @cached_property
    def _chosen(self) -> dict[str, str]:
        """The names by which the edit goes, by listed name."""
        listed = {alias: name for name in self.post for alias in saved_names(self.post, name)}
        return {listed[name]: name for name in editing.chosen(self.post, self.select)}

    @cached_property
    def _deltas(self) -> Weights:
        names = self._chosen.values()
        load = lambda name: difference(self.pre[name], self.post[name])  # noqa: E731
        told = lambda name: Meta(meta(self.post, name).shape, torch.float32)  # noqa: E731
        return LazyWeights(names, load, told)


@dataclass(frozen=True, eq=False)
class Family:
    """The experts of one base and how they are merged.

    Attributes:
        experts: by name, in order.
        merge: the merge.
        select: the tensors that are merged; the others stay every expert's own.
        device: where to merge; None for where the weights are.
    """

    experts: Mapping[str, Expert]
    merge: Merge
    select: Any = "all"
    device: torch.device | str | None = None
    _totals: dict[Any, Tensor] = field(default_factory=dict, init=False)
    _learned: dict[Any, Mapping[str, list[float]]] = field(default_factory=dict, init=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that are merged, by listed name."""
        first = next(iter(self.experts.values()))
        listed = {alias: name for name in first.post for alias in saved_names(first.post, name)}
        return tuple(listed[name] for name in editing.chosen(first.post, self.select))

    def merged(self, expert: str | None = None) -> LazyWeights:
        """Return the merged tensors, computed one by one when they are asked for.

        Args:
            expert: whose model it is to be, where the merge gives one for each.
        """
        first = next(iter(self.experts.values())).post
        return LazyWeights(self.names, partial(self._merged, expert), partial(meta, first))

    def _merged(self, expert: str | None, name: str) -> Tensor:
        assert self.merge.each == (expert is not None), "one for all, or one for each"
        own = [*self.experts] if expert is None else [expert]
        pre = next(iter(self.experts.values())).pre[name]
        posts = {n: each.post[name].to(self.device) for n, each in self.experts.items()}
        base = pre.to(self.device)
        raw = {n: difference(base, post) for n, post in posts.items()}
        hats = [each.of(name, raw[n]) for n, each in self.experts.items()]
        with torch.no_grad():
            given = self._needs(self.merge.needs, name, base)
            made = self.merge(hats, **handed(given, hats[0].device))
        hat = made if isinstance(made, Tensor) else made[[*self.experts].index(own[0])]
        found = joined(base, [posts[n] for n in own], [raw[n] for n in own], hat)
        return found.to(pre.device)

    def kept(self) -> float:
        """Return the share of separate experts' numbers that is kept of the merged tensors."""
        numbers = separate = 0.0
        for name in self.names:
            hats = self._edited(name)
            given = self._needs(self.merge.needs, name, hats[0])
            numbers += self.merge.kept(hats, **handed(given, hats[0].device))
            separate += len(hats) * hats[0].numel()
        return numbers / separate if separate else 1 / len(self.experts)

    def _edited(self, name: str) -> list[Tensor]:
        return [each.edited(name, self.device) for each in self.experts.values()]

    def _needs(self, needs: Sequence[str], name: str, base: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for need in needs:
            if need == "experts":
                found[need] = [*self.experts]
            elif need == "base":
                found[need] = base.float()
            elif need == "name":
                found[need] = name
            elif need == "total":
                found[need] = self._total
            elif need == "entropy":
                found[need] = partial(self._weights, name)
            elif need == "quantile":
                found[need] = [partial(self._threshold, n, name) for n in self.experts]
            else:
                experts = self.experts.values()
                found[need] = [e.providers[need](name, e._deltas) for e in experts]
        return found

    def _total(self, sums: Callable[..., Tensor]) -> Tensor:
        """Return the sum over all merged tensors of what a function gives of their deltas.

        A function that has `needs`, of those of a merge, is given them too.
        """
        if sums not in self._totals:
            asked, parts = getattr(sums, "needs", ()), []
            for name in self.names:
                hats = self._edited(name)
                parts.append(sums(hats, **self._needs(asked, name, hats[0])))
            self._totals[sums] = torch.stack(parts).sum(0)
        return self._totals[sums]

    def _weights(self, name: str, learn: Learn) -> list[float]:
        """Return the weights of one tensor's deltas, which are learned once for all tensors."""
        if learn not in self._learned:
            self._learned[learn] = learn([*self.names], [*self.experts], self._slopes)
        return self._learned[learn][name]

    def _slopes(
        self, weights: Mapping[str, Sequence[float]], step: int, examples: int, parts: Parts
    ) -> dict[str, list[float]]:
        """Return how the experts' mean entropy changes with the weights of every tensor's deltas.

        Args:
            weights: w_t by tensor: the entropy is that at W_pre + sum_t w_t P_t.
            step: says which examples of every expert are looked at.
            examples: how many they are.
            parts: makes the P_t of a tensor of its edited deltas.
        """
        experts = [*self.experts.values()]
        first, merged = experts[0], dict[str, Tensor]()
        for name, shares in weights.items():
            found = first.pre[name].to(self.device).float()
            for share, part in zip(shares, parts(self._edited(name)), strict=True):
                found = torch.add(found, part, alpha=share)
            merged[name] = found.to(meta(first.post, name).dtype)
        gradients = [e.providers["entropy"]("", e._deltas)(merged, step, examples) for e in experts]
        slopes = {}
        for name in weights:
            grad = torch.stack([g[name].to(self.device).double() for g in gradients]).mean(0)
            slopes[name] = [float((grad * p).sum()) for p in parts(self._edited(name))]
        return slopes

    def _threshold(self, expert: str, name: str, keep: float) -> Any:
        return self._thresholds[expert].of(keep, self._hats(expert))[name]

    @cached_property
    def _thresholds(self) -> dict[str, ModelThreshold]:
        return {name: ModelThreshold() for name in self.experts}

    def _hats(self, expert: str) -> LazyWeights:
        own = self.experts[expert]
        told = lambda name: Meta(meta(own.post, name).shape, torch.float32)  # noqa: E731
        return LazyWeights(self.names, lambda name: own.edited(name, self.device), told)


def joined(pre: Tensor, posts: Sequence[Tensor], deltas: Sequence[Tensor], hat: Tensor) -> Tensor:
    """Return W_pre + D_hat in the experts' dtype, exact where it is an expert's or the base's.

    Entries whose merged delta is that of an expert have its bits, those of the first of several;
    entries whose delta is zero have those of W_pre (see `editing.stored`).

    >>> joined(torch.zeros(2), [torch.ones(2)], [torch.ones(2)], torch.tensor([1.0, 0.5]))
    tensor([1.0000, 0.5000])
    """
    dtype = posts[0].dtype
    found = torch.where(hat == 0, pre.to(dtype), (pre.float() + hat).to(dtype))
    for post, own in reversed(list(zip(posts, deltas, strict=True))):
        found = torch.where(hat == own, post, found)
    return found
