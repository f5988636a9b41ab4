"""The generator as a generator: uniform, independent, the same from every side."""

import math

import pytest
import torch
from torch import Tensor

from deltalab.rng import Rng, _log, _root, _sine, key, mix

N = 1 << 20
GOLDEN = [-1408204131, -2064692328, -2066612818, -1828342549]


def chi_square(counts: Tensor) -> float:
    """Return how many standard deviations chi-square lies off its mean."""
    expected = counts.sum().item() / counts.numel()
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def words(rng: Rng, stream: int = 0, count: int = N) -> Tensor:
    return rng.bits(torch.empty(count), stream).long() & 0xFFFFFFFF


@pytest.mark.parametrize("shift", [0, 8, 12, 20, 24])
@pytest.mark.parametrize("start", [0, 12345, (1 << 32) - N // 2])
def test_bits_are_uniform(shift: int, start: int) -> None:
    counts = torch.bincount((words(Rng(0, "w", start)) >> shift) & 0xFF, minlength=256)
    assert abs(chi_square(counts)) < 4


def test_every_bit_is_fair_and_uncorrelated_with_every_other() -> None:
    planes = ((words(Rng(1, "w"))[:, None] >> torch.arange(32)) & 1).double() * 2 - 1
    gram = planes.T @ planes / N
    assert (gram - torch.eye(32)).abs().max() < 5 / math.sqrt(N)
    assert planes.mean(0).abs().max() < 5 / math.sqrt(N)


PAIRS = {
    "neighbours": (Rng(0, "w"), Rng(0, "w", start=1)),
    "a row further": (Rng(0, "w"), Rng(0, "w", start=4096)),
    "a power of two further": (Rng(0, "w"), Rng(0, "w", start=1 << 31)),
    "the next page": (Rng(0, "w"), Rng(0, "w", start=1 << 32)),
    "names": (Rng(0, "layers.0.weight"), Rng(0, "layers.1.weight")),
    "seeds": (Rng(0, "w"), Rng(1, "w")),
    "forks": (Rng(0, "w"), Rng(0, "w").fork("1")),
    "streams": (Rng(0, "w"), None),
}


@pytest.mark.parametrize("which", PAIRS)
def test_independence(which: str) -> None:
    """Chi-square of the joint histogram of the leading bits, and no correlation of single bits."""
    left, right = PAIRS[which]
    a, b = words(left), words(left, stream=1) if right is None else words(right)
    joint = torch.bincount((a >> 27) * 32 + (b >> 27), minlength=1024)
    assert abs(chi_square(joint)) < 4
    low = torch.bincount((a & 31) * 32 + (b & 31), minlength=1024)
    assert abs(chi_square(low)) < 4
    bits_a, bits_b = (((x[:, None] >> torch.arange(32)) & 1).double() * 2 - 1 for x in (a, b))
    assert (bits_a.T @ bits_b / N).abs().max() < 5.5 / math.sqrt(N)


def test_consecutive_seeds_and_names_have_unrelated_first_words() -> None:
    like = torch.empty(1)
    seeds = torch.cat([Rng(s, "w").bits(like) for s in range(20_000)]).long() & 0xFFFFFFFF
    names = torch.cat([Rng(0, f"l.{s}").bits(like) for s in range(20_000)]).long() & 0xFFFFFFFF
    for found in (seeds, names):
        assert abs(chi_square(torch.bincount(found >> 26, minlength=64))) < 4
        assert abs(chi_square(torch.bincount(found & 63, minlength=64))) < 4


def test_no_structure_far_out_and_no_period() -> None:
    """Samples from all over 2^32 positions, and from both sides of the wrap."""
    like = torch.empty(1 << 12)
    parts = [Rng(0, "w", start=i << 24).bits(like) for i in range(256)]
    counts = torch.bincount((torch.cat(parts).long() & 0xFFFFFFFF) >> 24, minlength=256)
    assert abs(chi_square(counts)) < 4
    assert len({tuple(p[:4].tolist()) for p in parts}) == 256
    assert not torch.equal(parts[0], Rng(0, "w", start=1 << 32).bits(like)), "a period of 2^32"


def test_a_page_is_a_permutation() -> None:
    """The hash is invertible, so no word repeats within 2^32 positions."""
    assert mix(torch.arange(N, dtype=torch.int32), 5, 7).unique().numel() == N


@pytest.mark.parametrize("start", [0, 1000, (1 << 31) - 500, (1 << 32) - 500, (1 << 33) - 1])
def test_slices_are_parts_of_the_whole(start: int) -> None:
    whole = Rng(0, "w", start).bits(torch.empty(1000))
    pieces = [Rng(0, "w").at(start + i).bits(torch.empty(250)) for i in range(0, 1000, 250)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(Rng(0, "w", start).bits(torch.empty(10, 100)).flatten(), whole)


def test_the_values_are_fixed_for_all_time() -> None:
    """Written down once: a change here changes every published mask."""
    assert Rng(0, "w").bits(torch.empty(4)).tolist() == GOLDEN
    assert key(0, "w", 0, 0) != key(0, "w", 1, 0) != key(0, "w", 0, 1)


def test_the_hash_in_plain_integers() -> None:
    """The reference in Python's integers, with no wrap to rely on."""
    mask = 0xFFFFFFFF

    def reference(x: int, key0: int, key1: int) -> int:
        x = (x + key0) & mask
        x = ((x ^ (x >> 17)) * 0xED5AD4BB) & mask
        x = ((x ^ (x >> 11)) + key1) & mask
        x = (x * 0xAC4C1B51) & mask
        x = ((x ^ (x >> 15)) * 0x31848BAB) & mask
        return x ^ (x >> 14)

    key0, key1 = key(3, "name", 2, 0)
    got = Rng(3, "name", start=(1 << 32) - 3).bits(torch.empty(3), stream=2).tolist()
    wanted = [reference((1 << 32) - 3 + i, key0, key1) for i in range(3)]
    assert [g & mask for g in got] == wanted


@pytest.mark.parametrize("p", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_masks_have_their_probability(p: float, seed: int) -> None:
    rate = Rng(seed, "w").below(torch.empty(N), p).double().mean().item()
    assert abs(rate - p) <= 4 * math.sqrt(p * (1 - p) / N)


def test_masks_by_tensor_are_masks_by_number() -> None:
    like, rng = torch.empty(10_000), Rng(0, "w")
    for p in (0.0, 0.25, 0.7, 1.0):
        assert torch.equal(rng.below(like, torch.tensor(p)), rng.below(like, p))


def test_uniform_numbers() -> None:
    u = Rng(0, "w").uniform(torch.empty(N)).double()
    assert u.min() >= 0
    assert u.max() < 1
    for power in (1, 2, 3, 4):
        sigma = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / N)
        assert abs((u**power).mean().item() - 1 / (power + 1)) < 4 * sigma


def test_normal_numbers() -> None:
    x = Rng(0, "w").normal(torch.empty(N)).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - moment) < 4 * math.sqrt(variance / N)
    cells = torch.special.ndtri(torch.arange(1, 64).double() / 64)
    counts = torch.bincount(torch.bucketize(x, cells), minlength=64)
    assert abs(chi_square(counts)) < 4
    assert abs((x[1:] * x[:-1]).mean().item()) < 4 / math.sqrt(N)


def test_the_functions_behind_them_are_accurate() -> None:
    u = torch.arange(1, (1 << 16) + 1).float() / (1 << 16)
    u = torch.cat([u, 2.0 ** -torch.arange(1, 25).float()])
    assert (_log(u) - u.double().log()).abs().max() < 1e-6
    y = torch.linspace(1e-7, 40, 100_001)
    assert (_root(y) / y.double().sqrt() - 1).abs().max() < 2e-7
    assert _root(torch.zeros(1)) < 1e-15
    x = torch.linspace(-math.pi / 2, math.pi / 2, 10_001)
    assert (_sine(x) - x.double().sin()).abs().max() < 2e-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_same_bits() -> None:
    like, rng = torch.empty(N), Rng(0, "w", start=(1 << 32) - N // 2)
    assert torch.equal(rng.bits(like.cuda()).cpu(), rng.bits(like))
    assert torch.equal(rng.normal(like.cuda()).cpu(), rng.normal(like))


def test_kept_is_where_below_is_false() -> None:
    """At both ends of p, across slices, and across a page of indices."""
    for start in (0, 77, 2**32 - 9000):
        rng = Rng(3, "w", start=start)
        for p in (0.0, 2.0**-24, 0.3, 1 - 2.0**-24, 1.0):
            for count in (0, 1, 20_001):
                assert torch.equal(rng.kept(count, p), ~rng.below(torch.empty(count), p))
