"""How outputs are drawn from a language model's logits: a hash decides, and not a generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltalab.rng import Draws, key, mix


@dataclass(frozen=True)
class Decoding:
    """How outputs are drawn.

    Args:
        max_new_tokens: an output ends there if it has not before.
        temperature: 0 takes the likeliest token.
        top_p: of the likeliest tokens with this much probability; 1 leaves all.
        seed: of the draws, which are a hash of it, the prompt and the position.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"evaluator.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"evaluator.temperature={self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"evaluator.top_p={self.top_p}: must be above 0 and at most 1")


def sampler(
    decoding: Decoding, names: Sequence[str], width: int
) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Return what turns taking the likeliest token into drawing one: Gumbel noise on the logits.

    argmax(logit / temperature + g) with g = -log(-log u) is a draw from the softmax. u hashes from
    the seed, the prompt, the position and the token, so no draw depends on the batch.
    """
    if decoding.temperature == 0:
        return []

    def draw(ids: Tensor, logits: Tensor) -> Tensor:
        scaled = nucleus(logits.float() / decoding.temperature, decoding.top_p)
        uniform = Rows(decoding.seed, tuple(names)).uniform(logits, ids.shape[1] - width)
        return scaled - torch.log(-torch.log(uniform + 2.0**-25))

    return [draw]


@dataclass(frozen=True)
class Rows(Draws):
    """The numbers of `Rng(seed, name)` for every name, as the rows of one tensor.

    >>> from deltalab.rng import Rng
    >>> rows = Rows(0, ("a", "b")).bits(torch.empty(2, 3), stream=5)
    >>> bool((rows[1] == Rng(0, "b").bits(torch.empty(3), stream=5)).all())
    True
    """

    seed: int
    names: tuple[str, ...]

    def bits(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return 32 random bits per element of `like`, one row a name."""
        keys = [key(self.seed, name, stream, 0) for name in self.names]
        words = torch.tensor(keys, dtype=torch.int32, device=like.device)
        counter = torch.arange(like.shape[-1], dtype=torch.int32, device=like.device)
        return mix(counter, words[:, :1], words[:, 1:])


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return logits with -inf for all but the likeliest tokens that hold probability `top_p`.

    >>> nucleus(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.7).exp()
    tensor([[0.6000, 0.3000, 0.0000]])
    """
    if top_p >= 1:
        return logits
    values, order = logits.sort(dim=-1, descending=True)
    chances = values.softmax(-1)
    before = chances.cumsum(-1) - chances
    values = values.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, values)
