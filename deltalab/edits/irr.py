"""IRR: identify, remove and recalibrate what undoes a model's safety (arXiv 2412.11041)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.edits import Edit, one_of, whole, within
from deltalab.edits.safe_delta import highest
from deltalab.linear.columnwise import columnwise
from deltalab.rng import Rng

USED: dict[str, tuple[str, ...]] = {
    "sign": ("peers",),
    "fisher": ("fisher",),
    "random": ("peers", "rng"),
}
"""What each way to identify reads."""


@dataclass(frozen=True)
class Irr(Edit):
    """Remove entries that go against the safety vector, and make up for them in the others.

    W_pre is the aligned model W_a, and V = W_a - W_u the safety vector, W_u an unaligned model of
    the same base (`peers`). In every block of columns the candidates are the entries whose sign is
    not V's; those of least Fisher information on safety data, a share `keep` of them, stay, the
    others are set to 0. The error that this leaves in the layer's outputs on the task's data is
    made good by the entries that stay, column by column (`deltalab.linear.columnwise`). A tensor
    that has no gram is not recalibrated, one of one dimension is one row.

    Args:
        peer: which of `peers` is the unaligned model.
        identify: "sign"; "fisher": every entry is a candidate, an ablation; "random": as many
            entries as "sign" removes in each block, drawn at random, an ablation.
        keep: rho, the share of candidates that stay, in [0, 1]; 0 as in the published runs, which
            asks for no Fisher information.
        recalibrate: whether the others make up for what is removed.
        order: the columns are walked "as_is", or "removed_first": those with most entries removed
            first, so that more can be made good.
        block: columns whose candidates are ranked together, at least 1.
        damp: share of the gram's mean diagonal that is added to it, at least 0.

    Raises:
        ValueError: a field is out of range; the gram cannot be inverted.

    >>> edit = Irr("unaligned", "sign", 0.0, False, "as_is", block=128, damp=0.01)
    >>> edit(torch.tensor([[1.0, -2.0]]), peers=lambda name: torch.tensor([[1.0, 3.0]]))
    tensor([[ 0., -2.]])
    """

    peer: str
    identify: str
    keep: float
    recalibrate: bool
    order: str
    block: int
    damp: float
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        one_of("identify", self.identify, tuple(USED))
        within("keep", self.keep, "[0, 1]")
        one_of("order", self.order, ("as_is", "removed_first"))
        whole("block", self.block, 1)
        within("damp", self.damp, "[0, inf)")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the fields make use of."""
        ranked = ("fisher",) if self.identify == "sign" and 0 < self.keep < 1 else ()
        asked = (*USED[self.identify], *ranked, *(("gram",) if self.recalibrate else ()))
        return tuple(dict.fromkeys(asked))

    def __call__(
        self,
        delta: Tensor,
        *,
        peers: Callable[[str], Tensor] | None = None,
        fisher: Tensor | None = None,
        gram: Tensor | None = None,
        rng: Rng | None = None,
    ) -> Tensor:
        """Return the delta without what is removed, and with what makes up for it."""
        if not delta.numel():
            return delta.clone()
        matrix = delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)
        peer = None if peers is None else peers(self.peer).reshape(matrix.shape)
        worth = torch.zeros_like(matrix) if fisher is None else fisher.reshape(matrix.shape)
        drawn = None if rng is None else rng.uniform(delta).reshape(matrix.shape)
        removed = torch.zeros_like(matrix, dtype=torch.bool)
        for start in range(0, matrix.shape[1], self.block):
            own = slice(start, start + self.block)
            # V = -(the peer's delta); zero goes against what is not.
            every = torch.ones_like(removed[:, own])
            found = every if peer is None else matrix[:, own].sign() != -peer[:, own].sign()
            count = int(found.sum())
            most = count - int(self.keep * count + 1e-9)
            if drawn is not None:
                removed[:, own] = highest(drawn[:, own], most)
            else:
                removed[:, own] = highest(worth[:, own], most, found)
        if gram is None:
            return torch.where(removed, 0.0, matrix).reshape(delta.shape)
        first = (-removed.sum(0)).argsort(stable=True)
        hat = columnwise(
            matrix,
            gram,
            lambda j, column: torch.where(removed[:, j], 0.0, column),
            damp=self.damp,
            order=first if self.order == "removed_first" else None,
        )
        return hat.reshape(delta.shape)
