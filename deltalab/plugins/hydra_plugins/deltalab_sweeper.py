"""Hydra's sweeper for deltalab: unions of grids, an order for reuse, one verdict at the end.

Hydra imports every plugin at each start, so that nothing heavy is imported here.
"""

import logging
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)
MOST = 10_000  # points of a sweep, unless most_points says otherwise


@dataclass
class PointsSweeperConf:
    _target_: str = "hydra_plugins.deltalab_sweeper.PointsSweeper"
    params: Optional[Dict[str, Any]] = field(default_factory=dict)


class PointsSweeper(BasicSweeper):
    """The basic sweeper, and besides:

    * `sweeps`, a list of grids, gives the union of their points (`hydra.sweeper.params` and the
      command line apply to every one of them);
    * points that share a model run next to each other, so that each pair is opened once;
    * all points run even if some fail, and failures are counted at the end.
    """

    def __init__(self, params: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def points(self, arguments: List[str]) -> List[List[str]]:
        """Return the override list of every point, in the order in which they run."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides(arguments)
        points: Dict[tuple, None] = {}
        grids = self.config.get("sweeps")
        if grids is not None and not OmegaConf.is_list(grids):
            raise ValueError(f"sweeps={grids}: must be a list of grids, as [{{edit: dare}}]")
        for axes in grids or [{}]:
            if not isinstance(axes, (dict, DictConfig)):
                raise ValueError(f"sweeps=[{axes}]: every grid must map settings to values")
            params = {**self._grid(axes), **{k: v for k, v in axes.items() if k != "grid"}}
            values = {key: "null" if value is None else value for key, value in params.items()}
            grid = parser.parse_overrides([f"{key}={value}" for key, value in values.items()])
            self._guard(grid + given)
            self._check_size(grid + given, len(points))
            for point in self.split_arguments(grid + given, None)[0]:
                points.setdefault(tuple(point))
        models = {}
        for point in points:
            models.setdefault(_settings_of("model", point), len(models))
        return [list(p) for p in sorted(points, key=lambda p: models[_settings_of("model", p)])]

    def _grid(self, axes: Any) -> Dict[str, Any]:
        """Return the axes that every point of a grid has: the chosen edit's, or those of `grid`."""
        if "grid" not in axes:
            return dict(self.params)
        name, loader = str(axes["grid"]), self.hydra_context.config_loader
        options = loader.get_group_options("grid")
        if name not in options:
            raise ValueError(f"sweeps=[{{grid: {name}}}]: must be one of {', '.join(options)}")
        return dict(loader.repository.load_config(f"grid/{name}").config)

    def _guard(self, overrides: List[Any]) -> None:
        """Refuse to sweep over edits while each has a grid of its own, which Hydra would drop."""
        choices = self.config.hydra.runtime.choices
        for override in overrides:
            if override.get_key_element() != "edit" or not override.is_sweep_override():
                continue
            edits = list(override.sweep_string_iterator())
            if len(edits) > 1 and choices.get("grid") != "none" and not self.config.get("sweeps"):
                raise ValueError(
                    f"edit={','.join(edits)}: every edit has a grid of its own, and a sweep over"
                    " several edits cannot use them all; add grid=none to run each edit at its"
                    " defaults, or sweep one edit at a time"
                )

    def _check_size(self, overrides: List[Any], before: int) -> None:
        """Refuse a sweep of more points than anyone means, before they are listed."""
        most = self.config.get("most_points") or MOST
        axes = {o.get_key_element(): o for o in overrides}
        sizes = {key: _size(o, most) for key, o in axes.items() if o.is_discrete_sweep()}
        for key, size in sizes.items():
            if size == 0:
                raise ValueError(f"{axes[key].input_line}: an axis of a sweep without a value")
        if before + prod(sizes.values()) > most:
            axes_text = " x ".join(f"{key}: {size}" for key, size in sizes.items())
            raise ValueError(
                f"more than most_points={most} points in this sweep ({axes_text} values);"
                " most_points=N allows N"
            )

    def sweep(self, arguments: List[str]) -> Any:
        from deltalab.sweep import closing, stopping, sweeps
        from deltalab.terminal import console

        HydraConfig.instance().set_config(self.config)
        points = self.points(list(arguments))
        if self.config.plan:
            return self._plan(points)
        is_group = self.hydra_context.config_loader.repository.group_exists
        self.validate_batch_is_legal(list(representatives(points, is_group)))
        self._check(points, is_group)
        directory = Path(self.config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, directory / "multirun.yaml")
        sweeps.write(directory, list(arguments), points)
        try:
            with console.sweep(len(points)):
                results = list(self._launched(points))
        except stopping.Ended as end:
            left = len(points) - sweeps.begun(directory)
            raise ValueError(f"{console.one_line(end.why)}; {left} points were not run") from None
        closing.sweep_ended(self.config, directory)
        failures = [r._return_value for r in results if r.status != JobStatus.COMPLETED]
        if failures:
            raise console.SweepFailed(failures, len(points))
        return results

    def _check(self, points: List[List[str]], is_group: Callable[[str], bool]) -> None:
        """Refuse a sweep of which one value is out of range, before its first point."""
        from deltalab import cli

        for cfg, hydra in self._composed(list(distinct(points, is_group))):
            cli.check(cfg, hydra)

    def _launched(self, points: List[List[str]]) -> Iterator[Any]:
        """Run all points and yield their results; those that other processes run come last.

        A job returns the path of its lock where another process holds it. What is then done, the
        next round finds done; what another process died over, it runs.
        """
        from deltalab.store import locks
        from deltalab.terminal import console

        start, busy = 0, {}
        while points:
            results = self.launcher.launch(points, initial_job_idx=start)
            start += len(points)
            for overrides, result in zip(points, results, strict=True):
                if result.status == JobStatus.COMPLETED and isinstance(result.return_value, str):
                    busy[Path(result.return_value)] = overrides
                else:
                    yield result
            if busy:
                console.waiting(len(busy))
            points = [busy.pop(path) for path in locks.wait(busy)] if busy else []

    def _plan(self, points: List[List[str]]) -> None:
        """Print what the sweep would cost."""
        from deltalab import cli

        print(cli.plan(self._composed(points)))

    def _composed(self, points: List[List[str]]) -> Iterator[Tuple[DictConfig, Any]]:
        """Yield the config of every point, good until the next one, and its own section of Hydra's.

        Points that differ in plain values alone share one composed config, in which the values are
        set as Hydra sets them: composing every one of 400 anew would take most of a minute.
        """
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        known: Dict[Any, Tuple[DictConfig, Any]] = {}
        for point in points:
            parsed = parser.parse_overrides(point)
            values = [
                override
                for override in parsed
                if _is_value(override) and not loader.repository.group_exists(override.key_or_group)
            ]
            named = frozenset(override.key_or_group for override in values)
            kind = named, tuple(o.input_line for o in parsed if o.key_or_group not in named)
            if kind not in known:
                cfg = loader.load_sweep_config(self.config, point)
                hydra = cfg.hydra
                with open_dict(cfg):
                    del cfg["hydra"]
                known[kind] = cfg, hydra
            ConfigLoaderImpl._apply_overrides_to_config(values, known[kind][0])
            yield known[kind]


def _is_value(override: Any) -> bool:
    """Whether an override gives a number, text or truth value to a setting of the application."""
    plain = isinstance(override.value(), (int, float, str, type(None)))
    return plain and override.type == OverrideType.CHANGE and not override.is_hydra_override()


def representatives(
    points: Iterable[Sequence[str]], is_group: Callable[[str], bool]
) -> Iterator[List[str]]:
    """Yield points that fail to compose if any does: one for every set of options and settings.

    Whether Hydra can compose a point depends on the options chosen from config groups and on the
    names of the other settings. Their values are checked when a point begins, except those of
    Hydra's own and of `results`, which are checked here.
    """
    seen = set()
    for point in points:
        kind = set()
        for override in point:
            name = override.split("=")[0]
            key = name.lstrip("+~").split("@")[0]
            whole = key.startswith(("hydra", "results")) or is_group(key)
            kind.add(override if whole else name)
        if frozenset(kind) not in seen:
            seen.add(frozenset(kind))
            yield list(point)


def distinct(
    points: Iterable[Sequence[str]], is_group: Callable[[str], bool]
) -> Iterator[List[str]]:
    """Yield points that together have all values of a sweep, and all of one section together.

    Of 3 models, 9 rates times 5 centres and 3 seeds this yields 3 times 45 points, with each seed
    in one of them at least: what one section of the settings, as `edit`, may be depends on its own
    values and on the chosen options.
    """
    seen = set()
    for point in points:
        sections: Dict[str, List[str]] = {}
        for override in point:
            key = override.split("=")[0].lstrip("+~").split("@")[0]
            sections.setdefault("" if is_group(key) else key.split(".")[0], []).append(override)
        options = tuple(sections.pop("", ()))
        kinds = {(options, name, tuple(own)) for name, own in sections.items()} or {(options,)}
        if not kinds <= seen:
            seen |= kinds
            yield list(point)


def _size(override: Any, most: int) -> int:
    """Return the number of values of one axis, counting to `most` + 1 at the furthest."""
    return sum(1 for _ in islice(override.sweep_iterator(), most + 1))


def _settings_of(group: str, point: Any) -> tuple:
    """Return the overrides of a point that belong to one config group."""
    return tuple(o for o in point if o.lstrip("+").split("=")[0].split(".")[0] == group)


ConfigStore.instance().store(
    group="hydra/sweeper", name="deltalab", node=PointsSweeperConf, provider="deltalab"
)
