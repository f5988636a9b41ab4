"""An edit whose settings differ from tensor to tensor: given by hand, or by a budget.

By hand, a setting is a mapping: `edit.p={default: 0.5, mlp: 0.7, layers.0-7: 0.2}`. A key is
`default`, a part of the model, or a layer or a range of them, counted from 0; of those that a
tensor is in, the layers count before the part, the part before the default.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from torch import Tensor

from deltalab.edits import Edit, Unit
from deltalab.settings import near
from deltalab.weights.mapping import PARTS, part_of

_LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?$")


@dataclass(frozen=True)
class Shared(Edit):
    """An edit of which every tensor has its own settings; `of` gives a tensor's.

    Its shifts lie on no line with others and follow no closed form.

    Args:
        edit: with what the tensors have by default.
        hand: setting -> key -> value, as above.
        budget: the rule that gives shares (`deltalab.budgets`), or None.
        wrap: applied to every tensor's edit, as for codes of a narrower type.

    Raises:
        ValueError: a key that can be none, ranges that overlap, or a value out of range.

    >>> from deltalab.edits.expo import Expo
    >>> edit = Shared(Expo(alpha=0.0), {"alpha": {"default": 0.0, "mlp": 0.5, "layers.1": 1.0}})
    >>> edit.of("blocks.0.mlp.fc1.weight"), edit.of("blocks.1.mlp.fc1.weight"), edit.of("head.bias")
    (Expo(alpha=0.5), Expo(alpha=1.0), Expo(alpha=0.0))
    """

    edit: Edit
    hand: Mapping[str, Mapping[str, Any]]
    budget: Any = None
    wrap: Callable[[Edit], Edit] = field(default=lambda edit: edit, repr=False)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, values in self.hand.items():
            seen: dict[int, str] = {}
            for key, value in values.items():
                for layer in _check_key(name, str(key)):
                    if layer in seen:
                        raise ValueError(
                            f"edit.{name}: layer {layer} is in {seen[layer]} and {key}"
                        )
                    seen[layer] = str(key)
                self._replaced({name: value})
        if self.budget is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        rule, kind = type(self.budget).__name__.lower(), type(self.edit).__name__
        known = self.budget.spends or (str(self.edit.spends),)
        if self.edit.spends is None or self.edit.spends not in known:
            wanted = (
                f"; it is for edits that spend {' or '.join(known)}" if self.budget.spends else ""
            )
            raise ValueError(
                f"budget={rule}: edit {kind} spends {self.edit.spends or 'nothing'}{wanted}"
            )
        if self.edit.spends in self.hand:
            raise ValueError(
                f"edit.{self.edit.spends}: given by hand and by budget={rule}; leave out one"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """What the edit itself asks for."""
        return self.wrap(self.edit).needs

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        """That of the edit."""
        return self.wrap(self.edit).unit

    @property
    def axes(self) -> bool:
        """That of the edit."""
        return self.edit.axes

    @property
    def whole_model(self) -> bool:  # type: ignore[override]
        """That of the edit."""
        return self.edit.whole_model

    def __call__(self, delta: Tensor, *args: Any, **needs: Any) -> Tensor:
        """Return the delta edited as a tensor that no key but the default is for."""
        return self.of("")(delta, **needs)

    def encode(self, delta: Tensor, *args: Any, **needs: Any) -> Any:
        """Return the code of a tensor that no key but the default is for."""
        return self.of("").encode(delta, **needs)

    def of(self, name: str, share: Any = None) -> Edit:
        """Return the edit of one tensor.

        Args:
            name: the tensor's.
            share: what a budget gives it; None: the edit's own setting.
        """
        chosen = {field: _value(values, name) for field, values in self.hand.items()}
        edit = self._replaced(chosen)
        return self.wrap(edit if share is None else edit.with_share(share))

    def check(self, names: Collection[str]) -> None:
        """Raise `ValueError` where a key is for none of the tensors that are edited."""
        parts, layers = {part_of(n) for n in names}, {layer_of(n) for n in names}
        for name, values in self.hand.items():
            for key in map(str, values):
                wanted = set(_layers(key))
                if not (key == "default" or key in parts or (wanted and wanted <= layers)):
                    known = sorted(layer for layer in layers if layer is not None)
                    told = f"; layers are {known[0]} to {known[-1]}" if known else ""
                    raise ValueError(
                        f"edit.{name}.{key}: is for no tensor that is edited; parts are"
                        f" {', '.join(p for p in PARTS if p in parts)}{told}"
                    )

    def _replaced(self, changed: Mapping[str, Any]) -> Edit:
        made: Edit = replace(self.edit, **changed)  # type: ignore[type-var]
        return made


def by_hand(kind: Any, node: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an edit's node with defaults alone, and the settings that are given by hand.

    Args:
        kind: the edit's class.
        node: its settings.

    Raises:
        ValueError: a mapping without a default.

    >>> from deltalab.edits.expo import Expo
    >>> by_hand(Expo, {"alpha": {"default": 0.5, "mlp": 1.0}})
    ({'alpha': 0.5}, {'alpha': {'default': 0.5, 'mlp': 1.0}})
    """
    own, hand, hints = dict(node), {}, get_type_hints(kind)
    plain = {f.name for f in fields(kind)}
    for name, value in node.items():
        if name not in plain or not isinstance(value, Mapping) or not value:
            continue
        mapping = any(isinstance(k, type) and issubclass(k, Mapping) for k in _kinds(hints[name]))
        if mapping and "default" not in value:
            continue  # the setting is a mapping itself
        if "default" not in value:
            raise ValueError(f"edit.{name}={dict(value)}: values by hand must name a default")
        own[name], hand[name] = value["default"], dict(value)
    return own, hand


def _kinds(hint: Any) -> list[Any]:
    return [get_origin(kind) or kind for kind in (get_args(hint) or (hint,))] + [get_origin(hint)]


def _check_key(name: str, key: str) -> range:
    """Return the layers that a key is for, none of a part's."""
    if key == "default" or key in PARTS:
        return range(0)
    if not (found := _layers(key)):
        raise ValueError(
            f"edit.{name}.{key}: must be default, one of {', '.join(PARTS)}, or layers.A or"
            f" layers.A-B{near(key, ['default', *PARTS])}"
        )
    return found


def _layers(key: str) -> range:
    match = _LAYERS.match(key)
    if not match:
        return range(0)
    return range(int(match[1]), int(match[2] or match[1]) + 1)


@cache
def layer_of(name: str) -> int | None:
    """Return the number of a tensor's layer, the first in its name; None where it has none.

    >>> layer_of("model.layers.12.mlp.up_proj.weight"), layer_of("head.weight")
    (12, None)
    """
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None


def _value(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of one tensor: of its layer, its part, or the default."""
    layer, found = layer_of(name), values["default"]
    for key, value in values.items():
        if layer is not None and layer in _layers(str(key)):
            return value
        if part_of(name) == key:
            found = value
    return found
