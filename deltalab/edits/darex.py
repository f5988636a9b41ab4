"""DAREx-q: DARE with another rescale, for extreme drop rates (arXiv 2410.09344)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltalab.codes.kept import Kept
from deltalab.edits import Edit, Unit, within
from deltalab.rng import Rng


@dataclass(frozen=True)
class Darex(Edit):
    """Drop entries at random and divide the rest by q instead of 1 - p.

    D_hat = (1 - M) D / q with M ~ Bernoulli(p). With q > 1 - p this is biased by the factor
    (1 - p) / q and varies less. "closed_form" takes for each layer the q of least mean squared
    change of its outputs at the mean inputs x: with c_ij = D_ij x_j, S_i and Q_i the sums of c and
    of c^2 over j, 1/q = sum S^2 / ((1 - p) sum S^2 + p sum Q). Tensors without an input, such as
    embeddings and biases, use 1 - p there. The inputs are those of half A of the objective's
    examples; the edit is judged on half B (`deltalab.data.splits`).

    Args:
        p: drop probability, in [0, 1).
        q: rescale, in (0, 1], or "closed_form", which needs the mean input activations.

    Raises:
        ValueError: a field is out of range.

    >>> Darex(p=0.0, q=0.5)(torch.tensor([1.0, -2.0]), rng=Rng(0, "w"))
    tensor([ 2., -4.])
    """

    p: float
    q: float | str
    version: ClassVar[int] = 2  # mean inputs of half A of the objective, without padding

    def __post_init__(self) -> None:
        within("p", self.p, "[0, 1)")
        if isinstance(self.q, str) and self.q != "closed_form":
            raise ValueError(f"edit.q={self.q}: must be in (0, 1] or closed_form")
        if not isinstance(self.q, str):
            within("q", self.q, "(0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        """What this edit asks for: activations in the closed form alone."""
        return ("rng", "acts") if self.q == "closed_form" else ("rng",)

    @property
    def axes(self) -> bool:
        """In the closed form, which adds up what each output gets of its inputs."""
        return self.q == "closed_form"

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        """Entry by entry where q is given; the closed form sees the whole tensor."""
        return "tensor" if self.q == "closed_form" else "entry"

    def __call__(self, delta: Tensor, *, rng: Rng, acts: Tensor | None = None) -> Tensor:
        """Return the delta with the masked entries set to zero and the others divided by q."""
        return torch.where(rng.below(delta, self.p), 0.0, self._scale(delta, acts) * delta)

    def _scale(self, delta: Tensor, acts: Tensor | None) -> float | Tensor:
        if not isinstance(self.q, str):
            return 1 / self.q
        return 1 / (1 - self.p) if acts is None else best_scale(delta, acts, self.p)

    def encode(
        self,
        delta: Tensor,
        *,
        rng: Rng,
        acts: Tensor | None = None,
        post: Tensor | None = None,
    ) -> Kept:
        """Return the entries that are kept."""
        return Kept.drawn(delta, post, rng, self.p, float(self._scale(delta, acts)))


def best_scale(delta: Tensor, acts: Tensor, p: float) -> Tensor:
    """Return the 1/q of least mean squared output change of one layer, a scalar.

    Args:
        delta: weight delta, read as (out, in * positions).
        acts: mean input activation of every input feature, (in,).
        p: drop probability.

    >>> best_scale(torch.ones(1, 2), torch.ones(2), 0.5)  # S^2 = 4, Q = 2
    tensor(1.3333)
    """
    rows = delta.flatten(1).double()
    inputs = acts.double().repeat_interleave(rows.shape[1] // len(acts))
    if len(inputs) != rows.shape[1]:
        raise ValueError(f"{len(acts)} activations do not fit a weight of shape {delta.shape}")
    c = rows * inputs
    s2, q = c.sum(1).square().sum(), c.square().sum()
    wanted = (1 - p) * s2 + p * q
    return torch.where(wanted > 0, s2 / wanted, 1.0).float()
