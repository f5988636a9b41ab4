"""A family as a stream of tasks: after each the experts so far, merged, and scored on all so far.

What is learned and scored is `deltalab.evaluators.continual`'s; here are the backbones.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from deltalab.apply import merging
from deltalab.evaluators.continual import Continual, Stream, follow
from deltalab.merges import Merge
from deltalab.run.point import Point
from deltalab.weights import finite
from deltalab.weights.mapping import ModelPair, Weights, loaded


def of(points: Mapping[str, Point]) -> dict[str, Continual]:
    """Return every expert's task, where the family is a stream; nothing where it is none."""
    found = {name: point.evaluator for name, point in points.items()}
    return found if any(isinstance(each, Continual) for each in found.values()) else {}


def check(points: Mapping[str, Point], merge: Merge | None) -> None:
    """Check that a family is a stream wholly or not at all, and that the merge can follow it.

    Raises:
        ValueError: which expert or setting does not fit.
    """
    tasks = of(points)
    if not tasks or merge is None:
        return
    first, how = next((n, t) for n, t in tasks.items() if isinstance(t, Continual))
    for name, task in tasks.items():
        if not isinstance(task, Continual):
            raise ValueError(
                f"model.experts.{name}.evaluator: must be continual, as that of {first} is"
            )
        if replace(how, train=task.train, test=task.test, name=task.name) != task:
            raise ValueError(
                f"model.experts.{name}.evaluator: a stream is classified in one way, and {first}"
                " has other settings"
            )
    if how.backbone == "own":
        return
    if merge.each:
        raise ValueError(
            f"merge={type(merge).__name__.lower()}: gives a model for each expert, where"
            " evaluator=continual needs one for all tasks so far"
        )
    names = [*points]
    for count in range(1, len(names) + 1):
        merge.restricted(names[:count]).check(names[:count])


def streamed(
    tasks: Mapping[str, Continual], pairs: Mapping[str, ModelPair], family: merging.Family
) -> tuple[dict[str, float], dict[str, Any], dict[str, Tensor]]:
    """Go through a stream.

    Returns:
        The metrics, `stream/...`; how it was classified, and the accuracy matrix; what every test
        image scored.
    """
    how, first = next(iter(tasks.values())), next(iter(pairs.values()))
    opened = [task.task(pairs[name].transform) for name, task in tasks.items()]
    found: Stream = follow(opened, _backbones(how, first, family), how)
    names = {f"stream/{name}": value for name, value in found.metrics().items()}
    scored = {f"stream/{name}": values for name, values in found.documents().items()}
    about = {"head": how.head, "prototypes": how.prototypes, "backbone": how.backbone}
    return names, {**about, "accuracy": found.matrix([*tasks])}, scored


def _backbones(
    how: Continual, pair: ModelPair, family: merging.Family
) -> Iterator[AbstractContextManager[nn.Module]]:
    """Yield the first expert's module with the weights after each task."""
    for count, expert in enumerate(family.experts.values(), 1):
        weights: Weights = expert.post
        if how.backbone == "merged":
            merged = dict(family.first(count).merged())
            finite.check_edited(merged)
            weights = {**pair.pre, **merged}
        yield loaded(pair.module, weights, restore=pair.post)
