"""What an edit may ask for beside its delta: one table of names, and who provides them.

`NEEDS` is the table. A provider finds what one tensor needs; those that an edit's deltas suffice
for are here, those that need an objective are in `distill` and in `calibration`, and
`run` puts them together. An edit that asks for what is not in the table, or for what nobody
provides, is refused before a model is opened (`check_needs`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deltalab.budgets.shared import Shared
from deltalab.edits import Edit, turning
from deltalab.linear.factor import Factors, svd
from deltalab.rng import Rng
from deltalab.weights import orientation
from deltalab.weights.mapping import ModelPair, Weights
from deltalab.weights.threshold import ModelThreshold, Threshold


class Need(NamedTuple):
    """One line of the table.

    Attributes:
        kind: the type of what is handed over.
        meaning: what it is.
    """

    kind: str
    meaning: str


NEEDS = {
    "rng": Need("Rng", "random numbers of this tensor"),
    "grad": Need("Tensor", "the loss gradient at W_post, of the delta's shape"),
    "fisher": Need("Tensor", "the mean of squared gradients of examples, of the delta's shape"),
    "acts": Need("Tensor | None", "mean input of its layer, (in,); None for what has no input"),
    "gram": Need("Tensor | None", "X'X / n of its layer's inputs X, (in, in); None for no layer's"),
    "svd": Need("() -> (U, S, Vh)", "the factors of its delta, read as (out, rest)"),
    "quantile": Need(
        "float -> Threshold", "where a fraction of the whole model's entries survives"
    ),
    "scale": Need("(steps, lr) -> Tensor | None", "a scale learned for this tensor"),
    "share": Need("Any", "what a budget gives this tensor; becomes a setting of its edit"),
    "peers": Need("str -> Tensor", "the delta of a further post-trained model, by its name"),
    "experts": Need("list[str]", "the names of the experts, for a merge"),
    "base": Need("Tensor", "the pre-trained tensor, for a merge"),
    "total": Need("(deltas -> Tensor) -> Tensor", "a sum over all tensors, for a merge"),
    "name": Need("str", "the tensor's name, for a merge"),
    "entropy": Need("Learn -> list[float]", "weights that lower the entropy, for a merge"),
}
"""All that an edit may ask for, and a merge, which gets one of every expert where that makes sense
(`deltalab.apply.merging`)."""

OWN = ("rng", "svd", "quantile")
"""What a pair and a seed suffice for."""

SLICED = ("rng", "grad", "acts")
"""What there is of a slice too, for edits of unit "entry" and "row"."""

Provider = Callable[[str, Weights], Any]
"""Finds what one tensor needs, given its name and the deltas of all selected tensors, in order."""


def check_needs(edit: Edit, others: Collection[str] = ()) -> None:
    """Check that an edit keeps the contract and that all it asks for will be there.

    Args:
        edit: the edit.
        others: the needs that are provided beside `OWN`.

    Raises:
        ValueError: it asks for what nobody knows or provides, or runs in slices of which there is
            no such thing.

    >>> from deltalab.edits.biased_product import BiasedProduct
    >>> check_needs(BiasedProduct(k=0.5, p=None), ["grad"])
    >>> check_needs(BiasedProduct(k=0.5, p=None))
    Traceback (most recent call last):
    ValueError: edit BiasedProduct needs 'grad', which is not available here; rng, svd, quantile are
    """
    name = type(edit).__name__
    if not isinstance(edit, Edit):
        raise ValueError(f"edit {name}: must be derived from deltalab.edits.Edit")
    for need in edit.needs:
        if need not in NEEDS:
            raise ValueError(f"edit {name} needs {need!r}, which is not one of {', '.join(NEEDS)}")
        if edit.unit != "tensor" and need not in SLICED:
            raise ValueError(
                f"edit {name} needs {need!r}, of which a slice has none: unit={edit.unit} goes with"
                f" {', '.join(SLICED)} alone"
            )
    _check_provided(f"edit {name}", edit.needs, [*OWN, *others])


def _check_provided(who: str, needs: Collection[str], there: Collection[str]) -> None:
    for need in needs:
        if need not in there:
            raise ValueError(
                f"{who} needs {need!r}, which is not available here; {', '.join(there)} are"
            )


def handed(needs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return an edit's needs with every tensor on a device, also those that calls return.

    The one place where needs change devices: gradients and activations are where the live model
    is, an edit runs where its delta is.

    >>> handed({"scale": torch.tensor(2.0), "svd": lambda: (torch.ones(1),)}, torch.device("cpu"))[
    ...     "svd"
    ... ]()
    (tensor([1.]),)
    """
    return {name: _on(value, device) for name, value in needs.items()}


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        moved = value.to(device)
        assert moved.device == device, f"a need on {moved.device} for a delta on {device}"
        return moved
    if isinstance(value, tuple | list):
        return type(value)(_on(each, device) for each in value)
    if callable(value):
        return lambda *given: _on(value(*given), device)
    return value


