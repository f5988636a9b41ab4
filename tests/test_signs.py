"""The one pass of BitDelta in C against the edit itself, bit by bit."""

import warnings

import pytest
import torch

import deltalab
from deltalab.apply import signed
from deltalab.kernels import native, signs
from deltalab.linear.delta import difference
from deltalab.rng import Rng

TYPES = (torch.bfloat16, torch.float32)
SIZES = ((1, 1), (3, 5), (1, 64), (7, 9), (65, 1), (2, 3, 11), (129, 127), (1, (1 << 20) + 13))
BITDELTA = deltalab.edit("bitdelta")


def pair(shape, dtype, seed=0):
    """Return a pair with entries that do not move, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    pre = 0.02 * torch.randn(shape, generator=generator)
    post = pre + 1e-3 * torch.randn(shape, generator=generator)
    still = torch.rand(shape, generator=generator) < 0.2
    post[still] = pre[still]
    pre.view(-1)[::11], post.view(-1)[::11] = 0.0, -0.0
    post.view(-1)[-1] = pre.view(-1)[-1] + 0.25
    return pre.to(dtype), post.to(dtype)


def same(one, other):
    """Whether two tensors hold the same bits."""
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def coded(pre, post):
    """Return BitDelta's code by the one pass."""
    sides = lambda start, stop: (pre.view(-1)[start:stop], post.view(-1)[start:stop])  # noqa: E731
    return signed.coded(BITDELTA, tuple(pre.shape), (pre.dtype, post.dtype), sides)


def words(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_bits_of_the_edit(dtype, shape):
    pre, post = pair(shape, dtype)
    delta = difference(pre, post)
    code = coded(pre, post)
    slow = BITDELTA.encode(delta, rng=Rng(0, "w"), post=post)
    if len(shape) == 2 and shape[0] * shape[1] == 1:  # |D| is the scale
        assert code is None
        return
    assert code.described == slow.described
    assert all(same(code.arrays[name], slow.arrays[name]) for name in ("signs", "scale"))
    assert code.is_exact(pre, post, delta)
    stored = (pre.float() + BITDELTA(delta, rng=Rng(0, "w"))).to(dtype)
    out, flat = torch.empty(pre.numel(), dtype=dtype), pre.reshape(-1)
    assert signed.decoded(code, 0, flat, out)
    assert same(words(out), words(stored))
    assert same(words(out), words(code.onto(pre, dtype)))
    if pre.numel() > 16:  # a part that begins and ends in between
        part = torch.empty(pre.numel() - 11, dtype=dtype)
        assert signed.decoded(code, 8, flat[8:-3], part)
        assert same(words(part), words(stored.reshape(-1)[8:-3]))


def test_no_number_of_threads_changes_the_sum():
    pre, post = pair((3, signs.PIECE - 77), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(coded(pre, post).arrays)
    finally:
        torch.set_num_threads(threads)
    assert all(same(one, two) for one, two in zip(*(each.values() for each in found), strict=True))
    exact = difference(pre, post).double().abs().mean()
    assert float(found[0]["scale"]) == pytest.approx(float(exact), rel=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_magnitude_that_is_the_scale_is_found(dtype):
    pre, post = pair((3, signs.PIECE - 5), dtype)
    sides = lambda start, stop: (pre.view(-1)[start:stop], post.view(-1)[start:stop])  # noqa: E731
    held = signs.survey(pre.numel(), dtype, sides).held
    delta = difference(pre, post).abs().reshape(-1)
    for place in (0, 4095, 4096, signs.PIECE - 1, signs.PIECE, pre.numel() - 1, 77_777):
        scale = delta[place]
        for value in (scale, torch.nextafter(scale, torch.tensor(1.0)), scale * 1.37):
            wanted = bool((delta == value).any())
            if value:
                assert signs.meets(pre.numel(), dtype, sides, held, float(value)) == wanted


def test_what_is_left_to_the_edit():
    pre, post = pair((8, 40), torch.float32)
    others = [{"axis": "row"}, {"axis": "column"}, {"axis": "best"}, {"magnitudes": "normal"}]
    assert not any(signed.fits(deltalab.edit("bitdelta", **each), (8, 40)) for each in others)
    assert not signed.fits(deltalab.edit("dare", p=0.5), (8, 40))
    assert not signed.fits(BITDELTA, (320,))
    assert coded(pre.half(), post.half()) is None
    assert coded(pre, post.bfloat16()) is None
    assert coded(pre, pre.clone()) is None  # a scale of zero
    even = torch.zeros(8, 40)
    assert coded(even, even + 0.5) is None  # |D| is the scale
    for value in (torch.inf, -torch.inf, torch.nan, 2e25):
        for side in (0, 1):
            bad = [pre.clone(), post.clone()]
            bad[side][7, 39] = value
            assert coded(*bad) is None, (value, side)
    code, out = coded(pre, post), torch.empty(320)
    bad = pre.reshape(-1).clone()
    bad[319] = torch.nan
    assert not signed.decoded(code, 0, bad, out)
    assert not signed.decoded(code, 4, pre.reshape(-1)[:-4], out[:-4])  # within a byte
    assert not signed.decoded(code, 8, pre.reshape(-1), out)  # more than the code has
    row = deltalab.edit("bitdelta", axis="row").encode(difference(pre, post), rng=Rng(0, "w"))
    assert not signed.decoded(row, 0, pre.reshape(-1), out)


def test_bfloat16_rounds_to_even_and_overflows_as_pytorch():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    pre = every[every.isfinite()]
    octets = torch.randint(0, 256, (-(-len(pre) // 8),), generator=torch.Generator().manual_seed(1))
    negative = (octets[:, None] >> torch.arange(7, -1, -1) & 1).bool().reshape(-1)[: len(pre)]
    for scale in (2.0**-10, 1.00390625, 3.0e38, 1e-40, 2.0**-134):
        out = torch.empty_like(pre)
        exact = torch.tensor(scale)
        assert signs.onto(pre, octets.to(torch.uint8), float(exact), out)
        wanted = (pre.float() + torch.where(negative, -exact, exact)).bfloat16()
        assert same(words(out), words(wanted)), scale


def test_without_a_compiler_it_says_so_once(monkeypatch):
    monkeypatch.setattr(native, "COMPILER", "no-such-compiler")
    monkeypatch.setattr(signs, "_loaded", {})
    pre, post = pair((3, 5), torch.float32)
    with pytest.warns(UserWarning, match="uncompiled"):
        assert coded(pre, post) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coded(pre, post) is None
