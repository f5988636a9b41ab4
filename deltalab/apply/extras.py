"""What an edit may ask for beside its delta, found or computed when it asks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from deltalab.edits import needs_of as needs
from deltalab.rng import Rng
from deltalab.weights.factor import Factors, svd
from deltalab.weights.mapping import ModelPair, Weights
from deltalab.weights.threshold import ModelThreshold, Threshold


@dataclass(frozen=True, eq=False)
class Extras:
    """The provider of everything in the vocabulary, for one pair of models and one seed.

    Attributes:
        needs: what the edit asks for.
        seed: seed of the random numbers.
        gradient: computes the loss gradient at W_post; called once an edit needs it.
        acts: computes the mean input activations by weight name; likewise.
        scales: learns scales for an edit and the deltas of its tensors; likewise, and kept.
        peers: deltas of further post-trained models.
        salt: sets the random numbers of one model apart from those of others with its tensor names.
        memo: factorisations and thresholds, shared by all points of a sweep over one pair.
    """

    needs: tuple[str, ...] = ()
    seed: int = 0
    gradient: Callable[[], Weights] | None = None
    acts: Callable[[], Weights] | None = None
    scales: Callable[[Weights], Weights] | None = None
    peers: tuple[Weights, ...] = ()
    salt: str = ""
    memo: "Memo" = field(default_factory=lambda: Memo())
    _once: dict[str, Weights] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        edit: Any,
        pair: ModelPair,
        *,
        seed: int,
        salt: str = "",
        gradient: Callable[[], Weights] | None = None,
        acts: Callable[[], Weights] | None = None,
        scales: Callable[[Weights], Weights] | None = None,
        peers: tuple[Weights, ...] = (),
    ) -> "Extras":
        """Return the provider for an edit of an open pair, with the pair's shared memo.

        Raises:
            ValueError: the edit needs what is not there.
        """
        memo = _memos.setdefault(pair, Memo())
        return cls(needs(edit), seed, gradient, acts, scales, peers, salt, memo)

    def __post_init__(self) -> None:
        have = {"grad": self.gradient, "acts": self.acts, "scale": self.scales}
        for need, source in have.items():
            if need in self.needs and source is None:
                raise ValueError(f"this edit needs {need!r}, which is not available here")

    def for_tensor(self, name: str, deltas: Weights) -> dict[str, Any]:
        """Return the needed keyword arguments for one tensor.

        Args:
            name: the tensor's name.
            deltas: the deltas of all selected tensors, in order; read where a need calls for it.
        """
        return {need: self._find(need, name, deltas) for need in self.needs}

    def _find(self, need: str, name: str, deltas: Weights) -> Any:
        match need:
            case "rng":
                return Rng(self.seed, name, salt=self.salt)
            case "grad":
                assert self.gradient is not None
                return self.gradient()[name]
            case "acts":
                assert self.acts is not None
                return self.acts().get(name)
            case "scale":
                return self._learned(deltas).get(name)
            case "peers":
                return [peer[name] for peer in self.peers]
            case "svd":
                return lambda: self.memo.svd(name, deltas)
            case _:
                return lambda keep: self.memo.threshold(keep, name, deltas)

    def _learned(self, deltas: Weights) -> Weights:
        """Learn the scales when the first tensor asks, for all tensors together."""
        assert self.scales is not None
        if "learned" not in self._once:
            self._once["learned"] = self.scales(deltas)
        return self._once["learned"]


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
