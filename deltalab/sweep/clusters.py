"""Points on clusters: shares of a sweep as tasks of a SLURM array, and points as tasks of Ray."""

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from deltalab.sweep import stopping
from deltalab.sweep.launching import Done, Job, Sweep, collect, died, end_of, run
from deltalab.terminal import console

SHARE_OF_WARNING = 0.7  # of the time between SLURM's warning and its end, for the point at hand


@dataclass(frozen=True)
class Share:
    """Some points, one after another in one process; what is finished lies in a journal.

    Attributes:
        journal: a directory with one file for every finished point, which the sweep reads, and
            which a share that SLURM has requeued goes on from.
        grace: seconds for the point at hand after SLURM's warning.
    """

    journal: Path
    grace: float

    def __call__(self, data: bytes, jobs: Sequence[Job]) -> int:
        """Run the jobs; return how many points are finished."""
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        warned = Warned.listen(self.grace)
        for job in jobs:
            if (self.journal / f"{job.number}.pkl").exists():
                continue
            done = run(data, job)
            if done.result is not None:
                self._keep(done)
            warned.settle()
            if done.last or stopping.wanted():
                break
        return sum((self.journal / f"{job.number}.pkl").exists() for job in jobs)

    def checkpoint(self, *arguments: Any) -> Any:
        """Tell submitit what SLURM should run when it starts this again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)

    def _keep(self, done: Done) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.journal)
        with os.fdopen(handle, "wb") as file:
            pickle.dump(done, file)
        os.replace(temporary, self.journal / f"{done.number}.pkl")


@dataclass
class Warned:
    """SLURM's signals: the point at hand is finished first, if there is time for it."""

    grace: float
    requeue: Any
    pending: tuple[Any, ...] = ()

    @classmethod
    def listen(cls, grace: float) -> "Warned":
        """Take the warning from submitit, which would requeue in the midst of a point."""
        from submitit import JobEnvironment

        number = JobEnvironment._usr_sig()
        warned = cls(grace, signal.getsignal(number))
        if callable(warned.requeue):
            signal.signal(number, warned._warn)
            signal.signal(signal.SIGALRM, warned._late)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `stopping` takes it at the next point
        return warned

    def settle(self) -> None:
        """Between two points: requeue if SLURM has warned."""
        if self.pending:
            pending, self.pending = self.pending, ()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.requeue(*pending)

    def _warn(self, number: int, frame: Any) -> None:
        self.pending = (number, frame)
        if stopping.busy():
            signal.setitimer(signal.ITIMER_REAL, self.grace)
        else:
            self.settle()

    def _late(self, number: int, frame: Any) -> None:
        self.settle()


def shares(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """Split jobs into runs of neighbours of the same length, give or take one.

    Neighbours share their pair, so that P pairs in N shares are opened at most P + N - 1 times.

    >>> [[job.number for job in share] for share in shares([Job(i, ()) for i in range(5)], 2)]
    [[0, 1, 2], [3, 4]]
    """
    count = min(count, len(jobs))
    size, more = divmod(len(jobs), count)
    starts = [i * size + min(i, more) for i in range(count + 1)]
    return [list(jobs[a:b]) for a, b in pairwise(starts)]


def slurm(
    sweep: Sweep,
    jobs: Sequence[Job],
    *,
    tasks: int,
    cluster: str,
    max_num_timeout: int,
    signal_delay_s: int,
    **parameters: Any,
) -> list[Any]:
    """Run jobs as an array of SLURM and wait for them; a dead task costs its unfinished points.

    Raises:
        stopping.Ended: no further point can be run; the other tasks are cancelled.

    Args:
        sweep: what the jobs need.
        jobs: the points.
        tasks: the array's size; each task runs a share of the points.
        cluster: of submitit: `slurm`, or `local` for processes here.
        max_num_timeout: how often a task that reached its time limit starts again.
        signal_delay_s: seconds before the limit at which SLURM warns.
        parameters: the others of submitit; those that are None are left to SLURM.
    """
    from submitit import AutoExecutor

    folder = Path(sweep.config.hydra.sweep.dir).absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    journal = Path(tempfile.mkdtemp(prefix="points-", dir=folder))
    executor = AutoExecutor(folder / "%j", cluster=cluster, slurm_max_num_timeout=max_num_timeout)
    given = {name: value for name, value in parameters.items() if value is not None}
    executor.update_parameters(**given, slurm_signal_delay_s=signal_delay_s)
    split, data = shares(jobs, tasks), sweep.packed()
    share = Share(journal, SHARE_OF_WARNING * signal_delay_s)
    submitted = executor.map_array(share, [data] * len(split), split)
    console.fail(
        f"{len(jobs)} points, tasks of job {submitted[0].job_id.split('_')[0]}: {len(split)},"
        f" their logs in {folder}"
    )
    results: dict[int, Any] = {}
    running = dict(zip(submitted, split, strict=True))
    with stopping.working():
        while running and not stopping.wanted():
            ended = [task for task in running if task.done()]
            finished = list(_finished(journal, results))
            results |= collect(jobs, finished)
            if (end := end_of(finished)) is not None:
                for task in running:
                    task.cancel(check=False)
                raise stopping.Ended(end)
            for task in ended:
                why = f"job {task.job_id} is {task.state}; its log: {task.paths.stderr}"
                missing = [job for job in running.pop(task) if job.number not in results]
                results |= {job.number: died(job, why) for job in missing}
            time.sleep(1.0)
    if running:
        raise stopping.Stopped
    return [results[job.number] for job in jobs]


def _finished(journal: Path, known: Mapping[int, Any]) -> Iterator[Done]:
    for file in sorted(journal.glob("*.pkl"), key=lambda path: int(path.stem)):
        if int(file.stem) not in known:
            yield pickle.loads(file.read_bytes())


def ray(
    sweep: Sweep, jobs: Sequence[Job], *, init: Mapping[str, Any], remote: Mapping[str, Any]
) -> list[Any]:
    """Run jobs as tasks of Ray, as many at a time as the cluster has room for.

    Raises:
        stopping.Ended: no further point can be run; those that were running are finished.

    Args:
        sweep: what the jobs need.
        jobs: the points.
        init: of `ray.init`; a cluster's address, or what to start here.
        remote: of `ray.remote`: what a point needs, as num_cpus and num_gpus.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    import ray as engine
    from ray.exceptions import RayError

    if not engine.is_initialized():
        engine.init(**init)
    data, task = engine.put(sweep.packed()), engine.remote(**remote)(run)
    resources: dict[str, float] = engine.cluster_resources()
    room = max(int(resources.get("CPU", 1) // (remote.get("num_cpus") or 1)), 1)
    results: dict[int, Any] = {}
    waiting, ended = list(reversed(jobs)), None
    running: dict[Any, Job] = {}
    with stopping.working():
        while running or (waiting and not stopping.wanted()):
            while waiting and len(running) < room and not stopping.wanted():
                job = waiting.pop()
                running[task.remote(data, job)] = job
            for reference in engine.wait(list(running))[0]:
                job = running.pop(reference)
                try:
                    done = engine.get(reference)
                    results |= collect(jobs, [done])
                    if (why := end_of([done])) is not None:
                        waiting, ended = [], why
                except RayError as error:
                    results[job.number] = died(job, console.one_line(error))
    if ended is not None:
        raise stopping.Ended(ended)
    if len(results) < len(jobs):
        raise stopping.Stopped
    return [results[job.number] for job in jobs]
