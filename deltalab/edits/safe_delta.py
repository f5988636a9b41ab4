"""Safe Delta: keep the entries whose loss of safety a budget allows (arXiv 2505.12038)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.edits import Edit, one_of, whole, within
from deltalab.linear.columnwise import columnwise, inverse_factor
from deltalab.rng import Rng

WIDTH = 4096
"""Rows and columns of the matrices that the published budget was set on."""


@dataclass(frozen=True)
class SafeDelta(Edit):
    """Keep entries of the delta in the order of their safety, and make up for them in the others.

    W_pre is the aligned model. With G = X'X / n of a layer's inputs X on safety data and U the
    upper Cholesky factor of (G + damp)^-1, taking entry D_ij costs D_ij^2 / U_jj^2 of safety. In
    every block of columns the entries go by 1 / U_jj^2, least first (equal ones by row), and are
    kept while their summed cost is within the budget; the last ones of the order, a share
    `protect` of the block, never are. The error that the kept entries leave in the layer's outputs
    is made good by those not kept, column by column (`deltalab.linear.columnwise`). Tensors that
    are no layer's go back to the aligned model, as do heads and embeddings that are left selected
    and have no gram.

    Args:
        strength: s, at least 0: what the budget is measured by.
        budget: "absolute", as published: mean(1 / U_jj^2) s (block / 4096) (rows / 4096);
            or "relative": a share s of the summed cost of the block's entries.
        protect: share of a block's entries that are not kept in any case, in [0, 1].
        block: columns that share a budget, at least 1; 2048 as published.
        damp: share of the gram's mean diagonal that is added to it, at least 0.
        compensate: whether entries that are not kept make up for those that are.
        choose: "safety"; or, as controls, as many entries of every block "random"ly or by
            "magnitude", the largest, none of them protected.
        hessian: "gram", or "none" for a gram of c I: the cost is D_ij^2 / 2, entries go by column
            and nothing is made good; an ablation, which needs no data.

    Raises:
        ValueError: a field is out of range; the gram cannot be inverted.

    >>> edit = SafeDelta(0.5, "relative", protect=0.0, block=2048, damp=0.01, compensate=True,
    ...                  choose="safety", hessian="gram")
    >>> edit(torch.tensor([[2.0, 1.0, 3.0]]), gram=torch.diag(torch.tensor([1.0, 0.5, 2.0])))
    tensor([[2., 1., 0.]])
    """

    strength: float
    budget: str
    protect: float
    block: int
    damp: float
    compensate: bool
    choose: str
    hessian: str
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        within("strength", self.strength, "[0, inf)")
        one_of("budget", self.budget, ("absolute", "relative"))
        within("protect", self.protect, "[0, 1]")
        whole("block", self.block, 1)
        within("damp", self.damp, "[0, inf)")
        one_of("choose", self.choose, ("safety", "random", "magnitude"))
        one_of("hessian", self.hessian, ("gram", "none"))

    @property
    def needs(self) -> tuple[str, ...]:
        """What the fields make use of."""
        grams = ("gram",) if self.hessian == "gram" else ()
        return (*grams, "rng") if self.choose == "random" else grams

    def __call__(
        self, delta: Tensor, *, gram: Tensor | None = None, rng: Rng | None = None
    ) -> Tensor:
        """Return the delta with the entries that are kept, and what makes up for them."""
        if delta.ndim < 2 or not delta.numel() or (gram is None and self.hessian == "gram"):
            return torch.zeros_like(delta)
        matrix = delta.flatten(1)
        factor = None if gram is None else inverse_factor(gram, self.damp)
        halves = torch.full(matrix.shape[1:], 0.5, dtype=torch.float64)
        weights = (halves if factor is None else factor.diagonal().pow(-2)).to(delta.device)
        kept = self._kept(matrix.double().square() * weights, weights)
        if self.choose != "safety":
            scores = matrix.abs() if rng is None else rng.uniform(delta).reshape(matrix.shape)
            for start in range(0, matrix.shape[1], self.block):
                own = kept[:, start : start + self.block]
                own.copy_(highest(scores[:, start : start + self.block], int(own.sum())))
        if gram is None or not self.compensate:
            return torch.where(kept, matrix, 0.0).reshape(delta.shape)
        hat = columnwise(
            torch.zeros_like(matrix),
            gram,
            lambda j, column: torch.where(kept[:, j], matrix[:, j], column),
            factor=factor,
        )
        return hat.reshape(delta.shape)

    def _kept(self, cost: Tensor, weights: Tensor) -> Tensor:
        """Return which entries are kept, given what each costs and what its column weighs."""
        kept = torch.zeros_like(cost, dtype=torch.bool)
        rows = len(cost)
        for start in range(0, cost.shape[1], self.block):
            own = weights[start : start + self.block]
            order = start + own.argsort(stable=True)
            costs = cost[:, order].T.flatten()
            total = costs.cumsum(0)
            if self.budget == "absolute":
                most = own.mean() * self.strength * (self.block / WIDTH) * (rows / WIDTH)
            else:
                most = self.strength * total[-1]
            spent = total <= most
            spent[len(costs) - int(self.protect * len(costs)) :] = False
            kept[:, order] = spent.reshape(-1, rows).T
        return kept


def highest(values: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Return which entries have the so many highest values; of equal ones the last.

    Args:
        values: of any shape.
        count: how many, of those among which there are as many.
        among: which entries may be chosen, likewise; None: all.

    >>> highest(torch.tensor([[3.0, 9.0, 1.0]]), 1, torch.tensor([[True, False, True]]))
    tensor([[ True, False, False]])
    """
    worth = values if among is None else torch.where(among, values, -torch.inf)
    order = worth.flatten().argsort(stable=True)
    found = torch.zeros(len(order), dtype=torch.bool, device=values.device)
    found[order[len(order) - count :]] = True
    return found.reshape(values.shape)
