"""Apply an edit to weights: one tensor, or lazily all selected tensors of a pair."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltalab.apply.audit import TERMS, Audit, summed, terms
from deltalab.apply.extras import SLICED, Extras, handed, thresholds
from deltalab.codes import Bits, Code
from deltalab.edits import Edit, Unit
from deltalab.edits.discard import Discard
from deltalab.edits.keep import Keep
from deltalab.kernels import fused
from deltalab.kernels.native import Place
from deltalab.kernels.translation import Body
from deltalab.linear.delta import difference
from deltalab.weights.aligned import is_parameter, saved_names
from deltalab.weights.mapping import LazyWeights, Weights, delta, meta
from deltalab.weights.select import selected

SLICE = {"cpu": 1 << 15, "cuda": 1 << 25}
"""Elements that an edit handles at once where it can: on a GPU enough to keep it busy; on a CPU few
enough for the cache, and for PyTorch not to start threads, whose barriers cost more than the work
as soon as the machine has anything else to do."""


def stored(pre: Tensor, post: Tensor, delta: Tensor, hat: Tensor) -> Tensor:
    """Return W_pre + D_hat in W_post's dtype, exact where the edit changed nothing or took all.

    Entries whose delta the edit kept have W_post's bits and entries whose delta it removed those of
    W_pre: adding a float32 delta back would round, and rounding is no part of the edit.
    """
    moved = (pre.float() + hat).to(post.dtype)
    return torch.where(hat == delta, post, torch.where(hat == 0, pre.to(post.dtype), moved))


def edited_tensor(
    pre: Tensor,
    post: Tensor,
    edit: Edit,
    kernel: str = "auto",
    out: Tensor | None = None,
    **needs: Any,
) -> Tensor:
    """Return one edited tensor, W_pre + F(W_post - W_pre), in W_post's dtype.

    Args:
        pre: floating-point tensor of any shape, strides and dtype.
        post: tensor of the same shape.
        edit: the edit F.
        kernel: "auto" compiles for large tensors, "eager" and "compiled" force either; the bits are
            the same.
        out: where to put the result, contiguous, of post's shape, dtype and device; None for a new
            tensor.
        needs: the keyword arguments that the edit declares, on whatever device.

    >>> from deltalab.edits.expo import Expo
    >>> edited_tensor(torch.tensor([1.0]), torch.tensor([1.5]), Expo(alpha=1.0))
    tensor([2.])
    """
    if out is None:
        out = torch.empty(post.shape, dtype=post.dtype, device=post.device)
    if isinstance(edit, Keep | Discard):
        return out.copy_(post if isinstance(edit, Keep) else pre)
    with torch.no_grad():
        _passed(pre, post, edit, kernel, out, _edited, handed(needs, post.device))
    return out


def audited_tensor(
    pre: Tensor, post: Tensor, edit: Edit, kernel: str = "auto", **needs: Any
) -> tuple[Tensor, list[float], Bits | None]:
    """Return one edited tensor, what its `audit.terms` add up to, and what its code takes.

    The last is that of `encode`, told without building the code where the edit can (`Edit.held`,
    `Edit.outline`), and None where there is none. Arguments as for `edited_tensor`.

    >>> from deltalab.edits.discard import Discard
    >>> edited, sums, bits = audited_tensor(torch.zeros(2), torch.tensor([3.0, 4.0]), Discard())
    >>> edited, sums, bits.payload
    (tensor([0., 0.]), [2.0, 25.0, 25.0, 25.0, 0.0], 0)
    """
    out = torch.empty(post.shape, dtype=post.dtype, device=post.device)
    needs = handed(needs, post.device)
    with torch.no_grad():
        sums, code = _passed(pre, post, edit, kernel, out, _audited, needs)
        if code is None and post.numel():
            code = edit.outline(tuple(post.shape), post.dtype, tuple(sums[TERMS:]), **needs)
        if code is None and type(edit).encode is not Edit.encode:
            code = edit.encode(difference(pre, post), post=post, **needs)
    return out, sums[:TERMS], None if code is None else code.bits


def _passed(
    pre: Tensor,
    post: Tensor,
    edit: Edit,
    kernel: str,
    out: Tensor,
    body: Body,
    needs: dict[str, Any],
) -> tuple[list[float], Code | None]:
    """Edit one tensor into `out`; return the sums, and the code where the edit has told it."""
    found = None
    if fused.wanted(edit, post.numel(), kernel, post.device.type):
        found = fused.edited(pre, post, edit, _found(edit, needs), body, out)
    if found is None and edit.unit == "tensor":
        delta, code = _whole_delta(pre, post), None
        if body is _edited:
            hat = edit(delta, **needs)
        else:
            hat, code = edit.outlined(delta, post.dtype, **needs)
        given = {"grad": hat.contiguous()}
        return _passed(pre, post, _GIVEN, kernel, out, body, given)[0], code
    return (_in_slices(pre, post, edit, needs, body, out) if found is None else found), None


def edited_files(
    edit: Edit,
    dtypes: tuple[torch.dtype, torch.dtype],
    files: tuple[Place, Place, Place],
    shape: tuple[int, ...],
    kernel: str = "auto",
    **needs: Any,
) -> bool:
    """Edit a tensor of a pair of files into a third, with the bits of `edited_tensor`.

    Args:
        edit: the edit.
        dtypes: of the pre-trained and of the post-trained tensor.
        files: where the entries of the one and of the other are, and where to write the result:
            file descriptors and positions in bytes.
        shape: of the tensor; or for an edit of unit "entry" or "row" of any such part of it.
        kernel: as for `edited_tensor`.
        needs: the keyword arguments that the edit declares.

    Returns:
        Whether it was done: false where it is no matter of compiled passes, or went wrong.
    """
    if not fused.wanted(edit, prod(shape), kernel) or "grad" in needs:
        return False
    return fused.edited_files(edit, dtypes, files, shape, _found(edit, needs), _edited)


def _found(edit: Edit, needs: dict[str, Any]) -> dict[str, Any]:
    """Return the needs with the model-wide thresholds found, before the edit is recorded."""
    if "quantile" not in needs:
        return needs
    return {**needs, "quantile": thresholds(edit, needs).__getitem__}


def _edited(pre: Tensor, post: Tensor, edit: Edit, needs: dict[str, Any]) -> Tensor:
    """The edit of one tensor or slice in full: the body of the compiled pass too."""
    delta = difference(pre, post)
    return stored(pre, post, delta, edit(delta, **needs))


def _audited(pre: Tensor, post: Tensor, edit: Edit, needs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The same, and after the result the terms of its audit and what its code holds."""
    delta = difference(pre, post)
    hat = edit(delta, **needs)
    held = edit.held(delta, **needs)
    if isinstance(edit, Keep | Discard):
        out = post if isinstance(edit, Keep) else pre.to(post.dtype)
    else:
        out = stored(pre, post, delta, hat)
    return out, *terms(pre, post, delta, hat, out), *([] if held is None else [held])


