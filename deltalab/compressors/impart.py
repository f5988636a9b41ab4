"""ImPart: singular vectors with entries left out at random, fewer where it matters more.

arXiv 2504.13237, Algorithm 1 and Sec. 3, for matrices of any shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.codes import Code
from deltalab.codes.factorised import quantised
from deltalab.edits import one_of, within
from deltalab.edits.coded import Coded, seeded, untouched, whole_matrix
from deltalab.linear.factor import Factors as Svd
from deltalab.rng import Rng

MASKS = ("exact", "bernoulli")


@dataclass(frozen=True)
class Impart(Coded):
    """Drop entries of singular vectors, those of small singular values first, and rescale the rest.

    D = sum_i s_i u_i v_i'. With r = min(d, k), m = max(d, k) / (d + k), f = total / 16 and the
    sparsity a = 1 - f m of U and V, the first K = r (1 - beta') components are kept, 1 - beta' =
    (1 - beta) 2m and beta' between 0 and a. Of these p_i = (1 - (s_i / s_1)^C) (a - beta') /
    (1 - beta') of the entries of u_i and v_i are dropped, the last components altogether until the
    mean of all p_i is as large as it must be. What is left is divided by 1 - p_i on either side:
    the mean over masks is the truncation to the components that are left. Tensors of more than two
    dimensions are read as (out, rest); those of fewer are returned as they are.

    Args:
        total: bits of U and V for each entry of the matrix, in (0, 32).
        beta: share of the components left out beforehand, in [0, 1).
        exponent: C, at least 0; 0 drops components alone.
        masks: "exact" drops floor(n p_i) entries; "bernoulli" each with probability p_i.
        rescale: whether what is left is divided by 1 - p_i.
        importance: whether p_i depends on the singular value; if not it is the mean for all of K.
        values: "float16", as in the paper, or "float32" of the kept entries.

    Raises:
        ValueError: a field is out of range.

    >>> from deltalab.linear.factor import svd
    >>> edit = Impart(1.0, beta=0.0, exponent=1.0, masks="exact", rescale=True, importance=True,
    ...               values="float32")
    >>> delta = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    >>> edit(delta, svd=lambda: svd(delta), rng=Rng(0, "w")).round(decimals=3)
    tensor([[3., 4.],
            [6., 8.]])
    """

    total: float
    beta: float
    exponent: float
    masks: str
    rescale: bool
    importance: bool
    values: str
    version: ClassVar[int] = 1
    axes: ClassVar[bool] = False
    spends: ClassVar[str] = "total"
    choices: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)

    def __post_init__(self) -> None:
        within("total", self.total, "(0, 32)")
        within("beta", self.beta, "[0, 1)")
        within("exponent", self.exponent, "[0, inf)")
        one_of("masks", self.masks, MASKS)
        one_of("values", self.values, ("float16", "float32"))

    def encode(
        self, delta: Tensor, *args: Any, svd: Callable[[], Svd], rng: Rng, **needs: Any
    ) -> Code:
        """Return the code of the kept entries; which they are follows from the seed."""
        if (shape := whole_matrix(delta)) is None:
            return untouched(delta, needs)
        factors = svd()
        drop = self.drop(factors[1], shape)
        settings = {**seeded(rng, self.masks == "exact")}
        told = expected_error(factors[1], drop, shape, self.masks == "exact", self.rescale)
        settings["expected_error"] = float(f"{told:.4g}")
        width = 16 if self.values == "float16" else 32
        widths = torch.where(drop < 1, width, 0)
        again = (1 - drop).square().reciprocal() if self.rescale else None
        return quantised(
            tuple(delta.shape), factors, widths, "max", drop=drop, rescale=again, settings=settings
        )

    def drop(self, s: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return p_i of every component, float32; 1 where it is left out."""
        kept = self.total / (16 if self.values == "float16" else 32)
        if not self.importance:
            return even(s, shape, kept, self.beta)
        return probabilities(s, shape, 1 - kept * max(shape) / sum(shape), self.beta, self.exponent)


def probabilities(
    s: Tensor, shape: tuple[int, int], sparsity: float, beta: float, exponent: float
) -> Tensor:
    """Return how much of every component is dropped, p_i, so that the mean is the sparsity.

    Args:
        s: (r,), singular values, descending.
        shape: (d, k).
        sparsity: a, the share of the entries of U and V that is dropped.
        beta: as for `Impart`.
        exponent: C, likewise.

    Returns:
        (r,) float32 in [0, 1], non-decreasing; the first is 0.

    >>> probabilities(torch.tensor([4.0, 2.0, 1.0, 1.0]), (4, 4), 0.5, 0.0, 1.0)
    tensor([0.0000, 0.2500, 1.0000, 1.0000])
    """
    rank = len(s)
    sparsity = max(sparsity, 0.0)
    before, count = _beforehand(rank, shape, sparsity, beta)
    ratio = (s.double() / torch.where(s[:1] > 0, s[:1], 1.0)).clamp(0, 1)
    ratio = ratio**exponent if exponent else torch.ones_like(ratio)
    drop = torch.ones(rank, dtype=torch.float64, device=s.device)
    drop[:count] = (1 - ratio[:count]) * ((sparsity - before) / (1 - before))
    wanted, summed, last = sparsity * rank, float(drop.sum()), count - 1
    while last > 0 and summed < wanted - 1e-9 * rank:
        summed += 1 - float(drop[last])
        drop[last] = 1.0
        last -= 1
    return drop.float()


def even(s: Tensor, shape: tuple[int, int], kept: float, beta: float) -> Tensor:
    """Return the same p for all components that are kept beforehand, the paper's ablation."""
    sparsity = max(1 - kept * max(shape) / sum(shape), 0.0)
    before, count = _beforehand(len(s), shape, sparsity, beta)
    drop = torch.ones(len(s), device=s.device)
    drop[:count] = (sparsity - before) / (1 - before)
    return drop


def _beforehand(
    rank: int, shape: tuple[int, int], sparsity: float, beta: float
) -> tuple[float, int]:
    """Return the share of components left out beforehand, and how many are kept."""
    before = min(max(0.0, 1 - (1 - beta) * 2 * max(shape) / sum(shape)), sparsity)
    return before, max(1, int(round(rank * (1 - before), 9)))


def expected_error(
    s: Tensor, drop: Tensor, shape: tuple[int, int], exact: bool, rescale: bool = True
) -> float:
    """Return E||D_hat - D||^2 / ||D||^2 over the masks, in closed form.

    With independent masks of u_i and v_i, mean factors c_i and second moments q_i of every product
    of two entries, it is sum_i s_i^2 (q_i - 2 c_i + 1), the components being orthogonal in the
    mean; components that are left out add s_i^2. Rescaled Bernoulli masks have c_i = 1 and
    q_i = 1 / (1 - p_i)^2.

    Args:
        s: (r,), all singular values.
        drop: (r,), p_i.
        shape: (d, k).
        exact: whether floor(n p_i) entries are dropped of n.
        rescale: whether what is left is divided by 1 - p_i.

    >>> expected_error(torch.ones(2), torch.tensor([0.0, 0.5]), (8, 8), True)
    1.5
    """
    energy, p = s.double().square(), drop.double()
    keep = 1 - p
    sides = [1 - (n * p).floor() / n for n in shape] if exact else [keep, keep]
    both = sides[0] * sides[1]
    factor = torch.where(keep > 0, keep.square().reciprocal(), 0.0) if rescale else (keep > 0)
    error = factor * factor * both - 2 * factor * both + 1
    return float((energy * error).sum() / energy.sum()) if energy.sum() > 0 else 0.0
