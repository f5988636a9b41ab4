"""Edits as one compiled pass over memory: read W_pre and W_post, edit, write W_edit.

On the CPU an edit is written in C (`translation`, `native`), which takes a tenth of a second and
gives the bits of the edit's own operations; what has no translation, and what is on another device,
is left to those. Numbers in an edit's fields and the random keys enter as values, so that a sweep
over hyper-parameters compiles once.
"""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from math import prod
from subprocess import CalledProcessError, SubprocessError
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from deltalab.edits import Edit
from deltalab.kernels import native, translation
from deltalab.kernels.translation import Body, Program

KERNELS = ("auto", "eager", "compiled")
SMALLEST = 1 << 16
"""Elements from which `auto` compiles: below, eager slices cost less than a compiler ever saves."""
_failed: dict[tuple[type[Edit], tuple[torch.dtype, ...]], str] = {}
"""Why the C of an edit and its dtypes could not be compiled; others are compiled all the same."""
_translating, _compiling = Lock(), Lock()
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
    return able and (kernel == "compiled" or (kernel == "auto" and large))


def edited(
    pre: Tensor,
    post: Tensor,
    edit: Edit,
    needs: Mapping[str, Any],
    body: Body,
    out: Tensor,
) -> list[float] | None:
    """Write one edited tensor by a compiled pass; return the sums of its terms, None if impossible.

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
    inputs = (pre, post, *grads)
    if any(t.device.type != "cpu" for t in (*inputs, out)):
        return None
    matrix = _sees_matrix(edit, post.shape)
    program = _program(edit, tuple(t.dtype for t in inputs), matrix, body, _known(needs))
    if program is None or not _compiles(edit, program):
        return None
    rng, width = needs.get("rng"), prod(post.shape[1:]) if program.rows or program.columns else 0
    if width and not native.within_page(post.numel(), rng):
        return None
    flat = [t.detach().contiguous().view(-1) for t in inputs]
    return native.edit(program, flat, rng, out.view(-1), width)


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
        shape: of the whole tensor; or for an edit of unit "entry" or "row" of any such part of it.
        needs: its keyword arguments, `rng` of the first entry and `quantile` at most, as there.
        body: as for `edited`.
    """
    program = _program(edit, dtypes, _sees_matrix(edit, shape), body, _known(needs))
    if program is None or program.columns or not _compiles(edit, program):
        return False  # sums over columns are taken in memory alone
    rng, width = needs.get("rng"), prod(shape[1:]) if program.rows else 0
    if width and not native.within_page(prod(shape), rng):
        return False
    return native.edit_files(program, files, prod(shape), rng, width)


def _compiles(edit: Edit, program: Program) -> bool:
    """Whether the C of an edit can be compiled here; where not, that is said once."""
    key = type(edit), program.dtypes
    with _compiling:  # a stream's threads all come for the same one
        if key in _failed:
            return False
        try:
            native.load(program)
        except (OSError, SubprocessError) as error:
            _failed[key] = reason = _reason(error)
            types = ", ".join(str(dtype).removeprefix("torch.") for dtype in program.dtypes)
            warnings.warn(
                f"edit {type(edit).__name__} ({types}) runs uncompiled, because compiling its C"
                f" failed: {reason}",
                stacklevel=4,
            )
            return False
    return True


def _reason(error: Exception) -> str:
    said = error.stderr.decode(errors="replace") if isinstance(error, CalledProcessError) else ""
    return (said.strip() or str(error).strip() or type(error).__name__).splitlines()[0]


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
