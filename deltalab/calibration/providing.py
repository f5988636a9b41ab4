"""What edits and merges ask for of a calibrated model: means, grams, squared gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from deltalab.artifacts import Store
from deltalab.calibration import collecting, entropy
from deltalab.data import splits
from deltalab.loss import distill
from deltalab.loss.objectives import Loss
from deltalab.terminal import console
from deltalab.weights.layouts import layout_of
from deltalab.weights.mapping import LazyWeights, ModelPair, Weights, loaded, meta

PROVIDED = ("acts", "gram", "fisher", "entropy")
"""What `Calibration.providers` provides."""
SIDES = ("post", "pre")
VERSION = 1
"""To be raised when the same layers on the same data come to have other statistics."""


def check(settings: Mapping[str, Any]) -> None:
    """Check what says of which model and how statistics are taken.

    Raises:
        ValueError: an unknown model, or neither true nor false.

    >>> check({"model": "base"})
    Traceback (most recent call last):
    ValueError: calibration.model=base: must be one of post, pre
    """
    apart = settings.get("fisher") or {}
    for where, node in (("calibration", settings), ("calibration.fisher", apart)):
        if (side := node.get("model", "post")) not in SIDES:
            raise ValueError(f"{where}.model={side}: must be one of {', '.join(SIDES)}")
    if not isinstance(sequential := settings.get("sequential", False), bool):
        raise ValueError(f"calibration.sequential={sequential}: must be true or false")


@dataclass(eq=False)
class Calibration:
    """Statistics of one model of a pair on half A of some examples.

    Only some layers' statistics are in memory at a time; what was collected is in the store.

    Attributes:
        pair: the open pair, whose module holds `post`.
        loss: the opened objective whose examples are run; half A of them is.
        store: where the statistics are kept.
        model: whose layers: `post` or `pre`.
        about: what decides the statistics beside the store's own determinants, ready for JSON.
        sequential: whether a block's inputs are those that the blocks before it give once they are
            edited (`in_order`), the others being the model's; such statistics belong to one point
            and are not kept.
        apart: whose squared gradients are provided in place of this one's own.
        limit: bytes of statistics that a pass holds.
    """

    pair: ModelPair
    loss: Loss
    store: Store
    model: str = "post"
    about: Mapping[str, Any] = field(default_factory=dict)
    sequential: bool = False
    limit: int = collecting.LIMIT
    apart: "Calibration | None" = None
    _held: dict[str, tuple[Any, Mapping[str, Tensor]]] = field(default_factory=dict, init=False)
    _grouped: dict[int, list[list[Any]]] = field(default_factory=dict, init=False)
    _made: dict[str, Tensor] = field(default_factory=dict, init=False)

    def providers(self) -> dict[str, Callable[[str, Weights], Any]]:
        """Return the providers of `PROVIDED`, for `extras.Extras`."""
        return {
            "acts": lambda name, _: distill.input_of(
                self.pair.module, self._means, name, meta(self.pair.post, name).shape
            ),
            "gram": lambda name, _: self.gram(name),
            "fisher": lambda name, _: (self.apart or self)._fisher[name],
            "entropy": lambda *_: self.unsure,
        }

    def unsure(self, weights: Weights, step: int, examples: int) -> dict[str, Tensor]:
        """Return the gradient of the outputs' mean entropy at some weights, on some inputs.

        Args:
            weights: of the pair's tensors, in place of its own.
            step: which inputs: those that follow the inputs of the step before, in a circle.
            examples: how many of them, fewer at the end of the circle.
        """
        groups = self._grouped.setdefault(examples, distill.grouped(self._half.batches, examples))
        batches = groups[step % len(groups)]
        return entropy.gradient_at(self.pair, self._half, batches, weights)

    def gram(self, name: str) -> Tensor | None:
        """Return X'X / n of the layer that a tensor is the weight of; None where it is of none."""
        layer = self._layers.get(name)
        if layer is None:
            return None
        group = next(each for each in self._groups if layer in each)
        compute = lambda step: collecting.grams(self.pair.module, self._half, group, step)  # noqa: E731
        return self._statistics("gram", group, compute, len(self._half.batches))[layer]

    @cached_property
    def _half(self) -> Loss:
        return splits.halved(self.loss, "A")

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        with self._seated():
            return distill.mean_inputs(self.pair.module, self._half)

    @cached_property
    def _layers(self) -> dict[str, str]:
        """The module's layers by the names that the pair's files have for their weights."""
        known: Any = {name: name for name in collecting.layers(self.pair.module)}
        found: Any = layout_of(self.pair.module).of_layers(known)
        return dict(found)

    @cached_property
    def _groups(self) -> list[tuple[str, ...]]:
        module = self.pair.module
        names = list(dict.fromkeys(self._layers[n] for n in self.pair.post if n in self._layers))
        if self.sequential:
            return collecting.blocks(module, names)
        known = collecting.layers(module)
        return collecting.groups(
            {n: 8 * collecting.width(known[n]) ** 2 for n in names}, self.limit
        )

    @cached_property
    def _fisher(self) -> Weights:
        """Squared gradients under the files' names, some parameters at a time."""
        module = self.pair.module
        parameters = dict(module.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in reversed(parameters.items())}
        own = {name: first[id(parameter)] for name, parameter in parameters.items()}
        sizes = {name: 4 * parameters[name].numel() for name in dict.fromkeys(own.values())}
        runs = collecting.groups(sizes, self.limit)
        count = sum(splits.examples(batch) for batch in self._half.batches)

        def load(name: str) -> Tensor:
            group = next(each for each in runs if own[name] in each)
            compute = lambda step: collecting.fisher(module, self._half, group, step)  # noqa: E731
            return self._statistics("fisher", group, compute, count)[own[name]]

        told = lambda name: meta(dict(parameters), name)  # noqa: E731
        return layout_of(module).filed(LazyWeights(parameters, load, told))

    def _statistics(
        self,
        what: str,
        group: tuple[str, ...],
        collect: Callable[[Callable[[], None]], dict[str, Tensor]],
        steps: int,
    ) -> Mapping[str, Tensor]:
        """Return the statistics of a group of layers: at hand, or from the store, or new."""
        held = self._held.get(what)
        if held is not None and held[0] == group:
            return held[1]

        def compute() -> dict[str, Tensor]:
            with self._seated(), console.steps(f"calibration: {what}", steps) as step:
                return collect(step)

        self._held.pop(what, None)  # before the next group is there
        extra = {**self.about, "statistic": what, "layers": list(group), "model": self.model,
                 "version": VERSION}  # fmt: skip
        found = compute() if self.sequential else self.store.tensors("calibration", compute, extra)
        self._held[what] = group, found
        return found

    @contextmanager
    def _seated(self) -> Iterator[None]:
        """Have the module hold the weights that are asked about."""
        pair = self.pair
        side = pair.pre if self.model == "pre" else pair.post
        base = loaded(pair.module, side, restore=pair.post) if side is pair.pre else nullcontext()
        with base, loaded(pair.module, self._made, restore=side):
            yield

    def in_order(self, edited: Weights) -> dict[str, Tensor]:
        """Return all edited weights; sequentially, each block sees those before it edited.

        Args:
            edited: computed when they are asked for, with `providers` of this calibration.
        """
        if not self.sequential:
            return dict(edited)
        place = {name: index for index, name in enumerate(self.pair.module.state_dict())}
        known = {f: place[n] for f, n in self._layers.items()}
        order = sorted(edited, key=lambda name: known.get(name, place.get(name, len(place))))
        self._held.clear()
        try:
            for name in order:
                self._made[name] = edited[name]
            return {name: self._made[name] for name in edited}
        finally:
            self._made.clear()
