"""Run edits as machine code: C programs (`translation`) compiled by the system's compiler.

That takes a tenth of a second. The compiler may neither contract nor reorder what is rounded, so
that the bits are those of the edit's own tensor operations. The code runs without the interpreter's
lock, so that threads share a tensor, or read, edit and write at once.
"""

import ctypes
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial, reduce
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from deltalab.kernels.translation import Program
from deltalab.rng import Rng
from deltalab.settings import COMPILER

Place = tuple[int, int]
"""A file descriptor and the position in it of the first byte."""
PIECE = 1 << 20
"""Entries that a thread takes at once: a millisecond or so of work."""
SPREAD = 11
"""Numbers that tell the spread of a piece: the nine of `codes.indexed.spread`, and the gaps at both
ends, of which the nine hold neither."""
_PAGE = 1 << 32
_compiling = Lock()
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


def edit(
    program: Program, tensors: Sequence[Tensor], rng: Rng | None, out: Tensor, width: int = 0
) -> list[float]:
    """Write the edited tensor to `out`, by as many threads as PyTorch uses.

    Args:
        program: the edit.
        tensors: pre, post and, where the edit asks for it, the gradient: equally long, flat,
            contiguous, on the CPU, of the dtypes the program was made for.
        rng: the random numbers of the tensor, or None.
        out: of post's length and dtype.
        width: of the tensor's rows, where the program takes sums over each or over columns.

    Returns:
        What the program's terms add up to, in an order that no number of threads changes.

    Raises:
        ValueError: a tensor is not on the CPU, where alone its address can be read.

    >>> from deltalab.edits.expo import Expo
    >>> from deltalab.kernels.translation import program
    >>> add = lambda pre, post, edit, needs: pre + edit(post - pre)
    >>> made = program(Expo(alpha=0.5), (), add, (torch.float32, torch.float32))
    >>> a, b, out = torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), torch.empty(3)
    >>> edit(made, [a, b], None, out)
    []
    >>> out
    tensor([1.5000, 3.0000, 6.0000])
    """
    for tensor in (*tensors, out):
        if tensor.device.type != "cpu":
            raise ValueError(f"an edit in C takes tensors on the CPU, not on {tensor.device}")
    library, whole = load(program), out.numel()
    numbers = _doubles(program.numbers)
    terms: dict[int, Any] = {}

    def run(stage: int, sums: Any, piece: tuple[int, int]) -> float:
        begin, size = piece
        count = program.terms + (SPREAD - 1) * program.spread
        own = terms[begin] = _doubles([0.0] * (width if stage < program.columns else count))
        a, b, *grad, made = (t.data_ptr() + begin * t.itemsize for t in (*tensors, out))
        slope, keys = grad[0] if grad else None, _keys(program, rng and rng.at(begin))
        more = keys, numbers, sums, whole, own, width
        total: float = library.in_memory(stage, size, a, b, slope, made, *more)
        return total

    if program.columns:
        pieces = list(_pieces(whole, 0 if rng is None else rng.start, width))
        in_threads(partial(run, 0, None), pieces)
        columns = torch.zeros(width, dtype=torch.float64)
        for begin in sorted(terms):
            columns += torch.frombuffer(terms[begin], dtype=torch.float64)
        in_threads(partial(run, 1, columns.data_ptr()), pieces)
    else:
        _stages(program, whole, rng, run, width)
    # a sum that is no number makes entries that are none
    each = [list(terms[begin]) for begin in sorted(terms)]  # of the last stage
    plain = program.terms - program.spread
    sums = [sum(piece[index] for piece in each) for index in range(plain)]
    return [*sums, *_joined([piece[plain:] for piece in each])] if program.spread else sums


