"""A second device without hardware: tensors that claim the meta device and compute on the CPU.

An operation on one of them and on a plain tensor of one dimension or more is refused, as between a
GPU and the CPU; so is reading one as a NumPy array. Copies cross over: `.to(...)`, `.cpu()`,
`copy_`. Within `lent()` factories and `.to("meta")` make such tensors too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("meta")
DEVICES = ["cpu", "second", *(["cuda"] if torch.cuda.is_available() else [])]
CROSSING = ("copy_", "_to_copy")


class Elsewhere(Tensor):
    """A tensor on the second device, around one on the CPU that holds its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        """Wrap a tensor of the CPU, whose memory is shared."""
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            dtype=held.dtype,
            device=SECOND,
            requires_grad=held.requires_grad,
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU, and keep the result here unless it was sent there."""
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name not in CROSSING and any(not isinstance(x, cls) and x.ndim for x in tensors):
            raise RuntimeError(f"{name}: tensors on two devices")
        to, here = kwargs.get("device"), True
        if to is not None:
            here, kwargs["device"] = torch.device(to) == SECOND, "cpu"
        elif name == "_to_copy":
            here = isinstance(args[0], cls)
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda x: cls(x) if here and isinstance(x, Tensor) else x, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


class _Lent(TorchDispatchMode):
    """Sends what is made for the second device, or copied to it, to `Elsewhere`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if to is not None and torch.device(to) == SECOND:
            return Elsewhere.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def lent() -> Iterator[None]:
    """Lend the second device, for what does not start from one of its tensors."""
    with _Lent():
        yield


def on(device: str, value: Tensor) -> Tensor:
    """Return a tensor's copy on one of `DEVICES`."""
    return Elsewhere(value.clone()) if device == "second" else value.clone().to(device)


def back(value: Tensor) -> Tensor:
    """Return the numbers of a tensor wherever it is."""
    return value.held if isinstance(value, Elsewhere) else value.cpu()
