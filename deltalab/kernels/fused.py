"""Edits as one compiled pass over memory: read W_pre and W_post, edit, write W_edit.

On the CPU the edit is written in C (`translation`, `native`), which takes a tenth of a second;
elsewhere, and where it takes operations that have no translation, `torch.compile` does the work.
The compiled function is the eager one, so that all give the same bits. Numbers in an edit's fields
and the random keys enter as values, so that a sweep over hyper-parameters compiles once.
"""

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from subprocess import CalledProcessError
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from deltalab.edits import Edit
from deltalab.kernels import native, translation
from deltalab.kernels.translation import Body, Program
from deltalab.rng import Keyed

KERNELS = ("auto", "eager", "compiled")
SMALLEST = 1 << 16
"""Elements from which `auto` compiles: below, eager slices cost less than a compiler ever saves."""
_STREAMS = 4
_broken: list[str] = []
_translating = Lock()
_programs: deque[tuple[Any, Any, Program | None]] = deque(maxlen=16)


def wanted(edit: Edit, count: int, kernel: str, device: str = "cpu") -> bool:
    """Return whether to run an edit of one tensor compiled.

    Args:
        edit: the edit.
        count: entries of the tensor.
        kernel: "auto" compiles for large tensors on the CPU; "eager" and "compiled" force either,
            as far as the edit can be compiled.
        device: type of the tensor's device.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel}: must be one of {', '.join(KERNELS)}")
    fusible = edit.unit == "entry" or edit.fuses
    able = fusible and set(edit.needs) <= {"rng", "grad", "quantile"} and 0 < count < 1 << 31
    large = count >= SMALLEST and device == "cpu"
    return able and not _broken and (kernel == "compiled" or (kernel == "auto" and large))


def edited(
    pre: Tensor,
    post: Tensor,
    edit: Edit,
    needs: Mapping[str, Any],
    body: Body,
    out: Tensor,
) -> bool:
    """Write one edited tensor by a compiled pass; return whether that was possible.

    Args:
        pre: pre-trained tensor.
        post: post-trained tensor.
        edit: the edit.
        needs: its keyword arguments, `rng`, `grad` and `quantile` at most; the last looks up what
            has been found, for the edit is recorded while it asks.
        body: the eager function of (pre, post, edit, needs) to compile.
        out: where to put the result, contiguous.
    """
    grads = [t for name, t in needs.items() if name == "grad"]
    dtypes = tuple(t.dtype for t in (pre, post, *grads))
    known = _known(needs)
    try:
        cpu = all(t.device.type == "cpu" for t in (pre, post, out, *grads))
        matrix = _sees_matrix(edit, post.shape)
        program = _program(edit, dtypes, matrix, body, known) if cpu else None
        if program is None and known:
            return False
        if program is None:
            out.copy_(_by_torch(pre, post, edit, needs, body))
        else:
            flat = [t.detach().contiguous().view(-1) for t in (pre, post, *grads)]
            native.edit(program, flat, needs.get("rng"), out.view(-1))
    except Exception as error:
        _give_up(error)
        return False
    return True


def edited_files(
    edit: Edit,
    dtypes: tuple[torch.dtype, torch.dtype],
    files: tuple[native.Place, native.Place, native.Place],
    shape: tuple[int, ...],
    needs: Mapping[str, Any],
    body: Body,
) -> bool:
    """Edit entries of a pair of files into a third; return whether that was possible.

    Args:
        edit: the edit.
        dtypes: of the pre-trained and of the post-trained tensor.
        files: where the entries of the one and of the other are, and where to write the result.
        shape: of the whole tensor; or for an edit of unit "entry" of any part of it.
        needs: its keyword arguments, `rng` of the first entry and `quantile` at most, as there.
        body: as for `edited`.
    """
    known, rng = _known(needs), needs.get("rng")
    try:
        program = _program(edit, dtypes, _sees_matrix(edit, shape), body, known)
        return program is not None and native.edit_files(program, files, prod(shape), rng)
    except Exception as error:
        _give_up(error)
        return False


def _give_up(error: Exception) -> None:
    """Say once why edits run eagerly from here on."""
    said = error.stderr.decode(errors="replace") if isinstance(error, CalledProcessError) else ""
    reason = (said.strip() or str(error).strip() or type(error).__name__).splitlines()[0]
    if not _broken:
        warnings.warn(f"edits run uncompiled, because compiling failed: {reason}", stacklevel=3)
    _broken.append(reason)


def _sees_matrix(edit: Edit, shape: Sequence[int]) -> bool:
    """Whether the edit is shown a tensor of this shape as a matrix, and not entry by entry."""
    return edit.unit != "entry" and len(shape) > 1


def _known(needs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is the same for all entries of a tensor: its share in model-wide thresholds."""
    return {name: need for name, need in needs.items() if name == "quantile"}


def _program(
    edit: Edit, dtypes: tuple[torch.dtype, ...], matrix: bool, body: Body, known: Mapping[str, Any]
) -> Program | None:
    """Return the edit in C, or None if it has no translation; for one tensor if more is known."""
    setting = (dtypes, matrix, body)
    with _translating:  # a stream's threads all come for the same one
        for edited_, its, program in _programs:
            if edited_ is edit and its == setting and not known:
                return program
        try:
            program = translation.program(edit, edit.needs, body, dtypes, matrix, known)
        except translation.Untranslatable:
            program = None
        if not known:
            _programs.append((edit, setting, program))
        return program


def _by_torch(pre: Tensor, post: Tensor, edit: Any, needs: Mapping[str, Any], body: Body) -> Tensor:
    shape, rng = post.shape, needs.get("rng")
    if _sees_matrix(edit, shape):
        flat = [t.detach().contiguous().flatten(1) for t in (pre, post)]
    else:
        flat = [t.detach().reshape(-1) for t in (pre, post)]
    keys = rng.keys(_STREAMS).to(post.device) if rng is not None else None
    grad = needs["grad"].detach().reshape(flat[1].shape) if "grad" in needs else None
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):
        made: Tensor = _compiled(body, torch.get_num_threads())(*flat, edit, keys, grad)
    return made.reshape(shape)


@lru_cache(maxsize=4)
def _compiled(body: Callable[..., Tensor], threads: int) -> Callable[..., Tensor]:
    """Return the compiled body; the number of threads is a constant of the code."""

    def traced(
        pre: Tensor, post: Tensor, edit: Edit, keys: Tensor | None, grad: Tensor | None
    ) -> Tensor:
        needs: dict[str, Any] = {}
        if keys is not None:
            needs["rng"] = Keyed(keys)
        if grad is not None:
            needs["grad"] = grad
        return body(pre, post, edit, needs)

    return torch.compile(traced, dynamic=True, fullgraph=True, options={"cpp.threads": threads})
