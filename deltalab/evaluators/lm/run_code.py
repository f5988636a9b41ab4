"""Runs the programs that a model wrote, once the user allows it: what HumanEval's pass@k needs.

This stands in for the metric `code_eval`, which would be fetched from the hub. A program runs under
`confined.py`, alone where the system has namespaces: without the environment, the files and the
network of this machine. Where it has none, a warning says so once.
"""

import logging
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECONDS = 3.0
MEMORY = 4 << 30
START = 30
"""Seconds that a busy machine may take to start Python."""
_SCRIPT = Path(__file__).with_name("confined.py")
_log = logging.getLogger(__name__)


def passes(program: str) -> bool:
    """Return whether a program runs to its end: no exception, no exit, within the limits.

    What runs in the program's own process can always claim so. A claim is believed only where the
    same program, followed by a test that must fail instead of one that must pass, makes none: the
    two differ in one random number, so that a program passes by running its tests alone.

    >>> passes("assert 1 + 1 == 2"), passes("assert 1 + 1 == 3"), passes("import os; os._exit(0)")
    (True, False, False)
    """
    one, other = secrets.token_hex(8), secrets.token_hex(8)
    return _claims(program, one, one) and not _claims(program, one, other)


def _claims(program: str, one: str, other: str) -> bool:
    """Whether a program claims to have reached its end and found two texts equal."""
    tested = f"{program}\nif {one!r} != {other!r}: raise AssertionError"
    return _run(tested, _way(), SECONDS).returncode == 0


@cache
def _way() -> str:
    """Return how programs are confined here: `alone`, or `here` where that is not to be had."""
    packages = [name for name in ("numpy",) if find_spec(name)]
    usual = ["collections", "ctypes", "hashlib", "math", "random", "re", "typing", *packages]
    tried = _run(f"import {', '.join(usual)}", "alone", START)
    if tried.returncode == 0:
        return "alone"
    _log.warning(
        "evaluator.run_code: programs cannot be run apart on this system (%s): those of the model"
        " run as you, in reach of your files and of the network",
        tried.stderr.decode(errors="replace").strip() or "Python does not start there",
    )
    return "here"


def _run(program: str, way: str, seconds: float) -> "subprocess.CompletedProcess[bytes]":
    """Run a program under limits; returns 0 where it claims to have reached its end."""
    with tempfile.TemporaryDirectory(prefix="deltalab-") as directory:
        command = [sys.executable, "-I", str(_SCRIPT), directory, str(seconds), str(MEMORY), way]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=directory,
            env=_environment(directory, way),
            start_new_session=True,
        ) as process:
            try:
                _, error = process.communicate(
                    program.encode(errors="replace"), timeout=seconds + START
                )
            except subprocess.TimeoutExpired:
                error = b"no answer in time"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
    return subprocess.CompletedProcess(command, process.returncode, stderr=error)


def _environment(directory: str, way: str) -> dict[str, str]:
    """Return all that a program sees of the environment: no secret, and nothing of the person's."""
    home = "/box" if way == "alone" else directory
    own = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home}
    own |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    libraries = os.environ.get("LD_LIBRARY_PATH")  # Python itself may need it to start
    return own | ({"LD_LIBRARY_PATH": libraries} if libraries else {})


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
