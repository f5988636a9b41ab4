"""The one interchange type, `Weights`: a mapping from tensor names to tensors.

A state dict, a lazily read checkpoint, a delta, gradients and shifts are all `Weights`. Laziness
lives in the mapping and never in the algorithms, so that a one-million-parameter pair in memory and
a sharded 70B checkpoint on disk run the same code, one tensor at a time.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Weights = Mapping[str, Tensor]

PARTS = ("attention", "mlp", "norm", "embedding", "head", "other")
"""The parts of a model that a term is split into, in the order in which they are reported."""

_PART_PATTERNS = (
    ("norm", r"(^|[._])(norm\d*|ln(_?\w+)?|\w*layernorm\w*|\w*_norm|norm_\w+|ls\d)(\.|$)"),
    ("attention", r"(^|\.)(\w*attn\w*|\w*attention\w*)(\.|$)"),
    ("mlp", r"(^|\.)(mlp|ffn|feed_forward|fc\d|intermediate|output\.dense|experts?)(\.|$)"),
    ("head", r"(^|\.)(lm_head|head|fc|classifier|visual_projection|text_projection)(\.|$)"),
    (
        "embedding",
        r"(^|\.)(\w*embed\w*|wte|wpe|cls_token|dist_token|reg_token|pos_embed\w*)(\.|$)",
    ),
)


def part_of(name: str) -> str:
    """Return the part of a transformer that a tensor belongs to, judged by its name.

    Covers the naming of timm's vision transformers and of Hugging Face's decoders; what matches
    nothing is `other`.

    >>> [part_of(n) for n in ("blocks.0.attn.qkv.weight", "blocks.0.norm1.bias", "head.weight")]
    ['attention', 'norm', 'head']
    >>> part_of("model.layers.3.mlp.gate_proj.weight"), part_of("model.embed_tokens.weight")
    ('mlp', 'embedding')
    """
    for part, pattern in _PART_PATTERNS:
        if re.search(pattern, name):
            return part
    return "other"


class LazyWeights(Mapping[str, Tensor]):
    """Weights whose tensors are computed when they are asked for, and not kept.

    Args:
        names: the tensor names, in order.
        load: computes the tensor of one name.

    >>> double = LazyWeights(["a"], lambda name: torch.tensor([2.0]))
    >>> double["a"], list(double)
    (tensor([2.]), ['a'])
    """

    def __init__(self, names: Iterable[str], load: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._load = load

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited test would compute the tensor


class Checkpoint(Mapping[str, Tensor]):
    """A safetensors file or a directory of shards, read tensor by tensor.

    Only headers are read on opening. Tensors come memory-mapped from the file, in the dtype stored.

    Args:
        path: a `.safetensors` file, an index (`*.safetensors.index.json`), or a directory holding
            either `model.safetensors`, an index, or exactly one `.safetensors` file.

    Raises:
        FileNotFoundError: nothing readable at `path`, or a shard named by the index is missing.
        ValueError: a file is not valid safetensors, or index and shards disagree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.shards = _shards(self.path)
        self._handles = {file: _open(file) for file in dict.fromkeys(self.shards.values())}
        names = {file: set(handle.keys()) for file, handle in self._handles.items()}
        for name, file in self.shards.items():
            if name not in names[file]:
                raise ValueError(f"{file}: tensor {name!r} is in the index but not in this shard")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[self.shards[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, name: object) -> bool:
        return name in self.shards

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header, without reading the tensor."""
        return tuple(self._handles[self.shards[name]].get_slice(name).get_shape())


def _open(file: Path) -> Any:
    """Open a safetensors file; the handle's own type has no annotations."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a valid safetensors file ({error})") from None


def _shards(path: Path) -> dict[str, Path]:
    """Map every tensor name to the file that holds it."""
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = sorted(path.glob("*.safetensors"))
        if indices:
            path = indices[0]
        elif path / "model.safetensors" in files:
            path = path / "model.safetensors"
        elif len(files) == 1:
            path = files[0]
        else:
            found = "several .safetensors files and no index" if files else "no .safetensors file"
            raise FileNotFoundError(f"{path}: {found} in this directory")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.name.endswith(".index.json"):
        weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
        missing = sorted({f for f in weight_map.values() if not (path.parent / f).is_file()})
        if missing:
            raise FileNotFoundError(f"{path.parent / missing[0]}: named by {path.name}, missing")
        return {name: path.parent / file for name, file in weight_map.items()}
    return dict.fromkeys(_open(path).keys(), path)


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A pre-trained and a post-trained model that share every tensor name and shape.

    Attributes:
        pre: the pre-trained weights.
        post: the post-trained weights, same names and shapes.
        module: the one live module, holding `post`; edits are loaded into it and taken out again.
        transform: turns a PIL image into the module's input (image models that read files).
        labels: class names in the order of the module's outputs, where known.
    """

    pre: Weights
    post: Weights
    module: nn.Module
    transform: Callable[..., Tensor] | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_same_layout(self.pre, self.post)


def check_same_layout(pre: Weights, post: Weights) -> None:
    """Raise `ValueError` naming the first tensor that one side lacks or whose shapes differ."""
    for name in post:
        if name not in pre:
            raise ValueError(f"tensor {name!r} is in the post-trained model only")
        if (a := shape_of(pre, name)) != (b := shape_of(post, name)):
            raise ValueError(
                f"tensor {name!r}: shape {a} in the pre-trained model, {b} in the post-trained"
            )
    for name in pre:
        if name not in post:
            raise ValueError(f"tensor {name!r} is in the pre-trained model only")


def shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    """Return a tensor's shape, from the file header where the weights are a `Checkpoint`."""
    return weights.shape(name) if isinstance(weights, Checkpoint) else tuple(weights[name].shape)


def delta(pre: Weights, post: Weights) -> LazyWeights:
    """Return W_post - W_pre of every floating-point tensor, in float32, lazily.

    >>> pre, post = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])}
    >>> delta(pre, post)["w"]
    tensor([0.5000])
    """
    names = [n for n in post if post[n].is_floating_point()]
    return LazyWeights(names, lambda n: post[n].float() - pre[n].float())


@contextmanager
def loaded(module: nn.Module, weights: Weights, restore: Weights) -> Iterator[nn.Module]:
    """Copy `weights` into the module's parameters and buffers; copy `restore` back on leaving.

    Only the tensors that `weights` names are written, and tied tensors once. The old values come
    from `restore` (a pair's `post`), never from arithmetic, so that nothing drifts and no second
    copy of the model is held.

    Args:
        module: the live module, holding `restore`.
        weights: the tensors to evaluate, cast to the module's dtype as they are copied.
        restore: the tensors to put back; must name all that `weights` names.
    """
    written: dict[int, tuple[str, Tensor]] = {}
    state = module.state_dict(keep_vars=True)
    try:
        with torch.no_grad():
            for name in weights:
                target = state[name]
                if target.data_ptr() not in written:
                    written[target.data_ptr()] = (name, target)
                    target.copy_(weights[name])
        yield module
    finally:
        with torch.no_grad():
            for name, target in written.values():
                target.copy_(restore[name])


def fingerprint(path: Path) -> str:
    """Return a content hash of a checkpoint: whole files up to 64 MiB, else size and samples.

    A large shard contributes its size, its first MiB (the header) and 64 evenly spaced blocks of
    64 KiB, so that fingerprinting 140 GB takes a moment and a retrained model still differs.

    Args:
        path: a file or a directory as for `Checkpoint`.

    Returns:
        16 hexadecimal digits, the same wherever the checkpoint lies.
    """
    digest = hashlib.sha256()
    for file in sorted(set(_shards(path).values())):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as handle:
            if size <= 64 << 20:
                digest.update(handle.read())
                continue
            digest.update(handle.read(1 << 20))
            for block in range(64):
                handle.seek(block * (size - (64 << 10)) // 63)
                digest.update(handle.read(64 << 10))
    return digest.hexdigest()[:16]
