"""One point: everything that determines it, built from a config and checked; opens no model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from deltalab import settings as checks
from deltalab.apply.extras import check_needs
from deltalab.console import one_line
from deltalab.keys import Choices, determinants, salt_of
from deltalab.loss import distill
from deltalab.loss.prediction import Predict
from deltalab.loss.riemann import Riemann
from deltalab.models.hub import Absent
from deltalab.reference import Unopened
from deltalab.store.digests import key_of
from deltalab.store.effects import check_margin
from deltalab.weights import finite, select

BUILT = ("objective", "evaluator", "riemann", "prediction")


@dataclass(frozen=True)
class Point:
    """Everything that determines one point, validated, before any model is opened."""

    model: Any
    edit: Any
    objective: Any
    evaluator: Any
    riemann: Riemann
    prediction: Predict
    select: Any
    seed: int
    nonfinite: str
    artifacts: str
    artifacts_gb: float | None
    margin: float
    objective_name: str
    salt: str
    key: str
    parts: Mapping[str, Any]

    @property
    def drawn(self) -> dict[str, Any]:
        """What decides the edited weights beside the pair and the edit's line."""
        version = self.parts["edit"]["version"]
        return {"select": self.select, "seed": self.seed, "salt": self.salt, "version": version}


def prepare(settings: Mapping[str, Any], choices: Choices) -> Point:
    """Build and validate the parts of a point; cheap, opens no model."""
    chosen, parts = validated(settings, choices)
    margin = check_margin(settings["margin"])
    found = _determined(settings, choices, parts["model"])
    return Point(
        **parts,
        select=chosen,
        seed=settings["seed"],
        nonfinite=settings["nonfinite"],
        artifacts=settings["artifacts"],
        artifacts_gb=settings["artifacts_gb"],
        margin=margin,
        objective_name=choices.objective,
        salt=salt_of(settings, choices),
        key=key_of(found) if found else "",
        parts=found,
    )


def validated(settings: Mapping[str, Any], choices: Choices) -> tuple[Any, dict[str, Any]]:
    """Return the tensors to edit and the parts of a point by name, each built; touches no file.

    Raises:
        ValueError: a setting of the wrong type, out of range, or unknown.
    """
    checks.check_top(settings)
    salt_of(settings, choices)
    finite.check(settings["nonfinite"])
    check_margin(settings["margin"])
    edit_settings = dict(settings["edit"])
    chosen = edit_settings.pop("select")
    chosen = settings["select"] or chosen
    select.check(chosen)
    edit = build(edit_settings, "edit")
    check_needs(edit, distill.PROVIDED)
    parts = {name: build(settings[name], name) for name in ("model", *BUILT)}
    return chosen, {"edit": edit, **parts}


def _determined(settings: Mapping[str, Any], choices: Choices, model: Any) -> dict[str, Any]:
    """Return what decides a point; empty in a plan where the models cannot be asked for.

    Raises:
        Unopened: the model's files are missing or damaged.
    """
    try:
        if hasattr(model, "ready"):
            model.ready()
        return determinants(settings, choices, settings.get("verify") == "full")
    except (ValueError, OSError) as error:
        if settings["plan"] and isinstance(error, Absent):
            return {}
        raise Unopened(one_line(error)) from error


def build(node: Any, setting: str) -> Any:
    """Instantiate a config node of this package; a mistake in it becomes a `ValueError`."""
    if not node or "_target_" not in node:
        return None
    checks.check_node(node, setting)
    try:
        built = instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError):
            raise ValueError(f"{setting}: {cause}") from None
        raise (cause if isinstance(cause, ValueError | OSError) else error) from None
    if hasattr(built, "data") and not hasattr(built.data, "open"):
        raise ValueError(f"{setting}.data={built.data}: must be a source of data")
    return built
