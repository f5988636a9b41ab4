"""The one definition of a delta."""

import torch
from torch import Tensor


def difference(pre: Tensor, post: Tensor) -> Tensor:
    """Return W_post - W_pre in float32: what delta and shift mean everywhere.

    Entries that are equal as stored give zero, infinite ones too, as the masks of attention hold.

    >>> difference(torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf]))
    tensor([0.5000, 0.0000])
    """
    return torch.where(pre == post, 0.0, post.float() - pre.float())
