"""The one interchange type, `Weights`: a mapping from tensor names to tensors.

A state dict, a lazily read checkpoint, a delta, gradients and shifts are all `Weights`. Laziness
lives in the mapping and never in the algorithms, so that a one-million-parameter pair in memory and
a sharded 70B checkpoint on disk run the same code, one tensor at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deltalab.linear.delta import difference
from deltalab.weights import headers, pickles
from deltalab.weights.contents import main_file

Weights = Mapping[str, Tensor]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
}
"""The dtypes by their names in safetensors headers."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

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


@dataclass(frozen=True)
class Meta:
    """What is known of a tensor without reading it.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def floating(self) -> bool:
        """Whether the tensor is of a real floating-point dtype."""
        return self.dtype.is_floating_point


def meta(weights: Weights, name: str) -> Meta:
    """Return a tensor's shape and dtype; nothing is read where the weights can tell.

    Weights that read or compute their tensors have a method `meta(name)` of their own; of a plain
    mapping the tensor itself is asked.

    >>> meta({"n": torch.ones(2, 3).int()}, "n")
    Meta(shape=(2, 3), dtype=torch.int32)
    """
    if (own := getattr(weights, "meta", None)) is not None:
        told: Meta = own(name)
        return told
    tensor = weights[name]
    return Meta(tuple(tensor.shape), tensor.dtype)


class LazyWeights(Mapping[str, Tensor]):
    """Weights whose tensors are computed when they are asked for, and not kept.

    Args:
        names: the tensor names, in order.
        load: computes the tensor of one name.
        meta: tells its shape and dtype, without computing it.

    >>> pair = Meta((1,), torch.float32)
    >>> double = LazyWeights(["a"], lambda name: torch.tensor([2.0]), lambda name: pair)
    >>> double["a"], list(double), double.meta("a").shape
    (tensor([2.]), ['a'], (1,))
    """

    def __init__(
        self, names: Iterable[str], load: Callable[[str], Tensor], meta: Callable[[str], Meta]
    ) -> None:
        self._names = dict.fromkeys(names)
        self._load = load
        self._meta = meta

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def meta(self, name: str) -> Meta:
        """Return a tensor's shape and dtype, without computing it."""
        if name not in self._names:
            raise KeyError(name)
        return self._meta(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited test would compute the tensor

    def loading(self, load: Callable[[str], Tensor]) -> "LazyWeights":
        """Return weights of the same names, computed otherwise."""
        return LazyWeights(self, load, self._meta)


def cast(weights: Weights, dtype: torch.dtype) -> LazyWeights:
    """Return weights whose floating-point tensors have the dtype in which they are evaluated.

    >>> half = cast({"w": torch.ones(1), "n": torch.tensor(3)}, torch.float16)
    >>> half["w"].dtype, half.meta("w").dtype, half["n"]
    (torch.float16, torch.float16, tensor(3))
    """

    def told(name: str) -> Meta:
        own = meta(weights, name)
        return replace(own, dtype=dtype) if own.floating else own

    return LazyWeights(weights, lambda name: weights[name].to(told(name).dtype), told)


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

    metas: Mapping[str, Meta]
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
        found = {file: shard.metas for file, shard in self._shards.items()}
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

    def meta(self, name: str) -> Meta:
        """Return a tensor's shape and dtype from the header, without reading the tensor."""
        return self._shards[self.shards[name]].metas[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header, without reading the tensor."""
        return self.meta(name).shape

    def dtype(self, name: str) -> str:
        """Return the name that the file has for a tensor's dtype, such as `BF16`."""
        dtype = self.meta(name).dtype
        return _NAMES.get(dtype, str(dtype))


def _shard(file: Path) -> _Shard:
    if file.suffix in pickles.ENDINGS:
        held = pickles.read(file)
        return _Shard({name: meta(held, name) for name in held}, held.__getitem__)
    entries = headers.read(file)
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        reason = headers.plain(str(error))[:200]
        raise ValueError(f"{file}: not a valid safetensors file ({reason})") from None
    metas = {name: Meta(entry.shape, DTYPES[entry.dtype]) for name, entry in entries.items()}
    return _Shard(metas, handle.get_tensor)


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
        a, b = meta(pre, name), meta(post, name)
        if a.shape != b.shape:
            raise ValueError(
                f"tensor {name!r}: shape {a.shape} in the pre-trained model, {b.shape} in the"
                " post-trained"
            )
        if a.floating != b.floating:
            one, other = ("", " not") if a.floating else (" not", "")
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


def delta(pre: Weights, post: Weights) -> LazyWeights:
    """Return the `difference` of every floating-point tensor, lazily.

    >>> pre, post = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])}
    >>> delta(pre, post)["w"]
    tensor([0.5000])
    """
    names = [n for n in post if meta(post, n).floating]
    shape = lambda n: Meta(meta(post, n).shape, torch.float32)  # noqa: E731
    return LazyWeights(names, lambda n: difference(pre[n], post[n]), shape)


LAYOUT = "_layout_of_files"
"""The attribute of a live module that says how files make its tensors (`weights.layouts`)."""


def live(module: nn.Module, weights: Weights, rest: Weights | None = None) -> Weights:
    """Return weights under a live module's names, whatever their files call them.

    Args:
        module: the live module.
        weights: under the names of its files, or its own.
        rest: as for `layouts.Layout.live`.
    """
    layout = module.__dict__.get(LAYOUT)
    found: Weights = weights if layout is None else layout.live(weights, rest)
    return found


@contextmanager
def loaded(module: nn.Module, weights: Weights, restore: Weights) -> Iterator[nn.Module]:
    """Copy `weights` into the module's parameters and buffers; copy `restore` back on leaving.

    Only the tensors that `weights` names are written, and tied tensors once. The old values come
    from `restore` (a pair's `post`), never from arithmetic, so that nothing drifts and no second
    copy of the model is held.

    Args:
        module: the live module, holding `restore`.
        weights: the tensors to evaluate, cast to the module's dtype as they are copied; under the
            names of the pair's files, or the module's.
        restore: the tensors to put back; must name all that `weights` names.
    """
    written: dict[int, tuple[str, Tensor]] = {}
    state = module.state_dict(keep_vars=True)
    weights, restore = live(module, weights, restore), live(module, restore)
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
