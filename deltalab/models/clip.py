"""Pairs of CLIP image classifiers: one image tower, fine-tuned or not, before a fixed head."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltalab.checkpoints import check_local, opened
from deltalab.models import clip_heads, clip_names, hub
from deltalab.models.live import check_dtype, device_of, live_pair
from deltalab.models.timm_vit import created, frozen_args, transform_of
from deltalab.store.latest import latest
from deltalab.weights.mapping import LazyWeights, Meta, ModelPair, meta

log = logging.getLogger(__name__)
_ACTIVATIONS = {"quick_gelu": "QuickGELU", "gelu": "GELU"}


@dataclass(frozen=True)
class ClipPair:
    """CLIP's image tower, pre-trained and fine-tuned on a task, as a classifier of its classes.

    Checkpoints are those of OpenAI or open_clip, or in the Hugging Face layout (`clip_names`).

    Args:
        task: whose classes are told apart, one of `clip_heads.tasks()`; any name with `head`.
        pre: a directory, a file, or a hub id.
        post: likewise, the image tower fine-tuned from `pre`.
        name: the architecture in timm; `quickgelu` in it is OpenAI's activation.
        args: further arguments of `timm.create_model`, for instance `{depth: 2}`.
        head: a file with the head's `weight`, (classes, dim); None builds it from class names.
        text: where the text tower and its tokenizer are, if not at `pre`.
        scale: what the cosines are multiplied by; CLIP's own temperature is 1/100.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        dtype: the dtype in which the tower is evaluated; cosines are taken in float32 at least.

    Raises:
        ValueError: a setting is none of those.
    """

    task: str
    pre: str
    post: str
    name: str = "vit_base_patch32_clip_quickgelu_224"
    args: tuple[tuple[str, Any], ...] | None = None
    head: str | None = None
    text: str | None = None
    scale: float = 100.0
    device: str = "auto"
    dtype: str = "float32"

    contents: ClassVar = {"pre": "model", "post": "model", "text": "model", "head": "file"}
    reads: ClassVar = ("checkpoint",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", frozen_args(self.args))
        check_dtype(self.dtype)
        if self.head is None and self.task not in (known := clip_heads.tasks()):
            raise ValueError(
                f"model.task={self.task}: must be one of {', '.join(known)}, or give model.head"
            )
        if not self.scale > 0:
            raise ValueError(f"model.scale={self.scale}: must be above 0")

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The local paths of both models, fetched from the hub if need be."""
        return hub.directory(self.pre, "model.pre"), hub.directory(self.post, "model.post")

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> nn.Module:
        """Return the classifier on the meta device; the projection counts as fixed."""
        import timm

        check_local(self.pre, "model.pre")
        check_local(self.post, "model.post")
        with torch.device("meta"):
            tower: Any = created(self.name, {**dict(self.args or ()), "num_classes": 0})
            dim = timm.models.get_pretrained_cfg_value(self.name, "num_classes") or 512
            projection = torch.empty(dim, tower.num_features)
            head = torch.empty(len(self.classes) or 1, dim)
            module = Classifier(tower, projection, False, head, self.scale)
        return module.to(dtype=getattr(torch, self.dtype))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, where the task is one that the package knows."""
        known = clip_heads.tasks().get(self.task)
        return tuple(known["classes"]) if known else ()


class Classifier(nn.Module):
    """logits = scale * normalize(P f(x)) @ head^T, f the image tower and P its projection.

    Args:
        tower: timm's module, giving (n, width).
        projection: (dim, width).
        tuned: whether the projection was fine-tuned and so is a weight like the tower's; else, as
            the head always, it is none, and no edit can touch it.
        head: (classes, dim).
        scale: what the cosines are multiplied by.
    """

    head: Tensor
    visual_projection: Tensor

    def __init__(
        self, tower: nn.Module, projection: Tensor, tuned: bool, head: Tensor, scale: float
    ) -> None:
        super().__init__()
        self.visual, self.scale = tower, scale
        if tuned:
            self.visual_projection = nn.Parameter(projection)
        else:
            self.register_buffer(clip_names.PROJECTION, projection, persistent=False)
        self.register_buffer("head", head, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Return the images' features in the space that they share with texts, (n, dim)."""
        return functional.linear(self.visual(images), self.visual_projection)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (n, classes), in float32 or better."""
        features = self.features(images)
        exact = torch.promote_types(features.dtype, torch.float32)
        directions = functional.normalize(features.to(exact), dim=-1)
        return self.scale * functional.linear(directions, self.head.to(exact))


@latest("model")
def _open(spec: ClipPair) -> ModelPair:
    device_of(spec.device)  # a mistake in it is told before anything is fetched
    places = dict(zip(("model.pre", "model.post"), spec.checkpoints, strict=True))
    args = dict(spec.args or ())
    tower = created(spec.name, {**args, "num_classes": 0})
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    sides = []
    for setting, place in places.items():
        sides.append(clip_names.found(opened(place, setting), shapes, setting))
        if sides[-1].layout is clip_names.HUGGING_FACE:
            _check_described(place, tower, setting)
    pre, post = sides
    if pre.projection is None:
        raise ValueError(f"model.pre={spec.pre}: no projection of image features in it")
    tuned = post.projection is not None
    projection = pre.projection if post.projection is None else post.projection
    head = _head(spec, places["model.pre"], projection.shape[0])
    module = Classifier(tower, projection, tuned, head, spec.scale)
    pair = live_pair(
        module,
        _named(pre, tuned),
        _named(post, tuned),
        spec.device,
        spec.dtype,
        transform_of(tower, args, crop_pct=1.0),
    )
    module.head = head.to(next(module.parameters()).device)  # in float32, whatever the tower's
    return ModelPair(pair.pre, pair.post, module, pair.transform, spec.classes)


def _named(side: clip_names.Found, tuned: bool) -> LazyWeights:
    """Return one side's weights under the classifier's names."""
    names = [f"visual.{name}" for name in side.tower]

    def load(name: str) -> Tensor:
        if name == clip_names.PROJECTION:
            assert side.projection is not None
            return side.projection
        return side.tower[name.removeprefix("visual.")]

    def told(name: str) -> Meta:
        if name == clip_names.PROJECTION:
            assert side.projection is not None
            return meta({name: side.projection}, name)
        return side.tower.meta(name.removeprefix("visual."))

    return LazyWeights(names + [clip_names.PROJECTION] * tuned, load, told)


def _head(spec: ClipPair, pre: Path, dim: int) -> Tensor:
    """Return the head from its file, or build it.

    Raises:
        ValueError: its dimension is not that of the image features.
    """
    if spec.head is not None:
        head = clip_heads.from_file(Path(spec.head).expanduser(), len(spec.classes) or None)
    else:
        setting = "model.text" if spec.text else "model.pre"
        place = hub.directory(spec.text, setting) if spec.text else pre
        log.info("%s: a head of %d classes from %s", spec.task, len(spec.classes), place)
        head = clip_heads.zero_shot(place, setting, spec.task)
    if head.shape[1] != dim:
        where = f"model.head={spec.head}" if spec.head else "the text tower"
        raise ValueError(f"{where}: {head.shape[1]} dimensions, image features have {dim}")
    return head


def _check_described(place: Path, tower: Any, setting: str) -> None:
    """Check what a configuration says of the tower and shapes do not: heads and activation.

    Raises:
        ValueError: the architecture computes something else.
    """
    content: Mapping[str, Any] = hub.described_by(place if place.is_dir() else place.parent)
    vision = content.get("vision_config", content)
    if not str(content.get("model_type", "")).startswith("clip") or not isinstance(vision, dict):
        return
    block = tower.blocks[0]
    heads = vision.get("num_attention_heads", 12)  # what transformers takes where nothing is said
    if heads != block.attn.num_heads:
        raise ValueError(
            f"{setting}: config.json says num_attention_heads={heads}, the architecture"
            f" (model.name, model.args) has {block.attn.num_heads}"
        )
    activation = vision.get("hidden_act", "quick_gelu")
    if _ACTIVATIONS.get(activation) != type(block.mlp.act).__name__:
        raise ValueError(
            f"{setting}: config.json says hidden_act={activation}, the architecture (model.name,"
            f" model.args) has {type(block.mlp.act).__name__}"
        )
