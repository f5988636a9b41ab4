"""Merge the experts of a family: every delta edited, then one delta of all, or one for each."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from deltalab.apply import editing
from deltalab.apply.extras import NEEDS, Extras, Provider, handed
from deltalab.edits import Edit, Survival
from deltalab.edits.keep import Keep
from deltalab.linear.delta import difference
from deltalab.merges import Learn, Merge, Parts
from deltalab.weights.aligned import saved_names
from deltalab.weights.mapping import LazyWeights, Meta, Weights, meta
from deltalab.weights.threshold import (
    Cut,
    ModelThreshold,
    Threshold,
    kept_count,
    tensor_threshold,
)

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
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

    def of(self, name: str, before: Tensor, start: int = 0) -> Tensor:
        """Return the edited delta of one tensor, given the delta, or a part of it from `start`."""
        own = self._chosen.get(name)
        if own is None or isinstance(self.edit, Keep):
            return before
        given = self.extras.for_tensor(own, self._deltas)
        if start:
            given = {need: value.at(start) for need, value in given.items()}  # rng alone
        edit = self.extras.seen(self.edit, own, self._deltas)
        with torch.no_grad():
            if self.sliced:  # compiled where it can be: added to a base of zeros
                return editing.edited_tensor(torch.zeros_like(before), before, edit, **given)
            return edit(before, **handed(given, before.device))

    @property
    def sliced(self) -> bool:
        """Whether parts of a delta can be edited by themselves, given where they are."""
        by_entry = self.edit.unit == "entry" and set(self.edit.needs) <= {"rng"}
        return isinstance(self.edit, Keep) or by_entry

    def survival(self, name: str) -> Survival | None:
        """Return how likely entries of one tensor stay other than zero; None where that is unknown.

        They all do where the edit does not touch the tensor.
        """
        if isinstance(self.edit, Keep) or name not in self._chosen:
            return Survival(1.0, 1.0)
        return self.edit.survival()

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
        onto: other weights that the merged delta is put onto; None: the experts' own base.
    """

    experts: Mapping[str, Expert]
    merge: Merge
    select: Any = "all"
    device: torch.device | str | None = None
    onto: Weights | None = None
    _totals: dict[Any, Tensor] = field(default_factory=dict, init=False)
    _learned: dict[Any, Mapping[str, list[float]]] = field(default_factory=dict, init=False)
    _cuts: dict[tuple[str, str, float, str], Cut] = field(default_factory=dict, init=False)
    _lock: Any = field(default_factory=Lock, init=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that are merged, by listed name."""
        first = next(iter(self.experts.values()))
        listed = {alias: name for name in first.post for alias in saved_names(first.post, name)}
        return tuple(listed[name] for name in editing.chosen(first.post, self.select))

    @property
    def models(self) -> tuple[str, ...]:
        """The experts whose models are made, where the merge gives one for each; else ("",)."""
        return tuple(self.experts) if self.merge.each else ("",)

    def merged(self, model: str | None = None) -> LazyWeights:
        """Return the merged tensors of one of `models`, computed one by one when asked for.

        Args:
            model: whose it is to be, where the merge gives one for each.
        """
        assert self.merge.each == (model is not None), "one for all, or one for each"
        first, index = next(iter(self.experts.values())).post, self.models.index(model or "")
        return LazyWeights(self.names, lambda name: self.of(name)[index], partial(meta, first))

    def held(self) -> dict[str, dict[str, Tensor]]:
        """Return the merged tensors of all `models` in memory, every tensor merged once."""
        found: dict[str, dict[str, Tensor]] = {model: {} for model in self.models}
        for name in self.names:
            for model, tensor in zip(self.models, self.of(name), strict=True):
                found[model][name] = tensor
        return found

    def of(self, name: str) -> list[Tensor]:
        """Return one merged tensor of every one of `models`."""
        pre = next(iter(self.experts.values())).pre[name]
        posts = [each.post[name].to(self.device) for each in self.experts.values()]
        base = pre.to(self.device)
        raw = [difference(base, post) for post in posts]
        return [each.to(pre.device) for each in self._joined(name, base, posts, raw)]

    @property
    def sliced(self) -> bool:
        """Whether parts of tensors can be merged by themselves."""
        whole = self.onto is not None or self.merge.unit != "entry"
        return not whole and all(e.sliced for e in self.experts.values())

    def part(self, name: str, start: int, base: Tensor, posts: Sequence[Tensor]) -> list[Tensor]:
        """Return what `of` does for a part of a tensor, where the family is `sliced`.

        Args:
            name: of the tensor.
            start: the flat index of the part's first entry.
            base: its entries in the base, finite.
            posts: its entries in every expert, finite.
        """
        wide = base.float()
        raw = [post.float() - wide for post in posts]  # what is equal gives zero, as all is finite
        return self._joined(name, base, posts, raw, start)

    def _joined(
        self,
        name: str,
        base: Tensor,
        posts: Sequence[Tensor],
        raw: Sequence[Tensor],
        start: int | None = None,
    ) -> list[Tensor]:
        """Edit, merge, and add to the base; `start` is where a part begins, None of a whole."""
        both = zip(self.experts.values(), raw, strict=True)
        hats = [each.of(name, delta, start or 0) for each, delta in both]
        with torch.no_grad():
            given = self._needs(self.merge.needs, name, base, start)
            made = self.merge(hats, **handed(given, hats[0].device))
        if self.onto is not None:
            other = self.onto[name].to(self.device)
            moved = [made] if isinstance(made, Tensor) else made
            return [(other.float() + hat).to(other.dtype) for hat in moved]
        if isinstance(made, Tensor):
            return [joined(base, posts, raw, made)]
        return [joined(base, [p], [d], h) for p, d, h in zip(posts, raw, made, strict=True)]

    @property
    def learned(self) -> dict[str, Any]:
        """The weights that were learned so far, by expert: one, or one of every tensor.

        Empty where the merge learns none.
        """
        found: dict[str, Any] = {}
        for by_tensor in self._learned.values():
            for index, name in enumerate(self.experts):
                own = {tensor: weights[index] for tensor, weights in by_tensor.items()}
                one = set(own.values())
                found[name] = one.pop() if len(one) == 1 else own
        return found

    def first(self, count: int) -> "Family":
        """Return the family of the first so many experts."""
        some = dict([*self.experts.items()][:count])
        return replace(self, experts=some, merge=self.merge.restricted([*some]))

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

    def _needs(
        self, needs: Sequence[str], name: str, base: Tensor, start: int | None = None
    ) -> dict[str, Any]:
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
                found[need] = [partial(self._threshold, n, name, start) for n in self.experts]
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

    def _threshold(
        self, expert: str, name: str, start: int | None, keep: float, scope: str, delta: Tensor
    ) -> Threshold | Cut:
        """Return what survives of an expert's delta, or of the part of it that starts there."""
        if start is None:
            return self._limit(expert, name, keep, scope, delta)
        at = expert, name, keep, scope
        with self._lock:  # the first part of a tensor looks at all of it, the others wait
            if at not in self._cuts:
                whole = self.experts[expert].edited(name, self.device)
                self._cuts[at] = self._limit(*at, whole).cut(whole)
        return self._cuts[at].at(start)

    def _limit(self, expert: str, name: str, keep: float, scope: str, delta: Tensor) -> Threshold:
        if scope == "model":
            return self._thresholds[expert].of(keep, self._hats(expert))[name]
        return tensor_threshold(delta, kept_count(keep, delta.numel()))

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
    dtype, wide = posts[0].dtype, pre.float()
    found = (wide + hat).to(dtype)
    zero = torch.zeros((), device=hat.device)
    exact = [(zero, pre.to(dtype)), *reversed(list(zip(deltas, posts, strict=True)))]
    if all(_same((wide + own).to(dtype), model) for own, model in exact):
        return found  # as it mostly is in 16 bits: what has an expert's delta has its weight
    for own, model in exact:
        found = torch.where(hat == own, model, found)
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits, compared in words as long as they go."""
    whole = one.dim() and one.shape[-1] * one.itemsize % 8 == 0
    word = torch.int64 if whole else _WORDS[one.itemsize]
    return torch.equal(one.contiguous().view(word), other.contiguous().view(word))
