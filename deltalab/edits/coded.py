"""Edits that are defined by their code: what a file holds, and what comes back from it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltalab.codes import Code, Setting
from deltalab.codes.raw import Raw
from deltalab.edits import Edit
from deltalab.rng import Rng


class Coded(Edit):
    """An edit whose call decodes what its `encode` made; a subclass writes `encode` alone."""

    def __call__(self, delta: Tensor, *args: Any, **needs: Any) -> Tensor:
        """Return the edited delta."""
        code = self.encode(delta, **needs)
        assert code is not None
        return code.decode().to(delta.device)

    def outlined(
        self, delta: Tensor, dtype: torch.dtype, *args: Any, **needs: Any
    ) -> tuple[Tensor, Code | None]:
        """Return the edited delta and the code that it was made from."""
        code = self.encode(delta, **needs)
        assert code is not None
        told = Raw.outline(code.shape, dtype) if isinstance(code, Raw) else code
        return code.decode().to(delta.device), told

    @property
    def needs(self) -> tuple[str, ...]:
        """What `encode` asks for beside the delta."""
        parameters = inspect.signature(type(self).encode).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def whole_matrix(delta: Tensor) -> tuple[int, int] | None:
    """Return (d, k) of a delta read as (out, rest); None where it is no matrix, or has no entry."""
    if delta.ndim < 2 or not delta.numel():
        return None
    return delta.shape[0], delta[0].numel()


def untouched(delta: Tensor, needs: Mapping[str, Any]) -> Raw:
    """Return the code of what a method on matrices leaves as it is, by the needs of `encode`."""
    return Raw.holding(delta.clone(), needs.get("post"))


def seeded(rng: Any, exact: bool) -> dict[str, Setting]:
    """Return the settings from which `Factors` finds its masks again.

    Args:
        rng: an edit's random numbers; those of a matrix that is seen turned have its `Rng` as
            `rng`.
        exact: whether the number of entries that a mask drops is exact.
    """
    source: Rng = rng if isinstance(rng, Rng) else rng.rng
    how = "exact" if exact else "bernoulli"
    return {"masks": how, "seed": source.seed, "name": source.name, "salt": source.salt}
