"""CLIP image towers under timm's tensor names, whichever library saved them.

Two layouts are in use: that of OpenAI and open_clip (`visual.*`), and that of Hugging Face
(`vision_model.*`), which keeps queries, keys and values apart. Here every tensor of timm's module
is found in either, and read when it is asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from deltalab.weights.headers import plain
from deltalab.weights.mapping import Checkpoint, LazyWeights, Meta

Rules = tuple[tuple[str, tuple[str, ...]], ...]
PROJECTION = "visual_projection"
"""The name of the projection into the space that images and texts share, (dim, width)."""


@dataclass(frozen=True)
class Layout:
    """How one library names an image tower.

    Attributes:
        marker: the name of the class embedding, by which the layout is recognised; what stands
            before it in a checkpoint stands before all names of the tower.
        tower: the prefix of the tower's names, a part of the marker.
        rules: for every tensor of timm's module the saved names, joined along the first axis.
        projection: the name of the projection.
        turned: whether it was saved as (width, dim).
        others: what else a whole CLIP model holds.
    """

    marker: str
    tower: str
    rules: Rules
    projection: str
    turned: bool
    others: str

    def saved(self, name: str) -> tuple[str, ...]:
        """Return the names, within the tower, under which timm's tensor was saved.

        >>> OPEN_CLIP.saved("blocks.3.attn.qkv.bias"), HUGGING_FACE.saved("norm_pre.bias")
        (('transformer.resblocks.3.attn.in_proj_bias',), ('pre_layrnorm.bias',))
        """
        for pattern, names in self.rules:
            if found := re.fullmatch(pattern, name):
                return tuple(found.expand(each) for each in names)
        raise ValueError(f"model.name: tensor {name!r} of this architecture is none of CLIP's")


_BLOCK = r"blocks\.(\d+)\."
_HF, _OPEN = r"encoder.layers.\1.", r"transformer.resblocks.\1."
HUGGING_FACE = Layout(
    marker="embeddings.class_embedding",
    tower="",
    rules=(
        ("cls_token", ("embeddings.class_embedding",)),
        ("pos_embed", ("embeddings.position_embedding.weight",)),
        (r"patch_embed\.proj\.weight", ("embeddings.patch_embedding.weight",)),
        (r"norm_pre\.(\w+)", (r"pre_layrnorm.\1",)),
        (r"norm\.(\w+)", (r"post_layernorm.\1",)),
        (_BLOCK + r"norm(\d)\.(\w+)", (_HF + r"layer_norm\2.\3",)),
        (
            _BLOCK + r"attn\.qkv\.(\w+)",
            tuple(_HF + rf"self_attn.{part}_proj.\2" for part in "qkv"),
        ),
        (_BLOCK + r"attn\.proj\.(\w+)", (_HF + r"self_attn.out_proj.\2",)),
        (_BLOCK + r"(mlp\.fc\d\.\w+)", (_HF + r"\2",)),
    ),
    projection="visual_projection.weight",
    turned=False,
    others=r"text_model\..*|text_projection\.weight|logit_scale|(.*\.)?embeddings\.position_ids",
)
OPEN_CLIP = Layout(
    marker="visual.class_embedding",
    tower="visual.",
    rules=(
        ("cls_token", ("class_embedding",)),
        ("pos_embed", ("positional_embedding",)),
        (r"patch_embed\.proj\.weight", ("conv1.weight",)),
        (r"norm_pre\.(\w+)", (r"ln_pre.\1",)),
        (r"norm\.(\w+)", (r"ln_post.\1",)),
        (_BLOCK + r"norm(\d)\.(\w+)", (_OPEN + r"ln_\2.\3",)),
        (_BLOCK + r"attn\.qkv\.(\w+)", (_OPEN + r"attn.in_proj_\2",)),
        (_BLOCK + r"attn\.proj\.(\w+)", (_OPEN + r"attn.out_proj.\2",)),
        (_BLOCK + r"mlp\.fc1\.(\w+)", (_OPEN + r"mlp.c_fc.\2",)),
        (_BLOCK + r"mlp\.fc2\.(\w+)", (_OPEN + r"mlp.c_proj.\2",)),
    ),
    projection="visual.proj",
    turned=True,
    others=r"transformer\..*|token_embedding\.weight|positional_embedding|ln_final\.\w+"
    r"|text_projection|logit_(scale|bias)|attn_mask|input_resolution|context_length|vocab_size",
)


@dataclass(frozen=True, eq=False)
class Found:
    """A checkpoint under timm's names.

    Attributes:
        tower: the image tower's tensors, as timm names and shapes them.
        projection: (dim, width), float32; None where the checkpoint has none, as image towers
            that were saved without it.
        layout: how the tensors had been named.
    """

    tower: LazyWeights
    projection: Tensor | None
    layout: Layout


def found(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], setting: str) -> Found:
    """Find every tensor of timm's image tower in a checkpoint, and nothing that is left over.

    Args:
        checkpoint: an image tower or a whole CLIP model.
        shapes: the tower's tensors, as timm names and shapes them.
        setting: the setting that names the checkpoint, for messages.

    Raises:
        ValueError: no CLIP model, or a tensor that is missing, left over, or of another shape.
    """
    layout, before = _recognised(checkpoint, setting)
    prefix = before + layout.tower
    sources = {name: tuple(prefix + each for each in layout.saved(name)) for name in shapes}
    projection = _outside(layout, before) + layout.projection
    _check_names(checkpoint, sources, layout, _outside(layout, before), projection, setting)
    for name, shape in shapes.items():
        _check_shape(checkpoint, sources[name], shape, setting)

    def load(name: str) -> Tensor:
        parts = [checkpoint[each] for each in sources[name]]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shapes[name])

    matrix = checkpoint[projection].float() if projection in checkpoint else None
    if matrix is not None and layout.turned:
        matrix = matrix.T.contiguous()
    width = next(iter(shapes["norm.weight"]))
    if matrix is not None and (matrix.ndim != 2 or matrix.shape[1] != width):
        raise ValueError(
            f"{setting}: {projection!r} has shape {checkpoint.shape(projection)}, the tower's width"
            f" is {width}"
        )

    def told(name: str) -> Meta:
        dtypes = (checkpoint.meta(each).dtype for each in sources[name])
        return Meta(shapes[name], reduce(torch.promote_types, dtypes))

    return Found(LazyWeights(shapes, load, told), matrix, layout)


def _recognised(checkpoint: Checkpoint, setting: str) -> tuple[Layout, str]:
    """Return a checkpoint's layout, and what stands before the layout's own names."""
    for layout in (OPEN_CLIP, HUGGING_FACE):
        for name in checkpoint:
            if re.fullmatch(rf"([\w.]+\.)?{re.escape(layout.marker)}", name):
                return layout, name.removesuffix(layout.marker)
    raise ValueError(
        f"{setting}: no CLIP image tower; it must have a tensor {OPEN_CLIP.marker!r} (OpenAI,"
        f" open_clip) or 'vision_model.{HUGGING_FACE.marker}' (Hugging Face)"
    )


def _outside(layout: Layout, before: str) -> str:
    """Return the prefix of what stands beside the tower in a whole model."""
    return before if layout is OPEN_CLIP else before.removesuffix("vision_model.")


def _check_names(
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[str, ...]],
    layout: Layout,
    outside: str,
    projection: str,
    setting: str,
) -> None:
    """Raise `ValueError` naming the first tensor that is missing or of no use."""
    used = {each for names in sources.values() for each in names}
    for name, names in sources.items():
        for each in names:
            if each not in checkpoint:
                raise ValueError(
                    f"{setting}: tensor {each!r} is missing, the architecture's {name!r}"
                    " (model.name, model.args)"
                )
    for name in checkpoint:
        if name in used or name == projection:
            continue
        if not re.fullmatch(layout.others, name.removeprefix(outside)):
            raise ValueError(
                f"{setting}: tensor {plain(name[:100])!r} is none of the architecture"
                " (model.name, model.args)"
            )


def _check_shape(
    checkpoint: Checkpoint, names: tuple[str, ...], wanted: tuple[int, ...], setting: str
) -> None:
    shapes = [checkpoint.shape(name) for name in names]
    first, *rest = shapes[0] or (1,)
    joined = (sum(shape[0] for shape in shapes), *rest) if len(shapes) > 1 else (first, *rest)
    if [n for n in joined if n != 1] != [n for n in wanted if n != 1]:
        raise ValueError(
            f"{setting}: tensor {names[0]!r} has shape {shapes[0]}, the architecture"
            f" (model.name, model.args) needs {wanted}"
        )
