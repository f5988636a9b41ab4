"""Counter-based random numbers: bits are a hash of (seed, tensor name, stream, element index).

There is no state and no generator, so a mask does not depend on the order of the tensors, on the
shard split, on the device, or on what else draws random numbers in the process. The hash is written
in plain int32 tensor operations, whose multiplication wraps everywhere alike, so that eager,
compiled, CPU and GPU runs give identical bits and a compiler fuses them into the edit.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Words = np.ndarray[Any, np.dtype[np.uint32]]
_CACHED = 1 << 13
"""Words that NumPy mixes at once."""
_WORD = 1 << 32
_HALF = 1 << 31


def signed(word: int) -> int:
    """Return the int32 whose two's complement pattern is `word` modulo 2^32.

    >>> signed(2**32 - 1), signed(2**31), signed(5)
    (-1, -2147483648, 5)
    """
    return (word + _HALF) % _WORD - _HALF


_M1, _M2, _M3 = signed(0xED5AD4BB), signed(0xAC4C1B51), signed(0x31848BAB)


def mix(counter: Tensor, key0: int | Tensor, key1: int | Tensor) -> Tensor:
    """Hash int32 counters under a 64-bit key: a keyed permutation of the 2^32 words.

    Three multiply-xorshift rounds. The first key word shifts the counter; the second enters after
    the first round, so that two tensors never read shifted windows of one sequence.

    Args:
        counter: int32, any shape.
        key0: first key word, an int32 number or a 0-dimensional int32 tensor.
        key1: second key word, likewise.

    Returns:
        int32 of the counter's shape, uniform over all 2^32 words.
    """
    x = counter + key0
    x = (x ^ ((x >> 17) & 0x7FFF)) * _M1
    x = (x ^ ((x >> 11) & 0x1FFFFF)) + key1
    x = x * _M2
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _M3
    return x ^ ((x >> 14) & 0x3FFFF)


@lru_cache(maxsize=65536)
def key(seed: int, name: str, stream: int, high: int, salt: str = "") -> tuple[int, int]:
    """Return the two key words of one tensor, stream, and 2^32-element page of its indices."""
    text, apart = f"{seed}/{stream}/{high}/{name}".encode(), hashlib.sha256(salt.encode()).digest()
    digest = hashlib.blake2b(
        text, digest_size=8, person=b"deltalab", salt=apart[:16] if salt else b""
    ).digest()
    return signed(int.from_bytes(digest[:4], "little")), signed(
        int.from_bytes(digest[4:], "little")
    )


class Draws:
    """Distributions over the bits that a subclass supplies; plain tensor operations alone."""

    def bits(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return 32 random bits per element of `like`."""
        raise NotImplementedError

    def uniform(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return float32 numbers uniform on the multiples of 2^-24 in [0, 1)."""
        return ((self.bits(like, stream) >> 8) + (1 << 23)).to(torch.float32) * 2.0**-24

    def below(self, like: Tensor, p: float | Tensor, stream: int = 0) -> Tensor:
        """Return a boolean tensor that is true with probability p (to 2^-24; exact at 0 and 1).

        Args:
            like: gives the shape and the device.
            p: probability in [0, 1], or one for every element.
            stream: independent numbers for the same element.
        """
        if isinstance(p, Tensor):
            return self.uniform(like, stream) < p
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        limit = (zero + (p * (1 << 24) - (1 << 23))).to(torch.int32)  # a sum, lest p be compiled in
        return (self.bits(like, stream) >> 8) < limit  # integers: less to compute

    def normal(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return float32 standard normal numbers (Box-Muller over streams 2s and 2s + 1).

        Logarithm, root and sine are made of operations that IEEE 754 rounds one way: PyTorch's own
        differ in the last bit between vector and scalar code, and so between slices.
        """
        radius = _root((-2 * _log(1 - self.uniform(like, 2 * stream))).abs())
        quarter = 0.25 - (self.uniform(like, 2 * stream + 1) - 0.5).abs()
        return radius * _sine(quarter * (2 * math.pi))


def _log(x: Tensor) -> Tensor:
    """Return the natural logarithm of normal float32 numbers in (0, 1], to 2e-7 absolute or so.

    x = 2^e m with m in [1, 2), and log m = 2 artanh t with t = (m - 1)/(m + 1) at most 1/3.
    """
    word = x.view(torch.int32)
    exponent = ((word >> 23) - 127).to(torch.float32)
    m = ((word & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    t = (m - 1) / (m + 1)
    return exponent * math.log(2) + 2 * t * _horner(t * t, [1 / n for n in (1, 3, 5, 7, 9, 11, 13)])


def _root(x: Tensor) -> Tensor:
    """Return the square root of non-negative float32 numbers, by three of Newton's steps."""
    root = ((x.view(torch.int32) >> 1) + 0x1FBD1DF5).view(torch.float32)
    for _ in range(3):
        root = 0.5 * (root + x / root)
    return root


def _sine(x: Tensor) -> Tensor:
    """Return the sine on [-pi/2, pi/2], to 1e-7 or so."""
    terms = [(-1) ** n / math.factorial(2 * n + 1) for n in range(7)]
    return x * _horner(x * x, terms)


def _horner(x: Tensor, coefficients: list[float]) -> Tensor:
    """Return the polynomial with these coefficients, constant first."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


@dataclass(frozen=True)
class Rng(Draws):
    """The random numbers of one tensor, or of a slice of it.

    Attributes:
        seed: the experiment's seed.
        name: the tensor's name.
        start: flat (row-major) index, in the whole tensor, of the first element of the slice.
        salt: gives other numbers to the tensor of this name in another model.

    >>> whole = Rng(0, "w").bits(torch.empty(2, 3))
    >>> tail = Rng(0, "w", start=4).bits(torch.empty(2))
    >>> bool((whole.flatten()[4:] == tail).all())
    True
    """

    seed: int
    name: str
    start: int = 0
    salt: str = ""

    def fork(self, label: str) -> "Rng":
        """Return independent numbers for the same elements, such as for one step of a chain."""
        return replace(self, name=f"{self.name}/{label}")

    def at(self, offset: int) -> "Rng":
        """Return the numbers of the slice that starts `offset` elements further."""
        return replace(self, start=self.start + offset)

    def words(self, stream: int, offset: int = 0) -> tuple[int, int]:
        """Return the two key words of a stream with which the counter at `offset` is zero."""
        high, low = divmod(self.start + offset, _WORD)
        key0, key1 = key(self.seed, self.name, stream, high, self.salt)
        return signed(key0 + low), key1

    def bits(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return 32 random bits per element.

        Args:
            like: gives the shape and the device.
            stream: independent numbers for the same element.

        Returns:
            Contiguous int32 tensor of `like`'s shape.
        """
        position, end = self.start, self.start + like.numel()
        pieces: list[Tensor] = []
        while position < end or not pieces:
            count = min(end - position, _WORD - position % _WORD)
            words = self.words(stream, position - self.start)
            pieces.append(mix(_counters(count, like.device), *words))
            position += count
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat.reshape(like.shape)

    def kept(self, count: int, p: float) -> Tensor:
        """Return where `below` is false for the first `count` elements, in two fifths of its time.

        The same bits as of a flat tensor, by NumPy in place, whose words stay in the cache.

        Args:
            count: elements.
            p: probability in [0, 1].

        >>> rng, like = Rng(0, "w", start=2**32 - 5), torch.empty(9)
        >>> torch.equal(rng.kept(9, 0.4), ~rng.below(like, 0.4))
        True
        """
        out = np.empty(count, dtype=np.bool_)
        x, y = (np.empty(min(count, _CACHED), dtype=np.uint32) for _ in range(2))
        limit, begin = np.int32(int(p * (1 << 24) - (1 << 23))), 0
        counters = np.arange(len(x), dtype=np.uint32)
        while begin < count:
            size = min(_CACHED, count - begin, _WORD - (self.start + begin) % _WORD)
            _mixed(x[:size], y[:size], counters[:size], *self.words(0, begin))
            np.right_shift(x[:size].view(np.int32), 8, out=y[:size].view(np.int32))
            np.greater_equal(y[:size].view(np.int32), limit, out=out[begin : begin + size])
            begin += size
        return torch.from_numpy(out)


def _mixed(x: _Words, y: _Words, counters: _Words, key0: int, key1: int) -> None:
    """Put `mix` of the counters into `x`, with `y` for what is between."""
    np.add(counters, np.uint32(key0 % _WORD), out=x)
    for shift, times in ((17, _M1), (11, None), (0, _M2), (15, _M3), (14, None)):
        if shift:
            np.right_shift(x, shift, out=y)
            np.bitwise_xor(x, y, out=x)
        if shift == 11:
            np.add(x, np.uint32(key1 % _WORD), out=x)
        if times is not None:
            np.multiply(x, np.uint32(times % _WORD), out=x)


def _counters(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, 2, ... as int32 words; at most 2^32 of them."""
    if count <= _HALF:
        return torch.arange(count, dtype=torch.int32, device=device)
    tail = torch.arange(-_HALF, count - _WORD, dtype=torch.int32, device=device)
    return torch.cat([torch.arange(_HALF, dtype=torch.int32, device=device), tail])