@dataclass(frozen=True)
class _Given(Edit):
    """An edited delta that has been found already, as that of an edit that sees all of a tensor."""

    unit: ClassVar[Unit] = "entry"

    def __call__(self, delta: Tensor, *, grad: Tensor) -> Tensor:
        return grad


_GIVEN = _Given()  # one, for which its program is found again


def _in_slices(
    pre: Tensor, post: Tensor, edit: Edit, needs: dict[str, Any], body: Body, out: Tensor
) -> list[float]:
    """Edit slice by slice, the same bits in bounded memory, and return the sums of all terms."""
    a, b, into = pre.reshape(-1), post.reshape(-1), out.view(-1)
    width = 1 if edit.unit == "entry" else prod(post.shape[1:]) if post.ndim > 1 else None
    sums: list[float] = []
    for part in _slices(post, width) if post.numel() else []:
        flat = post.shape if post.ndim < 1 else (-1,)
        shape = flat if edit.unit == "entry" or post.ndim < 2 else (-1, width or 1)
        given = {k: _sliced(k, v, part, shape) for k, v in needs.items()}
        made = body(a[part].reshape(shape), b[part].reshape(shape), edit, given)
        made, *terms = made if isinstance(made, tuple) else (made,)
        into[part] = made.reshape(-1)
        if terms:
            now = summed(terms)
            sums = [one + other for one, other in zip(sums or [0.0] * len(now), now, strict=True)]
    return sums or [0.0] * TERMS


