"""Signs and mean magnitude of a delta in one pass over memory, and signs put onto a base, in C.

D = W_post - W_pre in float32; magnitudes are added in float64, 64 sums of a piece and the pieces in
their order, so that no number of threads changes the sum. Packed as `codes.integers`. Both sides
are flat, contiguous, on the CPU, and of one type: bfloat16 or float32.
"""

import ctypes
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from deltalab.kernels import native

_loading = Lock()
_loaded: dict[torch.dtype, Any] = {}
_TYPES = {
    torch.bfloat16: "#define WORD uint16_t\n#define SHIFT 16\n",
    torch.float32: "#define WORD uint32_t\n#define SHIFT 0\n",
}
_SOURCE = r"""
#include <stdint.h>
#include <string.h>
#define N 64
#define MOST ((WORD)(0x7fffffffu >> SHIFT))
#define INFINITE (0x7f800000u >> SHIFT)

static inline float number(WORD word) {
    uint32_t bits = (uint32_t)word << SHIFT;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

static inline WORD stored(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (SHIFT) bits += 0x7fff + (bits >> 16 & 1);  /* to nearest, ties to even */
    return (WORD)(bits >> SHIFT);
}

/* N entries from `at` on, with zeros behind the last. */
static inline const WORD *block(const WORD *from, int64_t at, int64_t count, WORD *own) {
    if (at + N <= count) return from + at;
    memset(own, 0, N * sizeof(WORD));
    memcpy(own, from + at, (count - at) * sizeof(WORD));
    return own;
}

/* Return sum |b - a|; pack the signs; tell the largest |a| and |b|, as bits. */
double survey(int64_t count, const WORD *a, const WORD *b, uint8_t *signs, uint32_t *most) {
    double lanes[N] = {0}, sum = 0;
    WORD one[N] = {0}, other[N] = {0}, left[N], right[N];
    for (int64_t at = 0; at < count; at += N) {
        const WORD *x = block(a, at, count, left), *y = block(b, at, count, right);
        uint8_t negative[N], packed[N / 8];
        for (int j = 0; j < N; j++) {
            float d = number(y[j]) - number(x[j]);
            negative[j] = d < 0;
            lanes[j] += __builtin_fabsf(d);
        }
        for (int j = 0; j < N; j++) {
            WORD u = x[j] & MOST, v = y[j] & MOST;
            one[j] = u > one[j] ? u : one[j];
            other[j] = v > other[j] ? v : other[j];
        }
        for (int j = 0; j < N / 8; j++) {
            uint64_t eight;
            memcpy(&eight, negative + 8 * j, 8);
            packed[j] = eight * 0x8040201008040201u >> 56;
        }
        int64_t left_over = count - at < N ? count - at : N;
        memcpy(signs + at / 8, packed, (left_over + 7) / 8);
    }
    for (int j = 0; j < N; j++) {
        uint32_t u = (uint32_t)one[j] << SHIFT, v = (uint32_t)other[j] << SHIFT;
        sum += lanes[j];
        most[0] = u > most[0] ? u : most[0];
        most[1] = v > most[1] ? v : most[1];
    }
    return sum;
}

/* Whether some |b - a| is the scale, which is not zero. */
int meets(int64_t count, const WORD *a, const WORD *b, float scale) {
    WORD left[N], right[N];
    int found = 0;
    for (int64_t at = 0; at < count; at += N) {
        const WORD *x = block(a, at, count, left), *y = block(b, at, count, right);
        for (int j = 0; j < N; j++) found |= __builtin_fabsf(number(y[j]) - number(x[j])) == scale;
    }
    return found;
}

/* Write a + scale or a - scale; return whether all of a is finite. */
int onto(int64_t count, const WORD *a, const uint8_t *signs, float scale, WORD *out) {
    WORD most[N] = {0}, left[N], made[N];
    for (int64_t at = 0; at < count; at += N) {
        const WORD *x = block(a, at, count, left);
        int whole = at + N <= count;
        uint8_t octets[N / 8] = {0};
        memcpy(octets, signs + at / 8, whole ? N / 8 : (count - at + 7) / 8);
        for (int half = 0; half < N; half += 32) {
            const uint8_t *o = octets + half / 8;
            uint32_t word = (uint32_t)o[0] << 24 | o[1] << 16 | o[2] << 8 | o[3];
            for (int j = 0; j < 32; j++) {
                uint32_t bits;
                float step;
                memcpy(&bits, &scale, 4);
                bits ^= word << j & 0x80000000u;
                memcpy(&step, &bits, 4);
                made[half + j] = stored(number(x[half + j]) + step);
            }
        }
        for (int j = 0; j < N; j++) {
            WORD u = x[j] & MOST;
            most[j] = u > most[j] ? u : most[j];
        }
        memcpy(out + at, made, (whole ? N : count - at) * sizeof(WORD));
    }
    int finite = 1;
    for (int j = 0; j < N; j++) finite &= most[j] < INFINITE;
    return finite;
}
"""


