"""The command line: compose a config, run the point, turn a user's mistake into one line.

Only light imports here: `--help` and tab completion load this module at every key.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltalab import allowed, console, flags, settings
from deltalab.settings import conf_dir
from deltalab.store import locks
from deltalab.store.records import redacted
from deltalab.sweep import stopping, sweeps


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
            print(plan([(cfg, hydra.runtime.choices)]))
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
        logging.getLogger("deltalab").info("%s", redacted(traceback.format_exc()))
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
    console.point_done(console.describe(record, skipped))
    return None


def unopened(error: Exception) -> bool:
    """Whether a point failed because its pair cannot be opened: so would all others of it."""
    from deltalab.run import Unopened

    return isinstance(error, Unopened)


def check(cfg: DictConfig, chosen: Any) -> None:
    """Build all parts of a point but its models, and its tracker.

    Raises:
        ValueError: a setting out of range, unknown, or of the wrong type.
    """
    from deltalab.run import build, validated

    values, _ = _plain(cfg, chosen)
    validated(values)
    build(values["tracker"], "tracker")


def _run(cfg: DictConfig, hydra: Any, sweeping: bool) -> tuple[dict[str, Any], bool]:
    from deltalab.run import run

    values, choices = _plain(cfg, hydra.runtime.choices)
    group = Path(hydra.sweep.dir if sweeping else hydra.run.dir).name

    def begun(key: str) -> None:
        if sweeping:
            sweeps.note(hydra.runtime.output_dir, sweeps.KEY, key)

    return run(values, choices, group, begun)


def plan(configs: Iterable[tuple[DictConfig, Any]]) -> str:
    """Return what points would cost, given their configs and the options chosen in them."""
    from deltalab.plan.hours import Device
    from deltalab.plan.preview import preview
    from deltalab.run import prepare

    points, leave = [], False
    for cfg, chosen in configs:
        values, choices = _plain(cfg, chosen)
        evaluator = values["evaluator"] or {}
        if any(str(task).startswith("humaneval") for task in evaluator.get("tasks") or ()):
            leave |= not evaluator["run_code"]
            evaluator["run_code"] = True  # a plan runs nothing
        points.append(prepare(values, choices))
    text = preview(points, values["results"], Device(values["device_tflops"]))
    asks = "\n\nleave        the run itself needs evaluator.run_code=true: HumanEval runs code"
    return text + asks * leave


def _plain(cfg: DictConfig, chosen: Any) -> tuple[dict[str, Any], Any]:
    """Return a point's settings as plain containers, checked by name, and its choices."""
    from deltalab.run import Choices

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    settings.check_top(values, top_level())
    choices = Choices(
        model=chosen["model"],
        edit=chosen["edit"],
        objective=chosen["objective"],
        experiment=chosen.get("experiment"),
    )
    return values, choices


def mistakes() -> tuple[type[Exception], ...]:
    """Return the exceptions that tell of a user's mistake: one line, no traceback, exit code 2."""
    from hydra.errors import HydraException

    return (ValueError, OSError, HydraException, OmegaConfBaseException)


@cache
def top_level() -> list[str]:
    """Return all names that a config may have at its top: settings and groups."""
    primary = OmegaConf.load(conf_dir() / "config.yaml")
    groups = (p.name for p in conf_dir().iterdir() if p.is_dir())
    return [str(name) for name in [*primary, *groups] if name not in ("defaults", "hydra")]


