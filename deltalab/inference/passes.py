"""Forward passes of a causal language model over beginnings that are computed once.

A beginning's keys and values are kept as a list of two tensors a layer, (rows, heads, tokens,
size). Rows are filled up on the right, where no causal model looks: positions count from the
beginning's end, and no mask is needed, so that this holds for every kind of position.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.inference.beginnings import Tokens

Kept = list[tuple[Tensor, Tensor]]
"""Keys and values by layer."""
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}
_ROUGH = 0.03
"""By how much a beginning kept may move logits, of their spread, in 16 bits."""


class Passes:
    """Forward passes of a module of transformers.

    Args:
        module: the live module.

    Attributes:
        tokens: how many were computed.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.device = next(module.parameters()).device
        self.tokens = 0
        known = inspect.signature(module.forward).parameters
        self._keeps = "logits_to_keep" in known
        self._places = "position_ids" in known

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        looked: Sequence[int],
        cache: Any = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the positions that are looked at, (rows, looked, vocabulary).

        Args:
            ids: tokens, (rows, tokens).
            looked: which of them, in their order.
            cache: what is before them, from `before`; it then holds them too. None: nothing.
            lengths: how many entries of `cache` count for every row, its last ones; None: all.
        """
        settings: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        last = len(looked) == ids.shape[1] - looked[0]
        some: Any = slice(-len(looked), None) if last else torch.tensor(looked, device=ids.device)
        if self._keeps:
            settings["logits_to_keep"] = len(looked) if last else some
        if lengths is not None:
            past = cache.get_seq_length()
            seen = torch.arange(past + ids.shape[1], device=ids.device)
            settings["attention_mask"] = (seen >= past - lengths[:, None]).long()
            if self._places:
                settings["position_ids"] = lengths[:, None]
        self.tokens += ids.numel()
        logits: Tensor = self.module(input_ids=ids, use_cache=cache is not None, **settings).logits
        return logits if self._keeps else logits[:, some]

    def extended(self, kept: Kept, ids: Tensor) -> Kept:
        """Return a beginning with further tokens, (rows, tokens); `kept` has one row or as many."""
        cache = before(kept, len(ids))
        self(ids, [ids.shape[1] - 1], cache)
        return held(cache)

    def padded(self, rows: Sequence[Tokens]) -> Tensor:
        """Return rows of tokens filled up on the right, on the device."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
        return ids.to(self.device)


def before(kept: Kept, rows: int | Tensor) -> Any:
    """Return a beginning as a cache for a pass, which does not change it.

    Args:
        kept: the beginning; empty for none.
        rows: how many rows the pass has, all after the one row of `kept`; or the row of `kept`
            that is before each of them.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    def of(tensor: Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            return tensor.index_select(0, rows)
        return tensor.expand(rows, *tensor.shape[1:])

    cache = DynamicCache()
    for keys, values in kept:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = of(keys), of(values)
        cache.layers.append(layer)
    return cache


def held(cache: Any) -> Kept:
    """Return what a cache holds."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def right_aligned(kept: Kept, unused: Sequence[int]) -> Kept:
    """Move every row's entries right over so many unused ones at its end."""
    if not any(unused):
        return kept
    (first, _), *_ = kept
    places = torch.arange(first.shape[2], device=first.device)
    taken = (places - torch.tensor(unused, device=first.device)[:, None]).clamp(min=0)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.gather(2, taken[:, None, :, None].expand(tensor.shape))

    return [(moved(keys), moved(values)) for keys, values in kept]


def refusal(module: Any, context: int) -> str | None:
    """Say why a model's beginnings cannot be kept; None where they can.

    Its kind of cache is looked at, and then rows of unlike length are scored and continued after a
    common beginning, and held against each row alone.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if getattr(module.config, "is_encoder_decoder", False):
        return "the model has an encoder"
    try:
        layers = DynamicCache(config=module.config).layers
        for layer in layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                return f"its cache has a {type(layer).__name__}"
        moved = _moved(module, max(min(context, 40), 6))
    except Exception as error:  # of whatever a model does with a cache that is not its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    if not moved <= _CLOSE.get(module.dtype, _ROUGH):  # NaN as well
        return f"a beginning kept moves its logits by {moved:.1g} of their spread"
    return None


def _moved(module: Any, size: int) -> float:
    """Return by how much logits move after a beginning kept, as a share of their spread."""
    passes, vocabulary = Passes(module), module.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(min(vocabulary, 1000), (2, size), generator=draw)
    shared, cut = size // 2, size - 2  # the second row ends two tokens before the first
    ids[1, :shared] = ids[0, :shared]
    ids = ids.to(passes.device)
    alone = [passes(ids[:1], range(size))[0], passes(ids[1:, :cut], range(cut))[0]]
    kept = passes.extended([], ids[:1, :shared])
    cache = before(kept, 2)
    after = passes(ids[:, shared:-1], range(size - 1 - shared), cache)
    ended = right_aligned(held(cache), [0, 2])
    lengths = torch.tensor([size - 1, cut - 1], device=passes.device)
    last = torch.stack([ids[0, -1:], ids[1, cut - 1 : cut]])
    next_ones = passes(last, [0], before(ended, torch.arange(2, device=passes.device)), lengths)
    found = [after[0], next_ones[0], after[1, : cut - 1 - shared], next_ones[1]]
    truth = torch.cat([alone[0][shared:], alone[1][shared:]]).double()
    off = (torch.cat(found).double() - truth).square().mean()
    spread = truth.std() if truth.numel() else math.nan
    return float(off.sqrt() / spread)