@dataclass(frozen=True)
class Survey:
    """What one pass over a pair finds.

    Args:
        signs: uint8, a set bit for every D < 0.
        total: the sum of |D|.
        pre: the largest |W_pre|; infinite, or no number, where an entry is.
        post: the largest |W_post|, likewise.
    """

    signs: Tensor
    total: float
    pre: float
    post: float


def survey(pre: Tensor, post: Tensor) -> Survey:
    """Return the signs and the sum of magnitudes of a pair that `takes` takes.

    >>> found = survey(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, -1.0, 0.5]))
    >>> found.signs.tolist(), found.total, found.pre, found.post
    ([64], 5.0, 2.0, 3.0)
    """
    library, signs = _library(pre.dtype), torch.empty(-(-pre.numel() // 8), dtype=torch.uint8)

    def one(begin: int) -> tuple[float, Sequence[int]]:
        most = (ctypes.c_uint32 * 2)()
        own = signs.data_ptr() + begin // 8
        return library.survey(*_part((pre, post), begin), own, most), list(most)

    found = _pieces(one, pre.numel())
    tops = [max(each[side] for _, each in found) for side in (0, 1)]
    most = torch.tensor(tops, dtype=torch.int64).int().view(torch.float32).tolist()
    return Survey(signs, sum(total for total, _ in found), *most)


def meets(pre: Tensor, post: Tensor, scale: float) -> bool:
    """Whether some |D| is the scale, which float32 holds and which is not zero.

    >>> meets(torch.zeros(2), torch.tensor([1.0, -3.0]), 3.0)
    True
    """
    library = _library(pre.dtype)
    one = lambda begin: library.meets(*_part((pre, post), begin), scale)  # noqa: E731
    return any(_pieces(one, pre.numel()))


def onto(pre: Tensor, signs: Tensor, scale: float, out: Tensor) -> bool:
    """Write W_pre + scale or, where a bit is set, W_pre - scale.

    Returns:
        Whether all of W_pre is finite; if not, `out` is of no use.

    >>> made = torch.empty(2)
    >>> onto(torch.ones(2), torch.tensor([64], dtype=torch.uint8), 0.5, made), made.tolist()
    (True, [1.5, 0.5])
    """
    library = _library(pre.dtype)

    def one(begin: int) -> bool:
        count, start = _part((pre,), begin)
        place = out.data_ptr() + begin * out.itemsize
        return bool(library.onto(count, start, signs.data_ptr() + begin // 8, scale, place))

    return all(_pieces(one, pre.numel()))


def takes(*tensors: Tensor) -> bool:
    """Whether tensors are such as this takes, and there is a compiler; without one it says so."""
    first = tensors[0].dtype
    plain = all(t.dtype == first and t.is_cpu and t.is_contiguous() for t in tensors)
    return plain and first in _TYPES and tensors[0].numel() > 0 and _library(first) is not None


def _part(tensors: Sequence[Tensor], begin: int) -> tuple[int, ...]:
    count = min(native.PIECE, tensors[0].numel() - begin)
    return count, *(t.data_ptr() + begin * t.itemsize for t in tensors)


def _pieces(function: Callable[[int], Any], count: int) -> list[Any]:
    return native.in_threads(function, list(range(0, count, native.PIECE)))


def _library(dtype: torch.dtype) -> Any:
    """Return the library for a type, compiled once; None where that failed, which is said once."""
    with _loading:
        if dtype not in _loaded:
            try:
                _loaded[dtype] = _typed(native.built(_TYPES[dtype] + _SOURCE))
            except (OSError, subprocess.SubprocessError) as error:
                _loaded[dtype] = None
                warnings.warn(
                    f"signs run uncompiled, because compiling C failed: {error}", stacklevel=4
                )
        return _loaded[dtype]


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.survey.argtypes = [number, *[pointer] * 4]
    library.survey.restype = ctypes.c_double
    library.meets.argtypes = [number, pointer, pointer, ctypes.c_float]
    library.onto.argtypes = [number, pointer, pointer, ctypes.c_float, pointer]
    return library
