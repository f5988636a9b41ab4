"""The one interchange type, `Weights`: a mapping from tensor names to tensors.

A state dict, a lazily read checkpoint, a delta, gradients and shifts are all `Weights`. Laziness
lives in the mapping and never in the algorithms, so that a one-million-parameter pair in memory and
a sharded 70B checkpoint on disk run the same code, one tensor at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deltalab.weights import headers, pickles
from deltalab.weights.contents import main_file

Weights = Mapping[str, Tensor]

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
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


PIECE = 1 << 20
"""Entries of a piece."""


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


def pieces(weights: Weights, name: str) -> Iterator[Callable[[], Tensor]]:
    """Yield functions that give the flat pieces of one tensor in order, to call in any thread.

    Weights can have a method `pieces(name)` of their own, to spare the whole tensor.

    >>> [piece().tolist() for piece in pieces({"w": torch.tensor([[1.0], [2.0]])}, "w")]
    [[1.0, 2.0]]
    """
    if hasattr(weights, "pieces"):
        yield from weights.pieces(name)
        return
    flat = weights[name].flatten()
    for start in range(0, flat.numel(), PIECE):
        yield partial(flat.narrow, 0, start, min(PIECE, flat.numel() - start))


@dataclass(frozen=True, eq=False)
class _Shard:
    """One file: what its header says of each tensor, and how to get the tensor itself."""

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], Tensor]


class Checkpoint(Mapping[str, Tensor]):
    """A safetensors file or a directory of shards, read tensor by tensor.

    Only headers are read on opening. Tensors come memory-mapped from the file, in the dtype stored.
    PyTorch's own files are read too, for their tensors alone (`deltalab.weights.pickles`). All that
    the files claim about themselves is checked first (`deltalab.weights.headers`); nothing in them
    is run.

    Args:
        path: a `.safetensors`, `.bin`, `.pt` or `.pth` file, an index (`*.index.json`), or a
            directory holding one checkpoint.

    Raises:
        FileNotFoundError: nothing readable at `path`, or a shard named by the index is missing.
        ValueError: a file is damaged, index and shards disagree, a file lies outside the directory,
            or a pickle names more than tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        main = main_file(self.path)
        index = headers.index(main) if main.name.endswith(".index.json") else None
        files = dict.fromkeys(index.values() if index else [main])
        self._shards = {file: _shard(file) for file in files}
        found = {file: shard.shapes for file, shard in self._shards.items()}
        if index is not None:
            _check_index(main, index, found)
        self.shards = index or dict.fromkeys(found[main], main)

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self.shards[name]].load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, name: object) -> bool:
        return name in self.shards

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header, without reading the tensor."""
        return self._shards[self.shards[name]].shapes[name]

    def dtype(self, name: str) -> str:
        """Return the name that the file has for a tensor's dtype, such as `BF16`."""
        return self._shards[self.shards[name]].dtypes[name]


def _shard(file: Path) -> _Shard:
    if file.suffix in pickles.ENDINGS:
        held = pickles.read(file)
        dtypes = {n: _DTYPE_NAMES.get(t.dtype, str(t.dtype)) for n, t in held.items()}
        return _Shard(dtypes, {n: tuple(t.shape) for n, t in held.items()}, held.__getitem__)
    entries = headers.read(file)
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        reason = headers.plain(str(error))[:200]
        raise ValueError(f"{file}: not a valid safetensors file ({reason})") from None
    dtypes = {n: e.dtype for n, e in entries.items()}
    return _Shard(dtypes, {n: e.shape for n, e in entries.items()}, handle.get_tensor)


def _check_index(
    main: Path, index: Mapping[str, Path], found: Mapping[Path, Mapping[str, object]]
) -> None:
    """Raise `ValueError` naming the first tensor on which an index and its shards disagree."""
    for name, file in index.items():
        if name not in found[file]:
            raise ValueError(f"{file}: tensor {name!r} is in {main.name} but not in this shard")
    for file, names in found.items():
        for name in names:
            if index.get(name) != file:
                where = index[name].name if name in index else "no shard"
                raise ValueError(
                    f"{file}: tensor {name!r} is in this shard; {main.name} names {where} for it"
                )


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A pre-trained and a post-trained model that share every tensor name and shape.

    Attributes:
        pre: the pre-trained weights.
        post: the post-trained weights, same names and shapes.
        module: the one live module, holding `post`; edits are loaded into it and taken out again.
        transform: turns data into the module's input: of image models a function of a PIL image,
            of language models a `deltalab.data.text.Encoder`.
        labels: class names in the order of the module's outputs, where known.
    """

    pre: Weights
    post: Weights
    module: nn.Module
    transform: Any = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_same_layout(self.pre, self.post)


def check_same_layout(pre: Weights, post: Weights) -> None:
    """Raise `ValueError` naming the first tensor that one side lacks or that does not fit.

    Shapes must be equal, and both sides floating-point or neither.
    """
    for name in post:
        if name not in pre:
            raise ValueError(f"tensor {name!r} is in the post-trained model only")
        if (a := shape_of(pre, name)) != (b := shape_of(post, name)):
            raise ValueError(
                f"tensor {name!r}: shape {a} in the pre-trained model, {b} in the post-trained"
            )
        if floating(pre, name) != floating(post, name):
            one, other = ("", " not") if floating(pre, name) else (" not", "")
            raise ValueError(
                f"tensor {name!r}:{one} floating-point in the pre-trained model,{other} in the"
                " post-trained model"
            )
    for name in pre:
        if name not in post:
            raise ValueError(f"tensor {name!r} is in the pre-trained model only")


def mixed_dtypes(pre: Checkpoint, post: Checkpoint) -> str | None:
    """Return the line to warn with where two checkpoints store a tensor at unlike precision."""
    names = [n for n in post if n in pre and pre.dtype(n) != post.dtype(n)]
    if not names:
        return None
    return (
        f"tensor {names[0]!r} is {pre.dtype(names[0])} in the pre-trained model and"
        f" {post.dtype(names[0])} in the post-trained, as are {len(names)} of {len(post)} tensors:"
        " their delta holds the rounding between the two"
    )


def shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    """Return a tensor's shape, from the file header where the weights are a `Checkpoint`."""
    return weights.shape(name) if isinstance(weights, Checkpoint) else tuple(weights[name].shape)


def floating(weights: Weights, name: str) -> bool:
    """Return whether a tensor is of a real floating-point dtype, from the header if there is one.

    >>> floating({"w": torch.ones(1), "n": torch.ones(1).int()}, "n")
    False
    """
    if isinstance(weights, Checkpoint):
        return weights.dtype(name).startswith(("F", "BF"))
    return weights[name].is_floating_point()


def delta(pre: Weights, post: Weights) -> LazyWeights:
    """Return W_post - W_pre of every floating-point tensor, in float32, lazily.

    >>> pre, post = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])}
    >>> delta(pre, post)["w"]
    tensor([0.5000])
    """
    names = [n for n in post if floating(post, n)]
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
