"""Hydra's launchers for deltalab, over joblib, submitit and Ray; see `conf/hydra/launcher`.

Hydra imports every plugin at each start, so that nothing heavy is imported here.
"""

import importlib.util
from typing import Any, Dict, List, Optional, Sequence

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

PACKAGES = {"joblib": "workers", "submitit": "slurm", "ray": "ray"}


class _Launcher(Launcher):
    """What all of them share: the engine's package is there, and numbers are numbers."""

    package: str

    def __init__(self, **params: Any) -> None:
        self.params: Dict[str, Any] = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config
        if any(importlib.util.find_spec(name) is None for name in (self.package, "cloudpickle")):
            chosen = config.hydra.runtime.choices["hydra/launcher"]
            raise ValueError(
                f"hydra/launcher={chosen}: needs the package {self.package}:"
                f" pip install 'deltalab[{PACKAGES[self.package]}]'"
            )
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range, before anything is launched."""

    def whole(self, name: str, value: Any) -> None:
        if type(value) is not int or value < 1:
            raise ValueError(f"hydra.launcher.{name}={value}: must be a whole number, at least 1")

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from deltalab.sweep.launching import Job, Sweep

        sweep = Sweep(self.context, self.config, self.task, Singleton.get_state())
        numbered = enumerate(job_overrides, initial_job_idx)
        return self.points(sweep, [Job(i, tuple(overrides)) for i, overrides in numbered])

    def points(self, sweep: Any, jobs: List[Any]) -> Sequence[JobReturn]:
        raise NotImplementedError


class Workers(_Launcher):
    """Processes on this machine; with `gpus`, one for every GPU that is visible here."""

    package = "joblib"

    def check(self) -> None:
        from deltalab.sweep import gpus, launching

        self.devices: List[str] = gpus.visible() if self.params["gpus"] else []
        if self.params["gpus"] and not self.devices:
            raise ValueError("hydra/launcher=gpus: no GPU is visible here")
        chosen: Optional[int] = self.params["n_jobs"]
        if chosen is None:
            chosen = len(self.devices) or launching.cores()
        self.whole("n_jobs", chosen)
        if self.devices and chosen > len(self.devices):
            raise ValueError(
                f"hydra.launcher.n_jobs={chosen}: each worker has a GPU of its own,"
                f" and {len(self.devices)} are visible here"
            )
        self.count = chosen

    def points(self, sweep: Any, jobs: List[Any]) -> Sequence[JobReturn]:
        from deltalab.sweep import launching

        return launching.workers(sweep, jobs, min(self.count, len(jobs)), self.devices)


class Slurm(_Launcher):
    """Tasks of a SLURM array, each of which runs a share of the points."""

    package = "submitit"

    def check(self) -> None:
        self.whole("tasks", self.params["tasks"])

    def points(self, sweep: Any, jobs: List[Any]) -> Sequence[JobReturn]:
        from deltalab.sweep import clusters

        return clusters.slurm(sweep, jobs, **self.params)


class Ray(_Launcher):
    """Tasks of a Ray cluster, or of one started on this machine."""

    package = "ray"

    def points(self, sweep: Any, jobs: List[Any]) -> Sequence[JobReturn]:
        from deltalab.sweep import clusters

        return clusters.ray(sweep, jobs, **self.params)
