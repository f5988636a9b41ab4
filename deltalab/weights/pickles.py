"""PyTorch's own files (`.bin`, `.pt`, `.pth`), which are pickles: read for their tensors alone.

A pickle is a program. Before anything is loaded, its instructions are listed and every object they
name must be one of those that rebuild a tensor; then PyTorch loads it, with `weights_only` too.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltalab.weights.headers import plain

ENDINGS = (".bin", ".pt", ".pth")
LONGEST = 100_000_000
_DTYPES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in _DTYPES),
}
"""What the pickle of a state dict names; nothing in here runs code or reserves memory."""


def read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a PyTorch file, mapped into memory.

    A state dict may also lie under `state_dict` or `model`, where trainers put it.

    Raises:
        ValueError: the file is damaged, names anything that is not part of a tensor, or holds
            anything but tensors by name.
    """
    _check(file)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever a broken file makes of it
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise _invalid(file, reason) from None
    for key in ("state_dict", "model"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    if not isinstance(held, dict) or not held:
        raise _invalid(file, f"a {type(held).__name__} instead of tensors by name")
    size = file.stat().st_size
    for name, tensor in held.items():
        _check_tensor(file, name, tensor, size)
    return {
        name: tensor.detach() for name, tensor in held.items()
    }  # a parameter asks for gradients


def _check(file: Path) -> None:
    """Read the instructions without following them; refuse all but the rebuilding of tensors."""
    entries = _listed(file)
    programs = [e for e in entries if e.filename.endswith("/data.pkl")]
    if len(programs) != 1:
        raise _invalid(file, "no data.pkl in it")
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise _invalid(file, "its contents are compressed, which PyTorch never does")
    if sum(e.file_size for e in entries) > file.stat().st_size:
        raise _invalid(file, "its entries overlap")
    if programs[0].file_size > LONGEST:
        raise _invalid(file, f"data.pkl has more than {LONGEST} bytes")
    try:
        with zipfile.ZipFile(file) as archive:
            program = archive.read(programs[0])
    except Exception as error:  # as below
        raise _invalid(file, f"data.pkl: {error}") from None
    for named in _named(file, program):
        if named not in ALLOWED:
            raise ValueError(
                f"{file}: refused, it would call {plain(named.replace(' ', '.')[:100])}, which is"
                " no part of a tensor; convert it to safetensors where you trust it"
            )


def _listed(file: Path) -> list[zipfile.ZipInfo]:
    """Return the directory of the archive that a PyTorch file is."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except Exception as error:  # the parser raises whatever a broken archive makes of it
        with open(file, "rb") as handle:
            bare = handle.read(1) == b"\x80"
        old = "written by PyTorch before 1.6, or a bare pickle; convert it to safetensors"
        raise _invalid(file, old if bare else f"{error}; an incomplete download?") from None


def _named(file: Path, program: bytes) -> list[str]:
    """Return all objects that a pickle names, as `module name`."""
    try:
        steps = [(code.name, argument) for code, argument, _ in pickletools.genops(program)]
    except Exception as error:  # the parser raises whatever a broken pickle makes of it
        raise _invalid(file, f"data.pkl is damaged ({type(error).__name__})") from None
    hidden = {name for name, _ in steps} & {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "OBJ"}
    if hidden:
        raise ValueError(f"{file}: refused, its pickle names objects by {min(hidden)}")
    return [str(argument) for name, argument in steps if name == "GLOBAL"]


def _check_tensor(file: Path, name: Any, tensor: Any, size: int) -> None:
    if not isinstance(name, str):
        raise _invalid(file, f"a tensor's name is {str(name)[:80]!r}, not a text")
    if not isinstance(tensor, Tensor):
        raise _invalid(
            file,
            f"{name[:80]!r} is of type {type(tensor).__name__}, no tensor; save the weights alone",
        )
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise _invalid(file, f"tensor {name[:80]!r} is not an ordinary one")
    if tensor.numel() * tensor.element_size() > size:  # strides of 0 make much out of little
        raise _invalid(file, f"tensor {name[:80]!r} of shape {tuple(tensor.shape)} exceeds it")


def _invalid(file: Path, reason: str) -> ValueError:
    return ValueError(plain(f"{file}: not a readable PyTorch file ({reason})"))
