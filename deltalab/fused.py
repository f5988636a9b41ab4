"""Edits as one compiled pass over memory: read W_pre and W_post, edit, write W_edit.

The compiled function is the eager one, so that both give the same bits. Numbers in an edit's fields
and the random keys enter as values, so that a sweep over hyper-parameters compiles once.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deltalab.edits import needs_of
from deltalab.rng import Keyed

KERNELS = ("auto", "eager", "compiled")
SMALLEST = 1 << 20
"""Elements from which `auto` compiles: below, eager slices cost less than a compiler ever saves."""
_STREAMS = 4
_broken: list[str] = []


def wanted(edit: Any, post: Tensor, kernel: str) -> bool:
    """Return whether to run an edit of one tensor compiled.

    Args:
        edit: the edit.
        post: the tensor to edit.
        kernel: "auto" compiles large tensors on the CPU; "eager" and "compiled" force either, as
            far as the edit can be compiled.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel}: must be one of {', '.join(KERNELS)}")
    fusible = getattr(edit, "unit", None) == "entry" or getattr(edit, "fuses", False)
    able = fusible and set(needs_of(edit)) <= {"rng", "grad"} and 0 < post.numel() < 1 << 31
    large = post.numel() >= SMALLEST and post.device.type == "cpu"
    return able and not _broken and (kernel == "compiled" or (kernel == "auto" and large))


def edited(
    pre: Tensor,
    post: Tensor,
    edit: Any,
    needs: Mapping[str, Any],
    body: Callable[[Tensor, Tensor, Any, dict[str, Any]], Tensor],
) -> Tensor | None:
    """Return one edited tensor by a compiled pass, or None where compilation is impossible.

    Args:
        pre: pre-trained tensor.
        post: post-trained tensor.
        edit: the edit.
        needs: its keyword arguments, `rng` and `grad` at most.
        body: the eager function of (pre, post, edit, needs) to compile.
    """
    shape = post.shape
    rng = needs.get("rng")
    if rng is not None and rng.start % (1 << 32) + post.numel() > 1 << 32:
        return None  # the slice crosses a page of indices
    if getattr(edit, "unit", None) == "entry" or post.ndim < 2:
        flat = [t.detach().reshape(-1) for t in (pre, post)]
    else:
        flat = [t.detach().contiguous().flatten(1) for t in (pre, post)]
    keys = rng.keys(_STREAMS).to(post.device) if rng is not None else None
    grad = needs["grad"].detach().reshape(flat[1].shape) if "grad" in needs else None
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):
            return _compiled(body, torch.get_num_threads())(*flat, edit, keys, grad).reshape(shape)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"edits run uncompiled, because compiling failed: {reason}", stacklevel=2)
        _broken.append(reason)
        return None


@lru_cache(maxsize=4)
def _compiled(body: Callable[..., Tensor], threads: int) -> Callable[..., Tensor]:
    """Return the compiled body; the number of threads is a constant of the code."""

    def traced(
        pre: Tensor, post: Tensor, edit: Any, keys: Tensor | None, grad: Tensor | None
    ) -> Tensor:
        needs: dict[str, Any] = {}
        if keys is not None:
            needs["rng"] = Keyed(keys)
        if grad is not None:
            needs["grad"] = grad
        return body(pre, post, edit, needs)

    return torch.compile(traced, dynamic=True, fullgraph=True, options={"cpp.threads": threads})
