"""Points in other processes: one job, as any engine runs it, and workers on this machine.

The launchers of `hydra/launcher` hand over here. A job comes back without its config, which would
fill the memory of a long sweep, and with what it printed, which only one process should print.
"""

import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from io import StringIO
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from omegaconf import open_dict

from deltalab.sweep import composing, gpus, stopping
from deltalab.terminal import console


class Job(NamedTuple):
    """One point of a sweep: its number and its overrides."""

    number: int
    overrides: tuple[str, ...]


class Done(NamedTuple):
    """What became of a job: None for one that was not begun because its process was to stop.

    Attributes:
        number: the job's.
        result: what it returned or raised.
        printed: what it printed.
        last: whether no further point of the sweep can be run.
    """

    number: int
    result: JobReturn | None
    printed: str
    last: bool = False


class WorkerDied(Exception):
    """The process of a point died: killed, out of memory, or over its time limit."""


@dataclass(frozen=True)
class Sweep:
    """What every job of a sweep needs: Hydra's state and config, and the function of a job."""

    context: Any
    config: Any
    task: Callable[..., Any]
    state: Any

    def packed(self) -> bytes:
        """Return this as bytes, made once a sweep instead of once a job."""
        import cloudpickle

        data: bytes = cloudpickle.dumps(self)
        return data


@lru_cache(maxsize=1)
def unpacked(data: bytes) -> Sweep:
    """Return the sweep, and give this process Hydra's state; once for all of a sweep's jobs."""
    from hydra.core.singleton import Singleton

    sweep: Sweep = pickle.loads(data)
    setup_globals()
    Singleton.set_state(sweep.state)
    return sweep


def run(data: bytes, job: Job) -> Done:
    """Run one job in this process; what it raises comes back as its result."""
    sweep, printed = unpacked(data), StringIO()
    console.ready()
    with redirect_stdout(printed):
        try:
            with composing.guarded():
                loader = sweep.context.config_loader
                config = loader.load_sweep_config(sweep.config, list(job.overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = f"{job.number}", job.number
            result = run_job(
                sweep.task,
                config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=sweep.context,
            )
        except stopping.Stopped:
            return Done(job.number, None, "")
        except stopping.Ended as end:
            return Done(job.number, failed(job, end.why), printed.getvalue(), last=True)
        except Exception as error:  # the config of this point cannot be composed
            console.point_done(f"failed: {' '.join(job.overrides)}: {console.one_line(error)}")
            result = failed(job, error)
    result.cfg = result.hydra_cfg = None
    if isinstance(result._return_value, Exception):
        result._return_value = portable(result._return_value)
    return Done(job.number, result, printed.getvalue())


def end_of(finished: Iterable[Done]) -> Exception | None:
    """Return why no further point can be run, if one of some jobs has found that out."""
    found = (done.result for done in finished if done.last and done.result is not None)
    return next((result._return_value for result in found), None)


def failed(job: Job, error: Exception) -> JobReturn:
    """Return the result of a job that raised, or whose process died."""
    result = JobReturn(overrides=list(job.overrides), status=JobStatus.FAILED)
    result._return_value = portable(error)
    return result


def portable(error: Exception) -> Exception:
    """Return an exception that survives the way to another process, without its traceback."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def collect(jobs: Sequence[Job], finished: Iterable[Done]) -> dict[int, JobReturn]:
    """Show every finished job's line and return the results by number."""
    overrides = {job.number: job.overrides for job in jobs}
    results = {}
    for number, result, printed, _ in finished:
        if result is None or number not in overrides:
            continue
        if printed.strip():
            console.point_done(printed.rstrip("\n"))
        results[number] = result
    return results


def died(job: Job, why: str) -> JobReturn:
    """Show and return the failure of a point whose process died."""
    error = WorkerDied(f"{' '.join(job.overrides)}: {why}")
    console.point_done(f"failed: {console.one_line(error)}")
    return failed(job, error)


def workers(sweep: Sweep, jobs: Sequence[Job], count: int, devices: Sequence[str]) -> list[Any]:
    """Run jobs in `count` processes of this machine, each on a device of its own if there are any.

    A process that dies takes no other point with it: points that were running are run again, each
    alone, so that the one that kills its process is known.

    Returns:
        The results in the order of the jobs.

    Raises:
        stopping.Stopped: this process was asked to stop; running points were waited for.
    """
    work = partial(_work, sweep.packed(), tuple(devices), share_of_cores(count))
    results: dict[int, JobReturn] = {}
    left = list(jobs)
    with stopping.working():
        while left and not stopping.wanted():
            broken = _drain(work, left, count, results)
            left = [job for job in left if job.number not in results]
            for job in left[:count] if broken else ():  # jobs begin in order: these were running
                if not stopping.wanted() and _drain(work, [job], 1, results):
                    results[job.number] = died(job, "its process was killed, or out of memory")
            left = [job for job in left if job.number not in results]
    if left:
        raise stopping.Stopped
    return [results[job.number] for job in jobs]


def _drain(
    work: Callable[[Job], Done], jobs: Sequence[Job], count: int, results: dict[int, JobReturn]
) -> bool:
    """Run jobs until they are done, or a process dies, which it tells, or a stop is wanted.

    Raises:
        stopping.Ended: no further point can be run.
    """
    from joblib import Parallel, delayed

    stop = threading.Event()
    ended: list[Exception] = []

    def wanted() -> Iterator[Any]:
        for job in jobs:
            if stop.is_set() or stopping.wanted():
                return
            yield delayed(work)(job)

    engine = Parallel(
        n_jobs=max(count, 2),  # with one, joblib would run the job in this process
        backend="loky",
        batch_size=1,
        pre_dispatch=count,
        return_as="generator_unordered",
    )
    try:
        for done in engine(wanted()):
            if done.result is None:  # a worker was asked to stop: so is the sweep
                stop.set()
                stopping.want()
            results.update(collect(jobs, [done]))
            if (why := end_of([done])) is not None:
                stop.set()
                ended.append(why)
    except BrokenExecutor:
        return True
    for why in ended:
        raise stopping.Ended(why)
    return False


def share_of_cores(count: int) -> int:
    """Return the threads for each of `count` processes: OMP_NUM_THREADS, or a share of the cores.

    >>> share_of_cores(10**6)
    1
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() else max(cores() // count, 1)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _work(data: bytes, devices: Sequence[str], threads: int, job: Job) -> Done:
    settle(threads)
    if devices:
        gpus.claim(devices)
    return run(data, job)


@lru_cache(maxsize=1)
def settle(threads: int) -> None:
    """Make this process a worker: its share of the cores, its caches kept, no orphan.

    Several workers that use all cores each are many times slower than with their share.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch reads them when it is imported
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    with suppress(ImportError):  # loky replaces a process that grew by 300 MB: a pair's size
        from joblib.externals.loky import process_executor

        process_executor._MAX_MEMORY_LEAK_SIZE = math.inf
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    """End this process when the sweep's process is gone: after its point, and soon."""
    while os.getppid() == parent:
        time.sleep(1.0)
    stopping.want()
    while stopping.busy():
        time.sleep(0.1)
    os._exit(143)
