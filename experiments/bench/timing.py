"""Time several ways of doing one thing in turn, so that all meet the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of every repeat of one way.

    Attributes:
        seconds: in the order of the repeats.
    """

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest repeat: what the machine can do when nothing disturbs it."""
        return min(self.seconds)


def alternate(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Run all ways once to warm up, then `repeats` times in turn, each after `before`, untimed."""
    for way in ways.values():
        before()
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            before()
            start = clock()
            made = way()
            seconds[name].append(clock() - start)
            del made
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def ratio(a: Times, b: Times) -> str:
    """Say how many times as long `a` takes as `b`: of the best, and the quartiles of the repeats.

    >>> ratio(Times((2.0, 4.0, 4.0)), Times((1.0, 1.0, 2.0)))
    '2.00 (2.00-3.00)'
    >>> ratio(Times((3.0,)), Times((2.0,)))
    '1.50 (one repeat)'
    """
    if len(a.seconds) == len(b.seconds) == 1:
        return f"{a.best / b.best:.2f} (one repeat)"
    paired = sorted(x / y for x, y in zip(a.seconds, b.seconds, strict=True))
    low, _, high = statistics.quantiles(paired, n=4, method="inclusive")
    return f"{a.best / b.best:.2f} ({low:.2f}-{high:.2f})"
