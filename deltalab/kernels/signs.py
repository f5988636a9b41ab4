"""Signs and mean magnitude of a delta in one pass over memory, and signs put onto a base, in C.

D = W_post - W_pre in float32; magnitudes are added in float64, 64 sums of a piece and the pieces in
their order, so that no number of threads changes the sum. Packed as `codes.integers`. Both sides
are flat, contiguous, on the CPU, and of one type: bfloat16 or float32; they are asked for piece by
piece, so that a piece that is read is still in the cache when it is looked at.
"""

import ctypes
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from deltalab.kernels import native

_loading = Lock()
_loaded: dict[torch.dtype | None, Any] = {}
Sides = Callable[[int, int], tuple[Tensor, Tensor]]
PIECE = 1 << 19
"""Entries that are looked at at once: both sides stay in the cache."""
_SPAN = 4096
"""Entries of which the bits of all magnitudes are held together, as in the C; divides a piece."""
_TYPES: dict[torch.dtype | None, str] = {
    torch.bfloat16: "#define WORD uint16_t\n#define SHIFT 16\n",
    torch.float32: "#define WORD uint32_t\n#define SHIFT 0\n",
}
_SOURCE = r"""
#include <stdint.h>
#include <string.h>
#define N 64
#define SPAN 4096
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

/* Return sum |b - a|; pack the signs; tell the largest |a| and |b|, as bits, and for every SPAN
   entries which bits any |b - a| has. */
double survey(int64_t count, const WORD *a, const WORD *b, uint8_t *signs, uint32_t *held,
              uint32_t *most) {
    double lanes[N] = {0}, sum = 0;
    WORD one[N] = {0}, other[N] = {0}, left[N], right[N];
    for (int64_t begin = 0; begin < count; begin += SPAN) {
        int64_t end = begin + SPAN < count ? begin + SPAN : count;
        uint32_t any[N] = {0}, all = 0;
        for (int64_t at = begin; at < end; at += N) {
            const WORD *x = block(a, at, count, left), *y = block(b, at, count, right);
            uint8_t negative[N], packed[N / 8];
            for (int j = 0; j < N; j++) {
                float d = number(y[j]) - number(x[j]), size = __builtin_fabsf(d);
                uint32_t bits;
                memcpy(&bits, &size, 4);
                negative[j] = d < 0;
                any[j] |= bits;
                lanes[j] += size;
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
            memcpy(signs + at / 8, packed, at + N <= count ? N / 8 : (count - at + 7) / 8);
        }
        for (int j = 0; j < N; j++) all |= any[j];
        held[begin / SPAN] = all;
    }
    for (int j = 0; j < N; j++) {
        uint32_t u = (uint32_t)one[j] << SHIFT, v = (uint32_t)other[j] << SHIFT;
        sum += lanes[j];
        most[0] = u > most[0] ? u : most[0];
        most[1] = v > most[1] ? v : most[1];
    }
    return sum;
}

/* Whether some |b - a| is the scale, which is not zero; what lacks its bits is passed by. */
int meets(int64_t count, const WORD *a, const WORD *b, const uint32_t *held, float scale) {
    WORD left[N], right[N];
    uint32_t bits;
    int found = 0;
    memcpy(&bits, &scale, 4);
    for (int64_t begin = 0; begin < count && !found; begin += SPAN) {
        int64_t end = begin + SPAN < count ? begin + SPAN : count;
        if ((held[begin / SPAN] & bits) != bits) continue;
        for (int64_t at = begin; at < end; at += N) {
            const WORD *x = block(a, at, count, left), *y = block(b, at, count, right);
            for (int j = 0; j < N; j++)
                found |= __builtin_fabsf(number(y[j]) - number(x[j])) == scale;
        }
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
        held: int32, for every 4,096 entries the bits that any |D| of theirs has.
        total: the sum of |D|.
        pre: the largest |W_pre|; infinite, or no number, where an entry is.
        post: the largest |W_post|, likewise.
    """

    signs: Tensor
    held: Tensor
    total: float
    pre: float
    post: float