def _joined(pieces: list[list[float]]) -> list[float]:
    """Return the spread of a tensor from those of its pieces, whose gaps go on into the next."""
    total, since = [0.0] * (SPREAD - 2), 0.0
    for *found, first, after in pieces:
        if found[0]:
            gap = int(since + first)
            total = [one + other for one, other in zip(total, found, strict=True)]
            total[1:] = [n + gap // ((1 << w) - 1) for w, n in enumerate(total[1:], start=1)]
            since = 0.0
        since += after
    return total


def edit_files(
    program: Program,
    files: tuple[Place, Place, Place],
    count: int,
    rng: Rng | None,
    width: int = 0,
) -> bool:
    """Read, edit and write a tensor or a part of one, by as many threads as PyTorch uses.

    Args:
        program: the edit, of two inputs. If it takes sums over the tensor, the whole tensor must
            be given.
        files: where the entries of pre and of post are, and where to write the result.
        count: how many entries.
        rng: the random numbers of the first entry and those after it, or None.
        width: as for `edit`.

    Returns:
        Whether it was done: false if a file ends early or cannot be written, or if an entry of any
        of the three is not finite.
    """
    library, numbers = load(program), _doubles(program.numbers)
    pre, post = program.dtypes
    sizes = (pre.itemsize, post.itemsize, post.itemsize)

    def run(stage: int, sums: Any, piece: tuple[int, int]) -> float:
        begin, size = piece
        each = zip(files, sizes, strict=True)
        places = (n for (file, at), item in each for n in (file, at + begin * item))
        keys = _keys(program, rng and rng.at(begin))
        more = keys, numbers, sums, count, width
        total: float = library.in_files(stage, size, *places, *more)
        return total

    return not any(map(isnan, _stages(program, count, rng, run, width)))


def _stages(
    program: Program,
    count: int,
    rng: Rng | None,
    run: Callable[[int, Any, tuple[int, int]], float],
    width: int,
) -> list[float]:
    """Run the stages of a program, each with the sums of those before it, and return all sums."""
    pieces = list(_pieces(count, 0 if rng is None else rng.start, width))
    sums = _doubles([0.0] * (program.totals + 1))
    for stage in range(program.totals + 1):  # in the order of the pieces, whichever was done first
        sums[stage] = sum(in_threads(partial(run, stage, sums), pieces))
    return list(sums)


def _keys(program: Program, rng: Rng | None) -> Any:
    """Return the key words of the streams that a program reads."""
    forks = [] if rng is None else [(reduce(Rng.fork, f, rng), n) for f, n in program.streams]
    words = [word for own, stream in forks for word in own.words(stream)]
    return (ctypes.c_int32 * max(1, len(words)))(*words)


def _doubles(values: Sequence[float]) -> Any:
    return (ctypes.c_double * max(1, len(values)))(*values)


def _pieces(count: int, start: int, width: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (begin, size) of pieces, of whole rows if any, whose indices do not cross a page."""
    begin, most = 0, max(width, PIECE // width * width) if width else PIECE
    while begin < count:
        size = min(most, count - begin, _PAGE - (start + begin) % _PAGE)
        yield begin, size
        begin += size


def within_page(count: int, rng: Rng | None) -> bool:
    """Whether the random indices of so many entries stay within a page, as rows must."""
    return rng is None or rng.start % _PAGE + count <= _PAGE


def in_threads(function: Callable[[Any], Any], pieces: list[Any]) -> list[Any]:
    """Return the results for all pieces, in their order, by as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2:
        return list(map(function, pieces))
    return list(_pool(torch.get_num_threads(), os.getpid()).map(function, pieces))


@lru_cache(maxsize=2)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads that outlive a call; those of a parent process do not survive its fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="edit")


def load(program: Program) -> Any:
    """Return the loaded program, compiled by the first thread that asks for it.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it refuses the program.
    """
    with _compiling:
        return _compiled(program.source)


@lru_cache(maxsize=256)
def _compiled(source: str) -> Any:
    """Compile the C of an edit and load it."""
    loaded = built(source)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    numbers: list[Any] = [pointer, pointer, pointer, number]  # keys, numbers, sums, whole
    loaded.in_memory.argtypes = [number, number, *[pointer] * 4, *numbers, pointer, number]
    loaded.in_files.argtypes = [number, number, *[ctypes.c_int, number] * 3, *numbers, number]
    for function in (loaded.in_memory, loaded.in_files):
        function.restype = ctypes.c_double
    return loaded


def built(source: str) -> ctypes.CDLL:
    """Compile a C program and load it; nothing stays on disk.

    Raises:
        OSError, subprocess.SubprocessError: there is no working compiler.
    """
    compiler = [*shlex.split(COMPILER), "-O3", "-shared", "-fPIC", *_EXACT]
    with TemporaryDirectory(prefix="deltalab-") as directory:
        code, library = Path(directory, "edit.c"), Path(directory, "edit.so")
        code.write_text(source)
        for more in (_vectors(), []):  # not every compiler knows the processor it runs on
            done = subprocess.run([*compiler, *more, "-o", library, code], capture_output=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        return ctypes.CDLL(str(library))


def _vectors() -> list[str]:
    """Return what makes the compiler use all of this processor."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    return ["-march=native", *wide]
