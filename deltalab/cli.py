"""The command line: compose a config, run the point, turn a user's mistake into one line.

Only light imports here: `--help` and tab completion load this module at every key.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from deltalab import keys, options, settings
from deltalab.report.columns import describe
from deltalab.settings import conf_dir
from deltalab.store import locks, records, shown
from deltalab.store.digests import key_of
from deltalab.store.records import redacted
from deltalab.sweep import composing, stopping, sweeps
from deltalab.terminal import console, flags, listing
from deltalab.terminal.mistakes import fail, known_names, mistakes, top_level

ELSEWHERE = ("Slurm", "Ray")
"""Launchers whose points run on other machines."""


def point(cfg: DictConfig) -> str | None:
    """Run one point: Hydra calls this once, or for every point of a sweep.

    Returns:
        The path of the point's lock where another process is running it, for the sweeper.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    sweeping = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    try:
        if cfg.plan:
            print(plan([(cfg, hydra)]))
            return None
        with stopping.working():
            record, skipped = _run(cfg, hydra, sweeping)
    except locks.Busy as busy:
        if sweeping:
            return str(busy.path)
        console.fail(f"{busy.owner} is running this point: waiting for it")
        locks.wait([busy.path])
        return point(cfg)
    except Exception as error:
        logging.getLogger("deltalab").info(redacted(traceback.format_exc()))
        traceback.clear_frames(error.__traceback__)  # the frames would keep the model alive
        if sweeping:  # the sweeper counts failures when all points have run
            overrides = " ".join(hydra.overrides.task)
            sweeps.note(hydra.runtime.output_dir, sweeps.FAILURE, console.one_line(error))
            if unopened(error):
                raise stopping.Ended(error) from None
            console.point_done(f"failed: {overrides}: {console.one_line(error)}")
        elif isinstance(error, mistakes()):  # Hydra would put a line of its own before ours
            fail(error)
        raise
    console.point_done(describe(record, skipped, _swept(hydra) if sweeping else ()))
    return None


def unopened(error: Exception) -> bool:
    """Whether a point failed because its pair cannot be opened: so would all others of it."""
    from deltalab.run.opening import Unopened

    return isinstance(error, Unopened)


def check(cfg: DictConfig, hydra: Any) -> None:
    """Build all parts of a point but its models, and its tracker; what is finished was valid.

    Raises:
        ValueError: a setting out of range, unknown, or of the wrong type.
    """
    values, choices = _plain(cfg, hydra)
    if _done(values, choices) is None:
        from deltalab.models.live import device_of
        from deltalab.run.building import build, validated

        _, parts = validated(values, choices)
        elsewhere = str(hydra.launcher._target_).rpartition(".")[2] in ELSEWHERE
        device_of(getattr(parts["model"], "device", "auto"), here=not elsewhere)
        build(values["tracker"], "tracker")


def _swept(hydra: Any) -> list[str]:
    """Return the overrides that set a point apart from others of its sweep."""
    varied = sweeps.varied(Path(hydra.sweep.dir))
    return [each for each in hydra.overrides.task if sweeps.setting(each) in varied]


def _run(cfg: DictConfig, hydra: Any, sweeping: bool) -> tuple[dict[str, Any], bool]:
    values, choices = _plain(cfg, hydra)
    group = Path(hydra.sweep.dir if sweeping else hydra.run.dir).name

    def begun(key: str) -> None:
        if sweeping:
            sweeps.note(hydra.runtime.output_dir, sweeps.KEY, key)

    if (done := _done(values, choices)) is not None:
        begun(done["key"])
        return done, True
    from deltalab.run import run

    return run(values, choices, group, begun)


def _done(values: dict[str, Any], choices: keys.Choices) -> dict[str, Any] | None:
    """Return the record of a finished point without importing what would run it."""
    try:
        found = keys.determinants(values, choices, values["verify"] == "full")
    except (OSError, ValueError, keys.Unmade):
        return None  # preparing the point says what is wrong
    return records.finished(values["results"], key_of(found), values["force"], choices.experiment)


def plan(configs: Iterable[tuple[DictConfig, Any]]) -> str:
    """Return what points would cost, given their configs and the options chosen in them."""
    from deltalab.plan.hours import Device
    from deltalab.plan.preview import preview
    from deltalab.run.building import prepare

    points, leave = [], False
    for cfg, hydra in configs:
        values, choices = _plain(cfg, hydra)
        evaluator = values["evaluator"] or {}
        if any(str(task).startswith("humaneval") for task in evaluator.get("tasks") or ()):
            leave |= not evaluator["run_code"]
            evaluator["run_code"] = True  # a plan runs nothing
        points.append(prepare(values, choices))
    text = preview(points, values["results"], Device(values["device_tflops"]))
    asks = "\n\nleave        the run itself needs evaluator.run_code=true: HumanEval runs code"
    return shown.lines(text + asks * leave)


def _plain(cfg: DictConfig, hydra: Any) -> tuple[dict[str, Any], keys.Choices]:
    """Return a point's settings as plain containers, checked by name, and its choices.

    Numbers are those that were meant: `range(0.1,0.4,0.1)` gives 0.3 and not 0.30000000000000004.
    """
    try:
        values: dict[str, Any] = settings.tidy(options.plain(cfg))
    except (MissingMandatoryValue, InterpolationToMissingValueError):
        without = ", ".join(missing(OmegaConf.to_container(cfg, resolve=False)))
        raise ValueError(f"{without}: missing, a value must be given") from None
    settings.check_top(values, top_level())
    chosen, sources = hydra.runtime.choices, hydra.runtime.config_sources
    named = {
        group: settings.option(group, chosen[group], sources)
        for group in ("model", "edit", "objective")
    }
    return values, keys.Choices(**named, experiment=chosen.get("experiment"))


def missing(node: Any, name: str = "") -> list[str]:
    """Return all settings without a value.

    >>> missing({"model": {"pre": "???", "post": "a"}, "data": {"dir": "???"}})
    ['model.pre', 'data.dir']
    """
    if isinstance(node, dict):
        return [
            n for key, value in node.items() for n in missing(value, f"{name}.{key}".lstrip("."))
        ]
    return [name] if node == "???" else []


def main() -> None:
    """Entry point of the `deltalab` command. Exit code 0 on success, 2 for a user's mistake."""
    import hydra

    console.ready()
    logging.raiseExceptions = False  # a log that cannot be written must not hide what went wrong
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of being printed by Hydra
    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(point)
    try:
        arguments = sys.argv[1:]
        if (told := listing.told(arguments)) is not None:
            print(told)
            return
        sys.argv[1:] = flags.arranged(arguments, lambda: known_names(arguments))
        with composing.guarded():
            run()
    except (Exception, stopping.Stopped) as error:
        if stopping.is_stop(error):
            console.fail("stopped; finished points are recorded, the same command continues")
            sys.exit(143)
        if isinstance(error, console.SweepFailed):
            fail(error, 2 if all(isinstance(e, mistakes()) for e in error.failures) else 1)
        if isinstance(error, mistakes()):
            fail(error)
        raise
    except KeyboardInterrupt:
        console.fail("interrupted; finished points are recorded, the same command continues")
        sys.exit(130)


if __name__ == "__main__":
    main()