def survey(count: int, dtype: torch.dtype, sides: Sides) -> Survey:
    """Return the signs and the sum of magnitudes of a pair.

    Args:
        count: entries.
        dtype: of both sides, one that `takes` takes.
        sides: gives W_pre and W_post from an entry up to another, to a thread until it asks again.

    >>> pair = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, -1.0, 0.5])
    >>> found = survey(3, torch.float32, lambda start, stop: pair)
    >>> found.signs.tolist(), found.total, found.pre, found.post
    ([64], 5.0, 2.0, 3.0)
    """
    library, signs = _library(dtype), torch.empty(-(-count // 8), dtype=torch.uint8)
    held = torch.empty(-(-count // _SPAN), dtype=torch.int32)

    def one(begin: int) -> tuple[float, list[int]]:
        size, most = min(PIECE, count - begin), (ctypes.c_uint32 * 2)()
        pre, post = sides(begin, begin + size)
        own = signs[begin // 8 :].data_ptr(), held[begin // _SPAN :].data_ptr()
        return library.survey(size, pre.data_ptr(), post.data_ptr(), *own, most), list(most)

    found = native.in_threads(one, list(range(0, count, PIECE)))
    tops = [max(each[side] for _, each in found) for side in (0, 1)]
    most = torch.tensor(tops, dtype=torch.int64).int().view(torch.float32).tolist()
    return Survey(signs, held, sum(total for total, _ in found), *most)


def meets(count: int, dtype: torch.dtype, sides: Sides, held: Tensor, scale: float) -> bool:
    """Whether some |D| is the scale, which float32 holds and which is not zero.

    Only pieces of which some |D| may be it are asked for: those with all its bits in `held`.

    >>> pair = torch.zeros(2), torch.tensor([1.0, -3.0])
    >>> given = 2, torch.float32, lambda start, stop: pair
    >>> meets(*given, survey(*given).held, 3.0), meets(*given, survey(*given).held, 2.0)
    (True, False)
    """
    library = _library(dtype)
    bits = torch.tensor(scale, dtype=torch.float32).view(torch.int32)
    spans = ((held & bits) == bits).nonzero().reshape(-1) * _SPAN

    def one(begin: int) -> bool:
        stop = min(begin + PIECE, count)
        pre, post = sides(begin, stop)
        own = held[begin // _SPAN :].data_ptr()
        return bool(library.meets(stop - begin, pre.data_ptr(), post.data_ptr(), own, scale))

    return any(native.in_threads(one, sorted({at // PIECE * PIECE for at in spans.tolist()})))


def onto(pre: Tensor, signs: Tensor, scale: float, out: Tensor) -> bool:
    """Write W_pre + scale or, where a bit is set, W_pre - scale.

    Returns:
        Whether all of W_pre is finite; if not, `out` is of no use.

    >>> made = torch.empty(2)
    >>> onto(torch.ones(2), torch.tensor([64], dtype=torch.uint8), 0.5, made), made.tolist()
    (True, [1.5, 0.5])
    """
    places = pre.data_ptr(), signs.data_ptr(), scale, out.data_ptr()
    return bool(_library(pre.dtype).onto(pre.numel(), *places))


def takes(*dtypes: torch.dtype | None) -> bool:
    """Whether tensors of such types can be taken: a compiler is there; without one that is said."""
    first = dtypes[0]
    return first in _TYPES and set(dtypes) == {first} and _library(first) is not None


def _library(dtype: torch.dtype | None) -> Any:
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
    library.survey.argtypes = [number, *[pointer] * 5]
    library.survey.restype = ctypes.c_double
    library.meets.argtypes = [number, *[pointer] * 3, ctypes.c_float]
    library.onto.argtypes = [number, pointer, pointer, ctypes.c_float, pointer]
    return library
