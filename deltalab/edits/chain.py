"""Chain: edits one after another, such as DARE and then BitDelta."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from omegaconf import OmegaConf
from torch import Tensor

from deltalab.codes import Code
from deltalab.edits import Edit, Unit
from deltalab.linear import factor
from deltalab.rng import Rng
from deltalab.settings import conf_dir


@dataclass(frozen=True)
class Chain(Edit):
    """Apply edits in turn: D_hat = F_n(... F_1(D)).

    Every step has its own random numbers; the first has those it would have alone. A model-wide
    threshold is known for the given delta only, so that `ties` with scope=model can but come first.

    Args:
        steps: names of edits, as `dare`, or names with settings, as `{dare: {p: 0.9}}`; settings
            that are left out have the defaults of `conf/edit`. At least one.

    Raises:
        ValueError: no steps, an unknown edit or setting, or a step that cannot stand there.

    >>> import torch
    >>> edit = Chain(steps=[{"expo": {"alpha": 1.0}}, {"expo": {"alpha": -0.5}}])
    >>> edit(torch.tensor([1.0, -2.0]))
    tensor([ 1., -2.])
    """

    steps: list[Any]
    version: ClassVar[int] = 1
    options: ClassVar = {"steps": "edit"}

    def __post_init__(self) -> None:
        if not isinstance(self.steps, list | tuple) or not self.steps:
            raise ValueError(f"edit.steps={self.steps}: must be a list of at least one edit")
        for step, edit in zip(self.steps[1:], self.edits[1:], strict=True):
            if edit.whole_model:
                raise ValueError(f"edit.steps={step}: needs the whole model, so must come first")

    @cached_property
    def edits(self) -> tuple[Edit, ...]:
        """The steps as edits."""
        return tuple(_built(step) for step in self.steps)

    @property
    def needs(self) -> tuple[str, ...]:
        """What this edit asks for: all that its steps do."""
        return tuple(dict.fromkeys(need for edit in self.edits for need in edit.needs))

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        """Entry by entry if all steps are."""
        return "entry" if {edit.unit for edit in self.edits} == {"entry"} else "tensor"

    @property
    def axes(self) -> bool:
        """Whether it matters to any step."""
        return any(edit.axes for edit in self.edits)

    @property
    def whole_model(self) -> bool:  # type: ignore[override]
        """Whether its first step does."""
        return self.edits[0].whole_model

    def among(self, place: int, count: int) -> Edit | None:
        """Raise `ValueError` where a step divides random numbers among experts: steps have own."""
        for step, edit in zip(self.steps, self.edits, strict=True):
            if edit.among(place, count) is not None:
                raise ValueError(f"edit.steps={step}: disjoint masks cannot be a step of a chain")
        return None

    def __call__(self, delta: Tensor, *args: Any, **given: Any) -> Tensor:
        """Return the delta after all steps."""
        hat, last = self._before_last(delta, given)
        return self.edits[-1](hat, **last)

    def encode(self, delta: Tensor, *args: Any, **given: Any) -> Code | None:
        """Return the code of the last step; a chain whose last step has none has none."""
        post = given.pop("post", None) if len(self.edits) == 1 else None
        hat, last = self._before_last(delta, given)
        return self.edits[-1].encode(hat, post=post, **last)

    def _before_last(self, delta: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the delta before the last step, and what that step needs."""
        hat = delta
        for index, edit in enumerate(self.edits):
            now = {need: given[need] for need in edit.needs}
            if index and "rng" in now:
                now["rng"] = _forked(now["rng"], index)
            if index and "svd" in now:
                now["svd"] = factors_of(hat)
            if index + 1 < len(self.edits):
                hat = edit(hat, **now)
        return hat, now


def _forked(rng: Rng, index: int) -> Rng:
    return rng.fork(str(index))


def factors_of(delta: Tensor) -> Callable[[], factor.Factors]:
    """Return what factorises a delta, for the need `svd`."""
    return lambda: factor.svd(delta.flatten(1))


def _built(step: Any) -> Edit:
    """Return one step as an edit: a name, a mapping from a name to settings, or the edit itself."""
    if isinstance(step, Edit):
        return step
    name, given = next(iter(step.items())) if isinstance(step, Mapping) and step else (step, {})
    conf = conf_dir() / "edit"
    known = sorted(p.stem for p in conf.glob("*.yaml") if p.stem != "chain")
    if name not in known or (isinstance(step, Mapping) and len(step) != 1):
        raise ValueError(f"edit.steps={step}: must name one of {', '.join(known)}")
    settings: Any = OmegaConf.to_container(OmegaConf.load(conf / f"{name}.yaml"))
    module, _, kind = settings.pop("_target_").rpartition(".")
    del settings["select"]
    chosen = getattr(import_module(module), kind)
    for key in given or {}:
        if key not in (valid := [f.name for f in fields(chosen)]):
            raise ValueError(f"edit.steps.{name}.{key}: must be one of {', '.join(valid)}")
    edit: Edit = chosen(**settings | dict(given or {}))
    return edit