def thresholds(edit: Edit, needs: Mapping[str, Any]) -> dict[float, Threshold]:
    """Return the model-wide thresholds that an edit asks for, by the fraction that it asks for.

    It is called on a few entries to find out: which of its fields the fractions come from is its
    own affair.

    Args:
        edit: the edit.
        needs: its keyword arguments, `quantile` among them.
    """
    found: dict[float, Threshold] = {}

    problems: list[Exception] = []

    def quantile(fraction: float) -> Threshold:
        if fraction not in found:
            try:
                found[fraction] = needs["quantile"](fraction)
            except Exception as problem:
                problems.append(problem)
                raise
        return found[fraction]

    few = torch.ones(2, 2)
    given = {name: few if name == "grad" else value for name, value in needs.items()}
    try:
        edit(few, **given | {"quantile": quantile})
    except Exception:  # on so few entries; what is wrong with it will be said on the real ones
        if problems:  # with the model, not with the edit
            raise problems[0] from None
    return found


@dataclass(frozen=True, eq=False)
class Extras:
    """The provider of everything that an edit asks for, for one pair of models and one seed.

    Attributes:
        needs: what the edit asks for.
        seed: seed of the random numbers.
        providers: of what needs more than pair and seed, by need.
        memo: factorisations and thresholds, shared by all points of a sweep over one pair.
        salt: sets the random numbers of one model apart from those of others with its tensor names.
        turned: which tensors, by name, are matrices stored (in, out).

    Raises:
        ValueError: a need that nobody provides.
    """

    needs: tuple[str, ...] = ()
    seed: int = 0
    providers: Mapping[str, Provider] = field(default_factory=dict)
    memo: "Memo" = field(default_factory=lambda: Memo())
    salt: str = ""
    turned: Callable[[str], bool] = field(default_factory=lambda: orientation.turned({}))

    @classmethod
    def of(
        cls,
        edit: Edit,
        pair: ModelPair,
        *,
        seed: int,
        salt: str = "",
        providers: Mapping[str, Provider] | None = None,
        turned: Iterable[str] = (),
    ) -> "Extras":
        """Return the provider for an edit of an open pair, with the pair's shared memo.

        Args:
            edit: the edit.
            pair: the open pair.
            seed: as for the class.
            salt: likewise.
            providers: likewise.
            turned: patterns of the names of matrices stored (in, out), beside those that the
                configuration of the pair's module tells.

        Raises:
            ValueError: the edit needs what is not there.
        """
        check_needs(edit, providers or ())
        config: Any = getattr(pair.module, "config", None)
        told = config.to_dict() if hasattr(config, "to_dict") else {}
        memo = _memos.setdefault(pair, Memo())
        return cls(edit.needs, seed, providers or {}, memo, salt, orientation.turned(told, turned))

    def __post_init__(self) -> None:
        _check_provided("this edit", self.needs, [*OWN, *self.providers])

    def seen(self, edit: Edit, name: str, deltas: Weights) -> Edit:
        """Return an edit as it is to be applied to one tensor, which it sees as (out, in).

        Args:
            edit: the edit.
            name: the tensor's name.
            deltas: as for `for_tensor`; read where a budget must know them.
        """
        if isinstance(edit, Shared):
            edit.check(tuple(deltas))
            share = None
            if edit.budget is not None:
                _check_provided("a budget", ("share",), self.providers)
                share = self.providers["share"](name, deltas)
            edit = edit.of(name, share)
        return turning.seen(edit, self.turned(name))

    def for_tensor(self, name: str, deltas: Weights) -> dict[str, Any]:
        """Return the needed keyword arguments for one tensor.

        Args:
            name: the tensor's name.
            deltas: the deltas of all selected tensors, in order; read where a need calls for it.
        """
        own: dict[str, Provider] = {
            "rng": lambda name, _: Rng(self.seed, name, salt=self.salt),
            "svd": lambda name, deltas: lambda: self.memo.svd(name, deltas),
            "quantile": lambda name, deltas: lambda keep: self.memo.threshold(keep, name, deltas),
        }
        providers = {**own, **self.providers}
        return {need: providers[need](name, deltas) for need in self.needs}


class Memo:
    """What depends on a pair alone and is costly: kept from one point of a sweep to the next.

    Factorisations are kept up to a number of bytes and never evicted: a sweep scans the tensors in
    a cycle, where keeping the first that fit beats any replacement.

    Args:
        limit: bytes of factorisations to hold.
    """

    def __init__(self, limit: int = 4 << 30) -> None:
        self._limit = limit
        self._held = 0
        self._factors: dict[str, Factors] = {}
        self._thresholds: dict[tuple[str, ...], ModelThreshold] = {}

    def svd(self, name: str, deltas: Weights) -> Factors:
        """Return the factorisation of one tensor's delta, read as (out, rest)."""
        if name not in self._factors:
            factors = svd(deltas[name].flatten(1))
            size = sum(f.numel() * f.element_size() for f in factors)
            if self._held + size > self._limit:
                return factors
            self._held += size
            self._factors[name] = factors
        return self._factors[name]

    def threshold(self, keep: float, name: str, deltas: Weights) -> Threshold:
        """Return the share of one tensor in the model-wide threshold over `deltas`."""
        names = tuple(deltas)
        if names not in self._thresholds:
            self._thresholds[names] = ModelThreshold()
        return self._thresholds[names].of(keep, deltas)[name]


_memos: "WeakKeyDictionary[ModelPair, Memo]" = WeakKeyDictionary()
