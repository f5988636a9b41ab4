"""AdaMerging (arXiv 2310.02575): weights at which the merged model is sure of what it says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.merges import Learn, Merge, Slopes, number, one_of
from deltalab.merges.ties import agreeing


@dataclass(frozen=True)
class Adamerging(Merge):
    """Add the deltas up by weights that lower the entropy of the outputs: D = sum_t w_t D_t.

    The mean over the experts of the entropy of the merged model's outputs on each one's own inputs,
    without labels, is minimised over the weights by Adam, all of which start at `weight`; they
    count as 0 below 0 and as 1 above 1, as in the authors' code. Inputs are half A of the
    calibration data, taken in order, so that no step is random; the paper takes the test inputs.
    Of a language model the outputs are its predictions at all positions. 0 steps give task
    arithmetic. AdaMerging++ is `edit=ties` with `elect=true`.

    Args:
        scope: what has weights of its own: "model", one for each expert (task-wise), or "tensor",
            one for each expert and tensor (layer-wise).
        weight: where every weight starts, in [0, 1].
        steps: of Adam, 0 or more.
        lr: size of a step, above 0.
        batch: examples of every expert that a step looks at.
        elect: whether entries without the sign of the experts' sum are zero, as TIES has it.

    Raises:
        ValueError: a field is out of range.

    >>> merge = Adamerging(scope="model", weight=0.3, steps=9, lr=0.1, batch=16, elect=False)
    >>> flat = lambda learn: learn(["w"], ["a"], lambda w, *_: {"w": [-1.0]})["w"]
    >>> merge([torch.tensor([1.0])], entropy=flat)
    tensor([1.])
    """

    scope: str
    weight: float
    steps: int
    lr: float
    batch: int
    elect: bool
    version: ClassVar[int] = 1
    alone: ClassVar[Mapping[str, Any] | None] = {"weight": 1.0, "steps": 0}

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("model", "tensor"))
        number("weight", self.weight, lambda x: 0 <= x <= 1, "in [0, 1]")
        number("lr", self.lr, lambda x: x > 0, "above 0")
        one_of("elect", self.elect, (True, False))
        for field, value, least in (("steps", self.steps, 0), ("batch", self.batch, 1)):
            if type(value) is not int or value < least:
                raise ValueError(f"merge.{field}={value}: must be a whole number from {least}")

    def __call__(
        self, deltas: Sequence[Tensor], *, entropy: Callable[[Learn], list[float]]
    ) -> Tensor:
        """Return the weighted sum, added up in the order of the experts."""
        found = torch.zeros_like(deltas[0])
        for share, part in zip(entropy(self.learn), self.parts(deltas), strict=True):
            found.add_(part, alpha=share)
        return found

    def parts(self, deltas: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what is added up of one tensor's deltas."""
        if not self.elect:
            return deltas
        both = zip(deltas, agreeing(deltas), strict=True)
        return [torch.where(agrees, delta, 0.0) for delta, agrees in both]

    def learn(
        self, names: Sequence[str], experts: Sequence[str], slopes: Slopes
    ) -> dict[str, list[float]]:
        """Return the weights of every tensor, by expert."""
        rows = len(names) if self.scope == "tensor" else 1
        raw = torch.full((rows, len(experts)), self.weight, dtype=torch.float64)
        with torch.enable_grad():  # a merge is asked without
            raw.requires_grad_()
            optimiser = torch.optim.Adam([raw], lr=self.lr)
            for step in range(self.steps):
                shares = raw.clamp(0, 1).expand(len(names), -1)
                now = dict(zip(names, shares.tolist(), strict=True))
                found = slopes(now, step, self.batch, self.parts)
                grad = torch.tensor([[*found[name]] for name in names], dtype=torch.float64)
                optimiser.zero_grad()
                shares.backward(grad)  # type: ignore[no-untyped-call]
                optimiser.step()
        final = raw.detach().clamp(0, 1).expand(len(names), -1)
        return dict(zip(names, final.tolist(), strict=True))
