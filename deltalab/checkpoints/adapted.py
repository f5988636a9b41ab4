"""LoRA adapters in the layout of the PEFT library, put onto their base as they are read.

W = W_base + s B A (arXiv 2106.09685), s = alpha / r, or alpha / sqrt(r) of rsLoRA (arXiv
2312.03732); with DoRA (arXiv 2402.09353) every output of that has the norm that the adapter holds:
W = m (W_base + s B A) / |W_base + s B A|. Tensors that the adapter holds in full take the place of
the base's (`modules_to_save`, biases). All is computed in float64 and rounded once, to the base's
dtype, so that a part of a tensor has the bits that it has in the whole.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltalab.weights import configs
from deltalab.weights.contents import ADAPTER
from deltalab.weights.headers import plain
from deltalab.weights.mapping import Checkpoint, Meta

_LEAD = "base_model.model."
_PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_NAME = re.compile(r"[\w.\\^]+")
"""What a pattern of ranks may hold: nothing that a match could take long for."""
_BLOCK = 1 << 20
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""How adapters may have begun; others have changed the base that they go with."""
_OTHERWISE = (
    "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
    "megatron_config", "lora_bias",
)  # fmt: skip
"""Settings that make another function of the weights than is known here."""


@dataclass(frozen=True, eq=False)
class _Change:
    """What an adapter does to one matrix as the file has it: W + scale left right, then norms.

    Attributes:
        left: name of the factor whose first or last side is that of the matrix's rows.
        right: name of the other.
        flipped: whether both factors are to be transposed.
        scale: s.
        norms: name of DoRA's norms; None for none.
        by_row: whether each row has a norm, else each column.
    """

    left: str
    right: str
    flipped: bool
    scale: float
    norms: str | None
    by_row: bool


