"""Entries kept at random places, which the seed tells again: no place is held."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from deltalab.codes import Code, Setting, blank, signed_zeros
from deltalab.codes.raw import flat
from deltalab.linear.delta import difference
from deltalab.rng import Rng

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Holding(Code):
    """Some entries of a delta, scaled: D_hat = scale D at these places, else 0.

    The entries are those of the delta in float32, or W_post's own in their own type, with which and
    W_pre the delta is exact: `holds` is "delta" or "weights". Where the places are is a subclass's.

    Arrays: `values`. Settings: `holds`, `scale`.
    """

    payload: ClassVar[tuple[str, ...]] = ("values",)

    def places(self) -> Tensor:
        """Return a flat boolean mask of the entries that are held.

        Raises:
            ValueError: what the code holds does not fit together.
        """
        raise NotImplementedError

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the scaled entries at their places."""
        places = self.places()
        held = self._held(places)
        if self._holds_weights:
            held = difference(taken(flat(self._fits(pre)), places), held)
        hat = torch.zeros(self.count)
        put(self._setting("scale", float) * held.float(), places, hat)
        return hat.reshape(self.shape)

    def onto(self, pre: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights as stored, with W_post's bits where nothing was scaled."""
        if not self._holds_weights:
            return super().onto(pre, dtype)
        places, old = self.places(), flat(self._fits(pre))
        held, own = self._held(places), taken(old, places)
        delta = difference(own, held)
        hat = self._setting("scale", float) * delta
        moved = (own.float() + hat).to(dtype)
        out = old.to(dtype, copy=True)
        kept = torch.where(hat == 0, own.to(dtype), moved)
        put(torch.where(hat == delta, held.to(dtype), kept), places, out)
        return out.reshape(self.shape).to(pre.device)

    def is_exact(self, pre: Tensor, post: Tensor, delta: Tensor) -> bool:
        """It is with W_post's own entries, but for zeros of another sign."""
        return self._holds_weights and not signed_zeros(pre, post)

    @property
    def _holds_weights(self) -> bool:
        return self.settings.get("holds") == "weights"

    def _held(self, places: Tensor) -> Tensor:
        return self._array("values", int(places.sum()))


def held(delta: Tensor, post: Tensor | None, places: Tensor) -> tuple[Tensor, str]:
    """Return the entries that a code is to hold, flat, and what they are; `places` as `taken`."""
    source = delta if post is None else post
    return taken(flat(source), places), "delta" if post is None else "weights"


def taken(values: Tensor, places: Tensor) -> Tensor:
    """Return the numbers at some places of a flat tensor: NumPy is ten times as fast at it.

    Args:
        values: flat, contiguous, on the CPU.
        places: boolean, of the same size, or indices.

    >>> taken(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    tensor([1., 3.])
    """
    index = places.numpy()
    found = _words(values)[np.flatnonzero(index) if index.dtype == bool else index]
    return torch.from_numpy(found).view(values.dtype)


def put(values: Tensor, places: Tensor, into: Tensor) -> None:
    """Put numbers at some places of a flat tensor, in order.

    Args:
        values: flat, of `into`'s dtype.
        places: boolean, of `into`'s size.
        into: flat, contiguous, on the CPU.
    """
    _words(into)[np.flatnonzero(places.numpy())] = _words(values)


def _words(values: Tensor) -> "np.ndarray[Any, Any]":
    """Return the bits of numbers as integers, which NumPy has for all types."""
    return values.view(_WORDS[values.dtype.itemsize]).numpy()


@dataclass(frozen=True, eq=False)
class Kept(Holding):
    """Entries at random places: those where `Rng(seed, name, start, salt).below(p)` is false.

    Settings beside those of `Holding`: `p`, `seed`, `name`, `start`, `salt`, and `turned`, 1 where
    the numbers are drawn for the transpose.

    >>> from deltalab.edits.dare import Dare
    >>> code = Dare(p=0.75, k=0.0).encode(torch.ones(4096), rng=Rng(0, "w"))
    >>> code.arrays["values"].numel(), code.decode().unique().tolist()
    (1084, [0.0, 4.0])
    """

    kind: ClassVar[str] = "kept"

    @classmethod
    def drawn(
        cls, delta: Tensor, post: Tensor | None, rng: Any, p: float, scale: float = 1.0
    ) -> "Kept":
        """Return the code of (1 - M) scale D with M ~ Bernoulli(p).

        Args:
            delta: D.
            post: W_post, to hold its own entries; None to hold those of D.
            rng: an edit's random numbers; those of a matrix that is seen turned have its `Rng` as
                `rng`.
            p: probability of an entry to be dropped.
            scale: of the others.
        """
        draft = cls(tuple(delta.shape), {}, cls._drawing(rng, p, scale))
        values, holds = held(delta, post, draft.places())
        return cls(draft.shape, {"values": values}, {**draft.settings, "holds": holds})

    @classmethod
    def outline(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        count: int,
        rng: Any,
        p: float,
        scale: float = 1.0,
    ) -> "Kept":
        """Return the code of so many entries of W_post without them."""
        settings = {**cls._drawing(rng, p, scale), "holds": "weights"}
        return cls(shape, {"values": blank(count, dtype)}, settings)

    @staticmethod
    def _drawing(rng: Any, p: float, scale: float) -> dict[str, Setting]:
        turned = not isinstance(rng, Rng)
        drawn = rng.rng if turned else rng
        return {
            "p": p, "seed": drawn.seed, "name": drawn.name, "start": drawn.start,
            "salt": drawn.salt, "turned": int(turned), "scale": scale,
        }  # fmt: skip

    def places(self) -> Tensor:
        """Draw the places again."""
        rng = Rng(
            self._setting("seed", int),
            self._setting("name", str),
            self._setting("start", int),
            self._setting("salt", str),
        )
        out = rng.kept(self.count, self._setting("p", float))
        if self.settings.get("turned"):
            return out.reshape(self.shape[::-1]).mT.reshape(-1)
        return out