@contextmanager
def guarded() -> Iterator[None]:
    """Check every config that Hydra composes before Hydra calls anything that it names.

    Callbacks, plugins and log handlers are called before a job starts, so that no check within the
    job comes in time; Hydra has a list of what is forbidden, and here is what is allowed.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    allowed.restrict_environment()
    loader: Any = ConfigLoaderImpl
    original, search = loader.load_configuration, loader._process_config_searchpath

    def checked(
        self: Any, config_name: str | None, overrides: list[str], run_mode: Any, **kwargs: Any
    ) -> DictConfig:
        overrides = as_text(overrides, self)
        cfg: DictConfig = original(self, config_name, overrides, run_mode, **kwargs)
        allowed.check_hydra(cfg.hydra, overrides)
        expand(cfg)
        settings.check_results(cfg.get("results"))
        check_options(cfg.hydra.runtime.choices, overrides, self)
        return cfg

    def searched(self: Any, config_name: str | None, overrides: list[Any], repo: Any) -> None:
        places = [o.value() for o in overrides if o.get_key_element() == "hydra.searchpath"]
        loaded = None if config_name is None else repo.load_config(config_path=config_name)
        if loaded is not None and OmegaConf.is_dict(loaded.config):
            places.append(OmegaConf.select(loaded.config, "hydra.searchpath"))
        for place in places:
            allowed.check_search_path(place if isinstance(place, list | ListConfig) else [])
        search(self, config_name, overrides, repo)

    loader.load_configuration, loader._process_config_searchpath = checked, searched
    try:
        yield
    finally:
        loader.load_configuration, loader._process_config_searchpath = original, search


def check_options(choices: Any, overrides: list[str], loader: Any) -> None:
    """Raise `ValueError` for an option that does not exist: Hydra ignores it in optional groups.

    Args:
        choices: the option of every group, as composed.
        overrides: what was typed, where a group may have a list of options.
        loader: Hydra's.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen: list[tuple[str, Any]] = [
        (str(group).split("@")[0], [option]) for group, option in choices.items()
    ]
    listed = OverridesParser.create().parse_overrides([o for o in overrides if "=[" in o])
    is_group = loader.repository.group_exists
    chosen += [(o.key_or_group, o.value()) for o in listed if is_group(o.key_or_group)]
    follow = {"grid": "edit", "evaluator/tasks": "data"}  # an option of that name, if there is one
    for group, named in chosen:
        for option in named:
            if option is None or option == choices.get(follow.get(group, "")):
                continue
            if str(option) not in (options := _options(loader, group)):
                hint = settings.near(str(option), options)
                raise ValueError(f"{group}={option}: must be one of {', '.join(options)}{hint}")


def as_text(overrides: list[str], loader: Any) -> list[str]:
    """Return overrides with quotes where Hydra would take no text: `edit=2`, `results=~/x`."""
    found = []
    for line in overrides:
        key, _, value = line.partition("=")
        number = re.fullmatch(r"[\d.+-][\w.+-]*|true|false", value)
        group = number and loader.repository.group_exists(key.lstrip("+").split("@")[0])
        found.append(f"{key}='{value}'" if group or re.fullmatch(r"~[^',]*", value) else line)
    return found


def expand(cfg: DictConfig) -> None:
    """Write out a `~` in the directories that a run writes to.

    Raises:
        ValueError: a home directory of nobody.
    """
    hydra = cfg.hydra
    for node, key in (
        (cfg, "results"),
        (cfg, "artifacts"),
        (hydra.run, "dir"),
        (hydra.sweep, "dir"),
    ):
        kept = OmegaConf.to_container(node, resolve=False).get(key)  # type: ignore[union-attr]
        given = node.get(key) if node is cfg else kept
        if isinstance(given, str) and given.startswith("~"):
            node[key] = settings.home(given, "hydra.dir" if node is not cfg else key)


@cache
def _options(loader: Any, group: str) -> list[str]:
    """Return the options of a group; a sweep composes many configs from the same directories."""
    options: list[str] = loader.get_group_options(group)
    return options


def fail(error: BaseException, code: int = 2) -> NoReturn:
    """Print an error in one line, with the nearest name for one that does not exist, and exit."""
    message = console.one_line(error)
    known = known_names(sys.argv[1:]) if "Could not override" in message else []
    console.fail(message + settings.suggestion(message, known))
    sys.exit(code)


def known_names(arguments: list[str]) -> list[str]:
    """Return all settings of the config with the groups that the arguments choose, as `edit.p`."""
    from hydra import compose, initialize_config_dir

    groups = [a for a in arguments if a.split("=")[0] in top_level() and "=" in a]
    for chosen in (groups, []):
        try:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                return settings.names(OmegaConf.to_container(compose("config", chosen)))
        except Exception:  # the arguments are what is wrong
            continue
    return []


def main() -> None:
    """Entry point of the `deltalab` command. Exit code 0 on success, 2 for a user's mistake."""
    import hydra

    logging.raiseExceptions = False  # a log that cannot be written must not hide what went wrong
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of being printed by Hydra
    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(point)
    try:
        arguments = sys.argv[1:]
        sys.argv[1:] = flags.arranged(arguments, lambda: known_names(arguments))
        with guarded():
            run()
    except console.SweepFailed as error:
        fail(error, 2 if all(isinstance(e, mistakes()) for e in error.failures) else 1)
    except mistakes() as error:
        fail(error)
    except stopping.Stopped:
        console.fail("stopped; finished points are recorded, the same command continues")
        sys.exit(143)
    except KeyboardInterrupt:
        console.fail("interrupted; finished points are recorded, the same command continues")
        sys.exit(130)


if __name__ == "__main__":
    main()
