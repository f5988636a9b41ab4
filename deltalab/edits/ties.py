"""TIES trimming of one model (arXiv 2306.01708; arXiv 2410.13841, Eqs. 10-12)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.indexed import Indexed, spread
from deltalab.codes.raw import Raw
from deltalab.edits import Edit, one_of, within
from deltalab.weights.threshold import Threshold, kept_count, tensor_threshold


@dataclass(frozen=True)
class Ties(Edit):
    """Keep the entries of largest magnitude, drop the rest, no rescale.

    D_hat = M D with M = 1 on the `keep` fraction of largest |D|: of n entries exactly
    floor(keep n) survive. Among all masks of that count this one has the least ||D_hat - D||.
    Entries of equal magnitude survive in the order of tensor names, then of flat indices.

    Args:
        keep: fraction of entries kept, in [0, 1].
        scope: "model" ranks over all selected tensors together, as TIES does; "tensor" ranks in
            every tensor by itself.

    Raises:
        ValueError: a field is out of range.

    >>> edit = Ties(keep=0.5, scope="tensor")
    >>> edit(torch.tensor([1.0, -3.0, 2.0, -2.0]), quantile=None)
    tensor([ 0., -3.,  2.,  0.])
    """

    keep: float
    scope: str
    version: ClassVar[int] = 1
    spends: ClassVar[str] = "keep"
    choices: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    axes: ClassVar[bool] = False

    @property
    def whole_model(self) -> bool:  # type: ignore[override]
        """Whether all tensors are ranked together."""
        return self.scope == "model"

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        """Whether the threshold is known beforehand."""
        return self.whole_model

    def __post_init__(self) -> None:
        within("keep", self.keep, "[0, 1]")
        one_of("scope", self.scope, ("model", "tensor"))

    def __call__(self, delta: Tensor, *, quantile: Callable[[float], Threshold] | None) -> Tensor:
        """Return the delta with all but the largest entries set to zero."""
        if self.keep == 1:
            return delta.clone()
        return torch.where(self._limit(delta, quantile).survivors(delta), delta, 0.0)

    def held(
        self, delta: Tensor, *, quantile: Callable[[float], Threshold] | None
    ) -> Tensor | None:
        """Return the entries that are kept, of which the places are held too."""
        if self.keep == 1:
            return None
        return self._limit(delta, quantile).survivors(delta).to(torch.int8)

    def outline(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        held: tuple[float, ...],
        *args: Any,
        **needs: Any,
    ) -> Code | None:
        """Return the code by how the kept entries are spread."""
        if self.keep == 1:
            return Raw.outline(shape, dtype)
        return Indexed.outline(shape, dtype, held)

    def outlined(
        self, delta: Tensor, dtype: torch.dtype, *, quantile: Callable[[float], Threshold] | None
    ) -> tuple[Tensor, Code | None]:
        """Return the edited delta and its code without numbers, by one search for the largest."""
        mask = self.held(delta, quantile=quantile)
        if mask is None:
            return delta.clone(), self.outline(tuple(delta.shape), dtype, ())
        kept = mask.view(torch.bool)
        told = self.outline(tuple(delta.shape), dtype, spread(kept))
        return torch.where(kept, delta, 0.0), told

    def _limit(self, delta: Tensor, quantile: Callable[[float], Threshold] | None) -> Threshold:
        if self.scope == "tensor":
            return tensor_threshold(delta, kept_count(self.keep, delta.numel()))
        assert quantile is not None, "scope=model needs the model-wide threshold"
        return quantile(self.keep)

    def encode(
        self,
        delta: Tensor,
        *,
        quantile: Callable[[float], Threshold] | None,
        post: Tensor | None = None,
    ) -> Code:
        """Return the entries that are kept, and where they are."""
        if self.keep == 1:
            return Raw.holding(delta, post)
        return Indexed.at(delta, post, self._limit(delta, quantile).survivors(delta))
