"""A point's parts, built from a config and checked: cheap, no model is opened."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from deltalab import options
from deltalab import settings as checks
from deltalab.apply.coded import held
from deltalab.apply.extras import check_needs
from deltalab.apply.merging import check_merge
from deltalab.budgets.shared import Shared, by_hand
from deltalab.calibration import providing
from deltalab.keys import Choices, determinants, salt_of
from deltalab.models.hub import Absent
from deltalab.run import experts, streams
from deltalab.run.opening import Unopened
from deltalab.run.point import (
    PROVIDED,
    Point,
)
from deltalab.store.digests import key_of
from deltalab.store.effects import check_margin
from deltalab.terminal.console import one_line
from deltalab.weights import finite, select

BUILT = ("objective", "evaluator", "riemann", "prediction")


def prepare(settings: Mapping[str, Any], choices: Choices) -> Point:
    """Build and validate the parts of a point; cheap, opens no model."""
    chosen, parts = validated(settings, choices)
    margin = check_margin(settings["margin"])
    salt, names, own = salt_of(settings, choices), options.experts_of(settings), {}
    for name in names:
        with experts.named(name):
            pair = prepare(options.member(settings, name), choices)
        edit, salted = experts.drawing(pair.edit, salt, name, names)
        own[name] = replace(pair, edit=edit, salt=salted)
    found = _determined(settings, choices, parts["model"])
    experts.check(own)
    streams.check(own, parts["merge"])
    return Point(
        **parts,
        select=chosen,
        seed=settings["seed"],
        nonfinite=settings["nonfinite"],
        artifacts=settings["artifacts"],
        artifacts_gb=settings["artifacts_gb"],
        margin=margin,
        objective_name=choices.objective,
        salt=salt,
        key=key_of(found) if found else "",
        parts=found,
        experts=own,
    )


def validated(settings: Mapping[str, Any], choices: Choices) -> tuple[Any, dict[str, Any]]:
    """Return the tensors to edit and the parts of a point by name, each built; touches no file.

    The model, objective and evaluator of a family are those of its first expert.

    Raises:
        ValueError: a setting of the wrong type, out of range, or unknown.
    """
    checks.check_top(settings)
    salt_of(settings, choices)
    finite.check(settings["nonfinite"])
    check_margin(settings["margin"])
    names = options.experts_of(settings)
    first = options.member(settings, names[0]) if names else settings
    edit, chosen = edit_of(settings)
    chosen = settings["select"] or chosen
    select.check(chosen)
    check_needs(edit, PROVIDED)
    merge, merged = merging(settings.get("merge"), names)
    layers = dict(first.get("calibration") or {})
    providing.check(layers)
    layers["objective"] = build(layers.get("objective"), "calibration.objective")
    layers.pop("data", None)
    if apart := layers.get("fisher"):
        made = build(apart.get("objective"), "calibration.fisher.objective")
        layers["fisher"] = {"model": apart.get("model", "post"), "objective": made}
    peers = {name: _peer(name, node) for name, node in (first.get("peers") or {}).items()}
    if "peers" in edit.needs and not peers:
        raise ValueError(
            f"peers=null: edit {type(edit).__name__} reads a further post-trained model of the"
            " base; name it, as peers={unaligned: PATH}"
        )
    with experts.named(names[0]) if names else nullcontext():
        parts = {name: build(first[name], name) for name in ("model", *BUILT)}
    for name, peer in peers.items():
        if (base := getattr(peer, "pre", None)) != (own := getattr(parts["model"], "pre", None)):
            raise ValueError(f"peers.{name}={peer.post}: of base {base}, the model is of {own}")
    parts |= {"merge": merge, "merged": merged, "calibration": layers, "peers": peers}
    return chosen, {"edit": edit, **parts}


def _peer(name: str, node: Mapping[str, Any]) -> Any:
    """Build the spec of a peer; a mistake in it is told as one of the peer's."""
    try:
        return build(node, f"peers.{name}")
    except ValueError as error:
        text = str(error).removeprefix("model.post=")
        raise ValueError(f"peers.{name}={text}") from None


def edit_of(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the edit of a point and return it with the tensors that its option is for.

    Args:
        settings: of which `edit`, `budget` and `values` count.

    Raises:
        ValueError: a mistake in them.
    """
    node, values = dict(settings["edit"]), settings.get("values", "exact")
    hand: dict[str, Any] = {}
    if (kind := checks.class_of(node, "edit")) is not None:
        node, hand = by_hand(kind, node)
    edit, chosen = _selecting(node, "edit")
    budget = build(settings.get("budget"), "budget")
    if not hand and budget is None:
        return held(edit, values), chosen
    held(edit, values)  # says what is wrong with it
    return Shared(edit, hand, budget, lambda each: held(each, values)), chosen


def _selecting(node: Mapping[str, Any], setting: str) -> tuple[Any, Any]:
    """Build a node that says which tensors it is for; return it and them."""
    own = dict(node)
    chosen = own.pop("select")
    return build(own, setting), chosen


def merging(
    node: Any, names: tuple[str, ...], provided: tuple[str, ...] = PROVIDED
) -> tuple[Any, Any]:
    """Build a merge and return it with the tensors that it is for; of a pair there is none.

    Args:
        node: its config; None where there is none.
        names: the experts.
        provided: what it may ask for of every expert.

    Raises:
        ValueError: a merge of a pair, none of a family, or one that is not for these experts.
    """
    if not node:
        if names:
            raise ValueError(
                f"merge=: model.experts names {len(names)}, say how they are merged, as merge=ties"
            )
        return None, "all"
    name = str(node.get("_target_", "")).rpartition(".")[2].lower()
    if not names:
        raise ValueError(
            f"merge={name}: a pair has nothing to merge; name experts, as model.experts={{a: DIR,"
            " b: DIR}"
        )
    merge, merged = _selecting({"select": "all", **node}, "merge")
    select.check(merged)
    check_merge(merge, provided, names)
    return merge, merged


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