class Adapted(Checkpoint):
    """A base with an adapter on it: the names, shapes, dtypes and files of the base.

    Args:
        base: the model that the adapter goes with.
        path: the adapter's directory.
        setting: the setting that names it, for messages.

    Raises:
        FileNotFoundError: there are no tensors in its directory.
        ValueError: no LoRA adapter, one of a kind that is not known here, or of another base.
    """

    def __init__(self, base: Checkpoint, path: Path, setting: str) -> None:
        self.path, self.shards, self.base = base.path, base.shards, base
        self._where = f"{setting}={path}"
        try:
            self._adapter = Checkpoint(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self._where}: an adapter without its tensors") from None
        said = configs.content(path / ADAPTER)
        self._check(said)
        self._full: dict[str, str] = {}
        self._changes: dict[str, _Change] = {}
        self._norms: dict[str, Tensor] = {}
        parts: dict[str, dict[str, str]] = {}
        for name in self._adapter:
            own = name.removeprefix(_LEAD)
            if own == name:
                raise self._wrong(f"tensor {_shown(name)} is none of a LoRA adapter's")
            if found := _PART.fullmatch(own):
                parts.setdefault(found[1], {})[found[2]] = name
            else:
                own = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", own)
                self._full[self._fits(own, name, self._adapter.shape(name))] = name
        for module, names in parts.items():
            self._changes[f"{module}.weight"] = self._change(module, names, said)

    def _check(self, said: Mapping[str, Any]) -> None:
        """Raise `ValueError` for an adapter that changes weights in a way that is not known."""
        if said.get("peft_type") != "LORA":
            raise self._wrong(f"peft_type={_shown(said.get('peft_type'))}, must be LORA")
        if (start := said.get("init_lora_weights", True)) not in _STARTS:
            raise self._wrong(f"init_lora_weights={_shown(start)} goes with a base of its own")
        if other := next((name for name in _OTHERWISE if said.get(name)), None):
            raise self._wrong(f"{other}={_shown(said[other])} is not known")

    def _wrong(self, why: str) -> ValueError:
        return ValueError(
            f"{self._where}: an adapter that cannot be read: {why}; merge it into its model and"
            " save that"
        )

    def _fits(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """Return the name of a base's tensor that the adapter changes.

        Raises:
            ValueError: the base has none, or of another shape.
        """
        if name not in self.base:
            raise self._wrong(f"tensor {_shown(of)} is for {_shown(name)}, which model.pre lacks")
        if self.base.shape(name) != shape or not self.base.meta(name).floating:
            raise self._wrong(
                f"tensor {_shown(of)} is for one of shape {shape}, in model.pre {_shown(name)} has"
                f" {self.base.shape(name)}"
            )
        return name

    def _change(self, module: str, names: Mapping[str, str], said: Mapping[str, Any]) -> _Change:
        """Return what the adapter does to a module's weight."""
        kind = "lora_embedding_" if "lora_embedding_A" in names else "lora_"
        pair = [names.get(f"{kind}{which}") for which in "AB"]
        norms = names.get("lora_magnitude_vector")
        if None in pair or len(names) != 2 + (norms is not None):
            raise self._wrong(f"module {_shown(module)} has {', '.join(sorted(names))}")
        a, b = map(str, pair)
        sides = self._adapter.shape(a), self._adapter.shape(b)
        rank = self._number(said, "r", "rank_pattern", module)
        if any(len(side) != 2 for side in sides) or {sides[0][0], sides[1][1]} != {rank}:
            raise self._wrong(
                f"tensor {_shown(a)} of shape {sides[0]} and {_shown(b)} of {sides[1]} are not of"
                f" rank {rank:g}"
            )
        flipped = bool(said.get("fan_in_fan_out")) or kind != "lora_"
        shape = (sides[0][1], sides[1][0]) if flipped else (sides[1][0], sides[0][1])
        self._fits(f"{module}.weight", a, shape)
        if bool(said.get("use_dora")) != (norms is not None):
            raise self._wrong(f"module {_shown(module)} and use_dora do not fit")
        if norms is not None and prod(self._adapter.shape(norms)) != sides[1][0]:
            raise self._wrong(f"tensor {_shown(norms)} is of {self._adapter.shape(norms)}")
        alpha = self._number(said, "lora_alpha", "alpha_pattern", module)
        scale = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
        left, right = (a, b) if flipped else (b, a)
        return _Change(left, right, flipped, scale, norms, not flipped)

    def _number(self, said: Mapping[str, Any], name: str, patterns: str, module: str) -> float:
        """Return a module's rank or alpha: that of the first pattern that is for it, else of all.

        Raises:
            ValueError: it is no number above zero, or a pattern is more than a name.
        """
        value, given = said.get(name), said.get(patterns) or {}
        for key, own in given.items() if isinstance(given, Mapping) else ():
            try:
                if not _NAME.fullmatch(key):
                    raise re.error("more than a name")
                found = re.match(rf"(.*\.)?({key})$", module)
            except re.error:
                raise self._wrong(f"{patterns} has {_shown(key)}, which is no name") from None
            if found:
                value = own
                break
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
            raise self._wrong(f"{name}={_shown(value)} of {_shown(module)}, must be above 0")
        return value

    def meta(self, name: str) -> Meta:
        """Return a tensor's shape and dtype: the base's."""
        return self.base.meta(name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._changes:
            return self._under(name)
        out = torch.empty(self.shape(name), dtype=self.meta(name).dtype)
        rows = self._step(name)
        for start in range(0, len(out), rows):
            out[start : start + rows] = self._rows(name, start, min(start + rows, len(out)))
        return out

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries `start` to `stop` of a flat tensor."""
        if name not in self._changes:
            return self._under(name).reshape(-1)[start:stop]
        width = max(1, self.shape(name)[1])
        first, last = start // width, -(-stop // width)
        found = self._rows(name, first, last).reshape(-1)
        return found[start - first * width : stop - first * width]

    def _under(self, name: str) -> Tensor:
        """Return a tensor before its factors are added."""
        if (full := self._full.get(name)) is None:
            return self.base[name]
        return self._adapter[full].to(self.meta(name).dtype)

    def _step(self, name: str) -> int:
        """Return the rows that are computed at once."""
        return max(1, _BLOCK // max(1, self.shape(name)[1]))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a matrix that has factors, in the base's dtype."""
        moved = self._moved(name, start, stop)
        change = self._changes[name]
        if change.norms is not None:
            wanted = self._adapter[change.norms].double().reshape(-1)
            if change.by_row:
                moved *= (wanted[start:stop] / moved.norm(dim=1)).unsqueeze(1)
            else:
                moved *= wanted / self._by_column(name)
        return moved.to(self.meta(name).dtype)

    def _moved(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of W + s B A, in float64."""
        change, (left, right) = self._changes[name], self._factors[name]
        source = self._under(name) if name in self._full else self.base_rows(name, start, stop)
        rows = source[start:stop] if name in self._full else source
        return rows.double() + change.scale * (left[start:stop].double() @ right.double())

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of the base's matrix."""
        width = self.shape(name)[1]
        part = getattr(self.base, "part", None)
        if part is None:
            return self.base[name][start:stop]
        found: Tensor = part(name, start * width, stop * width)
        return found.reshape(stop - start, width)

    @cached_property
    def _factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The factors of every matrix, whose product is of the matrix's shape."""
        found = {}
        for name, change in self._changes.items():
            pair = self._adapter[change.left], self._adapter[change.right]
            found[name] = (pair[0].mT, pair[1].mT) if change.flipped else pair
        return found

    def _by_column(self, name: str) -> Tensor:
        """Return the norms of the columns of W + s B A."""
        if name not in self._norms:
            step, total = self._step(name), torch.zeros(self.shape(name)[1], dtype=torch.float64)
            for start in range(0, self.shape(name)[0], step):
                total += self._moved(name, start, start + step).square().sum(0)
            self._norms[name] = total.sqrt()
        return self._norms[name]


def _shown(value: Any) -> str:
    return plain(repr(value)[:100])
