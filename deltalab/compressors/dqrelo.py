"""D-QRELO: one bit an entry, and a low rank for what it leaves (arXiv 2604.16940)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.factorised import quantised
from deltalab.codes.factors import Factors
from deltalab.codes.nested import Sum
from deltalab.codes.signs import Signs
from deltalab.edits import one_of, within
from deltalab.edits.bitdelta import mean_magnitude
from deltalab.edits.coded import Coded, untouched, whole_matrix
from deltalab.linear.factor import Factors as Svd
from deltalab.linear.factor import svd as factorised


@dataclass(frozen=True)
class Dqrelo(Coded):
    """Keep signs with one scale, and the leading singular components of the residual.

    B = mu sign(D), mu = mean |D|, R = D - B = U S V': D_hat = B + U_r S_r V_r', of squared error
    ||R||^2 - sum_{i <= r} s_i(R)^2, with r = ceil(d k (total - 1) / (16 (d + k))) components of
    float16 entries. Tensors of more than two dimensions are read as (out, rest); those of fewer are
    returned as they are.

    Args:
        total: bits for each entry of the matrix, signs included, at least 1; the paper has 2.
        order: "sign_svd", or "svd_sign": the low rank first, then the signs of what it leaves.
        values: "float16" as in the paper, or "float32" of the singular vectors' entries.

    Raises:
        ValueError: a field is out of range.

    >>> edit = Dqrelo(total=9.0, order="sign_svd", values="float32")
    >>> delta = torch.tensor([[1.0, -3.0], [2.0, -2.0]])
    >>> edit(delta, svd=lambda: factorised(delta)).round(decimals=3)
    tensor([[ 1., -3.],
            [ 2., -2.]])
    """

    total: float
    order: str
    values: str
    version: ClassVar[int] = 1
    axes: ClassVar[bool] = False
    spends: ClassVar[str] = "total"
    choices: ClassVar[tuple[float, ...]] = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)

    def __post_init__(self) -> None:
        within("total", self.total, "[1, inf)")
        one_of("order", self.order, ("sign_svd", "svd_sign"))
        one_of("values", self.values, ("float16", "float32"))

    def encode(self, delta: Tensor, *args: Any, svd: Callable[[], Svd], **needs: Any) -> Code:
        """Return the code of signs and factors."""
        if (shape := whole_matrix(delta)) is None:
            return untouched(delta, needs)
        rank = self.rank(shape)
        if self.order == "svd_sign":
            low = self._low(delta, svd(), rank)
            signs = _signs(delta - low.decode().to(delta.device))
            return Sum.of_codes([low, signs])
        signs = _signs(delta)
        if not rank:
            return signs
        residual = delta - signs.decode().to(delta.device)
        return Sum.of_codes([signs, self._low(delta, factorised(residual.flatten(1)), rank)])

    def rank(self, shape: tuple[int, int]) -> int:
        """Return r, at most min(d, k)."""
        width = 16 if self.values == "float16" else 32
        wanted = shape[0] * shape[1] * (self.total - 1) / (width * sum(shape))
        return min(math.ceil(round(wanted, 9)), *shape)

    def _low(self, delta: Tensor, factors: Svd, rank: int) -> Factors:
        width = 16 if self.values == "float16" else 32
        widths = torch.zeros(len(factors[1]), dtype=torch.int64)
        widths[:rank] = width
        return quantised(tuple(delta.shape), factors, widths, "max")


def _signs(delta: Tensor) -> Signs:
    return Signs.of_delta(delta, mean_magnitude(delta, "tensor"), "tensor")