def _whole_delta(pre: Tensor, post: Tensor) -> Tensor:
    """Return the delta for an edit that sees the whole tensor."""
    delta = torch.empty(post.shape, dtype=torch.float32, device=post.device)
    a, b, into = pre.reshape(-1), post.reshape(-1), delta.view(-1)
    for part in _slices(post, 1):
        into[part] = difference(a[part], b[part])
    return delta


def _slices(tensor: Tensor, width: int | None) -> list[slice]:
    """Cut the flat tensor into slices of whole rows of `width`; None leaves it in one."""
    size = SLICE.get(tensor.device.type, SLICE["cuda"])
    step = tensor.numel() if not width else max(1, size // width) * width
    return [slice(start, start + step) for start in range(0, tensor.numel(), step)]


def _sliced(name: str, value: Any, part: slice, shape: tuple[int, ...]) -> Any:
    """Return one need of an edit for a slice of the flat tensor."""
    if name not in SLICED:
        raise ValueError(f"an edit that runs in slices cannot ask for {name!r}")
    if name == "rng":
        return value.at(part.start)
    return value.reshape(-1)[part].reshape(shape) if name == "grad" else value


def edited(
    pre: Weights,
    post: Weights,
    edit: Edit,
    select: Any,
    extras: Extras,
    kernel: str = "auto",
    device: torch.device | str | None = None,
    audit: Audit | None = None,
) -> LazyWeights:
    """Return the selected floating-point tensors of a pair, edited one by one when asked for.

    Each comes back to where `post` has it.

    Args:
        pre: pre-trained weights.
        post: post-trained weights, same names and shapes.
        edit: the edit.
        select: a preset or a `select.Selection`.
        extras: provider of what the edit needs.
        kernel: as for `edited_tensor`; "auto" compiles for small tensors as well where a large one
            has the program compiled anyway.
        device: where to edit: that of the live model, where a GPU has it; None for where they are.
        audit: told what the edit does to each, if given.
    """
    touched = LazyWeights(chosen(post, select), post.__getitem__, partial(meta, post))
    deltas = delta(*(_moved(side, touched, device) for side in (pre, post)))
    kernels = _kernels(pre, post, touched, edit, kernel)

    def load(name: str) -> Tensor:
        old, new = pre[name], post[name]
        needs = extras.for_tensor(name, deltas)
        mine = extras.seen(edit, name, deltas)
        sides = old.to(device), new.to(device)
        if audit is None:
            return edited_tensor(*sides, mine, kernels[name], **needs).to(new.device)
        made, sums, bits = audited_tensor(*sides, mine, kernels[name], **needs)
        audit.add(name, new.numel(), sums, bits)
        return made.to(new.device)

    return LazyWeights(touched, load, touched.meta)


def _kernels(
    pre: Weights, post: Weights, names: Iterable[str], edit: Edit, kernel: str
) -> dict[str, str]:
    """Return the kernel of every tensor: compiled if it is for the largest of those like it."""
    if kernel != "auto" or edit.whole_model:  # what is known of each is recorded anew
        return dict.fromkeys(names, kernel)
    metas = {name: (meta(pre, name), meta(post, name)) for name in names}
    alike = {n: (a.dtype, b.dtype, len(b.shape) > 1) for n, (a, b) in metas.items()}
    large = {alike[n] for n, (_, b) in metas.items() if prod(b.shape) >= fused.SMALLEST}
    return {name: "compiled" if kind in large else kernel for name, kind in alike.items()}


def _moved(weights: Weights, names: Iterable[str], device: Any) -> LazyWeights:
    """Return some of the weights, each on a device when it is asked for."""
    return LazyWeights(names, lambda n: weights[n].to(device), partial(meta, weights))


def chosen(post: Weights, select: Any) -> list[str]:
    """Return the names of the floating-point parameters that a selection touches; reads none.

    A tied tensor has several names, as it was saved: it goes by the first that is selected.

    >>> chosen({"head.weight": torch.ones(2, 2), "steps": torch.tensor(3)}, "all")
    ['head.weight']
    """
    found = []
    for listed in post:
        shape = meta(post, listed).shape
        names = (n for n in saved_names(post, listed) if selected(select, n, shape))
        if not is_parameter(post, listed):
            continue
        if meta(post, listed).floating and (name := next(names, None)) is not None:
            found.append(name)
    return found
