"""The command line: compose a config, run the point, turn a user's mistake into one line.

Only light imports here: `--help` and tab completion load this module at every key.
"""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltalab import console


def conf_dir() -> Path:
    """Return the directory of the configs: inside an installed wheel, or beside the package."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def point(cfg: DictConfig) -> None:
    """Run one point: Hydra calls this once, or for every point of a sweep."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    sweeping = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    try:
        record, skipped = _run(cfg, hydra, sweeping)
    except Exception as error:
        logging.getLogger("deltalab").info("failed", exc_info=True)
        traceback.clear_frames(error.__traceback__)  # the frames would keep the model alive
        if sweeping:  # the sweeper counts failures when all points have run
            overrides = " ".join(hydra.overrides.task)
            console.point_done(f"failed: {overrides}: {console.one_line(error)}")
        elif isinstance(error, mistakes()):  # Hydra would put a line of its own before ours
            console.fail(console.one_line(error))
            sys.exit(2)
        raise
    console.point_done(console.describe(record, skipped))


def _run(cfg: DictConfig, hydra: Any, sweeping: bool) -> tuple[dict[str, Any], bool]:
    from deltalab.run import Choices, run

    chosen = hydra.runtime.choices
    choices = Choices(
        model=chosen["model"],
        edit=chosen["edit"],
        objective=chosen["objective"],
        experiment=chosen.get("experiment"),
    )
    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    return run(settings, choices, group=Path(hydra.sweep.dir if sweeping else hydra.run.dir).name)


def mistakes() -> tuple[type[Exception], ...]:
    """Return the exceptions that tell of a user's mistake: one line, no traceback, exit code 2."""
    from hydra.errors import HydraException

    return (ValueError, FileNotFoundError, HydraException, OmegaConfBaseException)


def main() -> None:
    """Entry point of the `deltalab` command. Exit code 0 on success, 2 for a user's mistake."""
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of being printed by Hydra
    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(point)
    try:
        run()
    except console.SweepFailed as error:
        console.fail(console.one_line(error))
        sys.exit(2 if all(isinstance(e, mistakes()) for e in error.failures) else 1)
    except mistakes() as error:
        console.fail(console.one_line(error))
        sys.exit(2)
    except KeyboardInterrupt:
        console.fail("interrupted; finished points are recorded, the same command continues")
        sys.exit(130)


if __name__ == "__main__":
    main()
