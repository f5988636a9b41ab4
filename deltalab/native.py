"""Run edits as machine code: C programs (`translation`) compiled by the system's compiler.

That takes a tenth of a second. The compiler may neither contract nor reorder what is rounded, so
that the bits are those of the edit's own tensor operations. The code runs without the interpreter's
lock, so that threads share a tensor, or read, edit and write at once.
"""

import ctypes
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from deltalab.rng import Rng
from deltalab.translation import Program

Place = tuple[int, int]
"""A file descriptor and the position in it of the first byte."""
PIECE = 1 << 20
"""Entries that a thread takes at once: a millisecond or so of work."""
_PAGE = 1 << 32
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_RESULTS = {"void": None, "double": ctypes.c_double, "bool": ctypes.c_bool}


def edit(program: Program, tensors: Sequence[Tensor], rng: Rng | None, out: Tensor) -> None:
    """Write the edited tensor to `out`, by as many threads as PyTorch uses.

    Args:
        program: the edit.
        tensors: pre, post and, where the edit asks for it, the gradient: equally long, flat,
            contiguous, on the CPU, of the dtypes the program was made for.
        rng: the random numbers of the tensor, or None.
        out: of post's length and dtype.

    >>> from deltalab.edits.expo import Expo
    >>> from deltalab.translation import program
    >>> add = lambda pre, post, edit, needs: pre + edit(post - pre)
    >>> made = program(Expo(alpha=0.5), (), add, (torch.float32, torch.float32))
    >>> a, b, out = torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), torch.empty(3)
    >>> edit(made, [a, b], None, out)
    >>> out
    tensor([1.5000, 3.0000, 6.0000])
    """
    library, count = _compiled(program.source), out.numel()
    numbers, sums = _doubles(program.numbers), _doubles([0.0] * program.totals)

    def run(name: str, piece: tuple[int, int]) -> float:
        begin, size = piece
        a, b, *grad, made = (t.data_ptr() + begin * t.itemsize for t in (*tensors, out))
        slope = grad[0] if grad else None
        keys = _keys(program, rng and rng.at(begin))
        total: float = getattr(library, name)(
            0, size, a, b, slope, made, keys, numbers, sums, count
        )
        return total

    pieces = list(_pieces(count, 0 if rng is None else rng.start))
    for index in range(program.totals):  # in the order of the pieces, whichever was done first
        sums[index] = sum(_each(partial(run, f"total_{index}"), pieces))
    _each(partial(run, "edit"), pieces)


def edit_files(
    program: Program, files: tuple[Place, Place, Place], count: int, rng: Rng | None
) -> bool:
    """Read, edit and write entries by one thread.

    Args:
        program: the edit.
        files: where the entries of pre and of post are, and where to write the result.
        count: how many entries.
        rng: the random numbers of the first entry and those after it, or None.

    Returns:
        Whether it was done: false if a file ends early or cannot be written, if an entry of the
        result is not finite, or if the edit takes a sum or a gradient.
    """
    function = getattr(_compiled(program.source), "edit_files", None)
    if function is None or (rng and rng.start % _PAGE + count > _PAGE):
        return False
    places = (number for place in files for number in place)
    return bool(function(count, *places, _keys(program, rng), _doubles(program.numbers)))


def _keys(program: Program, rng: Rng | None) -> Any:
    """Return the key words of the streams that a program reads."""
    forks = [] if rng is None else [(reduce(Rng.fork, f, rng), n) for f, n in program.streams]
    words = [word for own, stream in forks for word in own.words(stream)]
    return (ctypes.c_int32 * max(1, len(words)))(*words)


def _doubles(values: Sequence[float]) -> Any:
    return (ctypes.c_double * max(1, len(values)))(*values)


def _pieces(count: int, start: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, size) of pieces whose random indices do not cross a page."""
    begin = 0
    while begin < count:
        size = min(PIECE, count - begin, _PAGE - (start + begin) % _PAGE)
        yield begin, size
        begin += size


def _each(function: Callable[[Any], Any], pieces: list[Any]) -> list[Any]:
    """Return the results for all pieces, in their order, by as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2:
        return list(map(function, pieces))
    return list(_pool(torch.get_num_threads(), os.getpid()).map(function, pieces))


@lru_cache(maxsize=2)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads that outlive a call; those of a parent process do not survive its fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="edit")


@lru_cache(maxsize=256)
def _compiled(source: str) -> Any:
    """Compile a C program and load it; nothing stays on disk.

    Raises:
        OSError, subprocess.SubprocessError: there is no working compiler.
    """
    compiler = [*shlex.split(os.environ.get("CC", "cc")), "-O3", "-shared", "-fPIC", *_EXACT]
    with TemporaryDirectory(prefix="deltalab-") as directory:
        code, library = Path(directory, "edit.c"), Path(directory, "edit.so")
        code.write_text(source)
        for more in (_vectors(), []):  # not every compiler knows the processor it runs on
            done = subprocess.run([*compiler, *more, "-o", library, code], capture_output=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        loaded = ctypes.CDLL(str(library))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = [number, number, *[pointer] * 7, number]
    for kind, name in re.findall(r"^(void|double|bool) (\w+)\(", source, re.MULTILINE):
        function = getattr(loaded, name)
        function.restype, function.argtypes = _RESULTS[kind], arguments
        if name == "edit_files":
            function.argtypes = [number, *[ctypes.c_int, number] * 3, pointer, pointer]
    return loaded


def _vectors() -> list[str]:
    """Return what makes the compiler use all of this processor."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    return ["-march=native", *wide]
