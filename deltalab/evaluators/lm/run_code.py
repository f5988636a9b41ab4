"""Runs the programs that a model wrote, once the user allows it: what HumanEval's pass@k needs.

This stands in for the metric `code_eval`, which would be fetched from the hub. A program runs in a
Python process of its own, in an empty directory, for a limited time and in limited memory; it is
not kept from the files and the network of this machine.
"""

import math
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

SECONDS = 3
MEMORY = 4 << 30
_CHILD = f"""
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
proof, done = sys.argv.pop(), os.dup(1)
program = sys.stdin.read()
for stream in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
write = os.write
signal.setitimer(signal.ITIMER_REAL, {SECONDS})
exec(compile(program, "program", "exec"), {{}})
write(done, proof.encode())
"""


def passes(program: str) -> bool:
    """Return whether a program runs to its end: no exception, no exit, within the limits.

    >>> passes("assert 1 + 1 == 2"), passes("assert 1 + 1 == 3"), passes("import os; os._exit(0)")
    (True, False, False)
    """
    proof = secrets.token_hex(8)  # an exit code would also be 0 where a program leaves early
    with tempfile.TemporaryDirectory(prefix="deltalab-") as directory:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-c", _CHILD, proof],
                input=program.encode(errors="replace"),
                capture_output=True,
                cwd=directory,
                timeout=SECONDS + 30,  # a busy machine may take long to start Python
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return run.stdout.decode(errors="replace") == proof


def pass_at(k: int, right: int, of: int) -> float:
    """Return the chance that one of k programs, drawn from those written, is right.

    1 - C(n - c, k) / C(n, k), unbiased for the chance over programs (arXiv 2107.03374, Eq. 1).

    Args:
        k: how many are drawn.
        right: how many of the programs pass.
        of: how many there are, at least k.

    >>> pass_at(1, right=1, of=4), pass_at(2, right=1, of=4)
    (0.25, 0.5)
    """
    return 1 - math.comb(of - right, k) / math.comb(of, k)


class CodeEval:
    """What lm-eval's tasks ask of the metric `code_eval`."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1,),
        **_: Any,
    ) -> tuple[dict[str, float], Mapping[int, list[bool]]]:
        """Return pass@k over the problems, and which programs of each problem passed."""
        found = {
            number: [passes(f"{program}\n{tests}") for program in programs]
            for number, (programs, tests) in enumerate(zip(predictions, references, strict=True))
        }
        enough = [n for n in k if all(len(passed) >= n for passed in found.values())]
        return {
            f"pass@{n}": sum(pass_at(n, sum(p), len(p)) for p in found.values()) / len(found)
            for n in enough
        }, found


@contextmanager
def in_place() -> Iterator[None]:
    """Give `CodeEval` to the task files that load `code_eval`, for as long as they are imported."""
    import evaluate  # type: ignore[import-untyped]

    original = evaluate.load
    evaluate.load = lambda path, *a, **k: (
        CodeEval() if path == "code_eval" else original(path, *a, **k)
    )
    try:
        yield
    finally:
        evaluate.load = original
