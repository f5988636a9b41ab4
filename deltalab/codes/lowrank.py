"""Two factors of a matrix."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltalab.codes import Code


@dataclass(frozen=True, eq=False)
class LowRank(Code):
    """D_hat = B A with B (d, r) and A (r, k), of a tensor read as (out, rest).

    Arrays: `b`, flat, and `a`, flat, float32. Settings: `rank`; `across`, 1 where B is held column
    by column, as it was multiplied, so that the product has the same bits.

    >>> import torch
    >>> code = LowRank.of_factors((2, 3), torch.ones(2, 1), torch.ones(1, 3))
    >>> code.decode().sum(), code.bits.payload
    (tensor(6.), 160)
    """

    kind: ClassVar[str] = "lowrank"
    payload: ClassVar[tuple[str, ...]] = ("b", "a")

    @classmethod
    def of_factors(cls, shape: tuple[int, ...], b: Tensor, a: Tensor) -> "LowRank":
        """Return the code of a product.

        Args:
            shape: of the delta.
            b: (d, r).
            a: (r, k).
        """
        across = b.stride(0) == 1 and b.shape[1] > 1
        left = b.mT if across else b
        arrays = {"b": left.reshape(-1).cpu(), "a": a.reshape(-1).cpu()}
        return cls(tuple(shape), arrays, {"rank": b.shape[1], "across": int(across)})

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return B and A, float32.

        Raises:
            ValueError: factors of another size.
        """
        rank, rows = self._setting("rank", int), self.shape[0]
        b, a = self._array("b", rows * rank).float(), self._array("a").float()
        left = b.reshape(rank, rows).mT if self.settings.get("across") else b.reshape(rows, rank)
        self._array("a", rank * (self.count // max(1, rows)))
        return left, a.reshape(rank, -1)

    def decode(self, pre: Tensor | None = None) -> Tensor:
        """Return the product."""
        b, a = self.factors()
        return (b @ a).reshape(self.shape)
