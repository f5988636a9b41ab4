"""Pairs of timm image models, from safetensors files, shard directories or the hub."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from deltalab.checkpoints import opened
from deltalab.models.live import check_dtype, live_pair
from deltalab.settings import near
from deltalab.store import reach
from deltalab.store.latest import latest
from deltalab.weights.mapping import (
    Checkpoint,
    ModelPair,
    cast,
    check_same_layout,
    mixed_dtypes,
)
from deltalab.weights.rebased import rebased

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TimmPair:
    """Any timm architecture with a pre- and a post-trained checkpoint.

    Args:
        name: a timm architecture, for instance `vit_base_patch16_224`.
        pre: a safetensors file, a directory of shards, or a hub id.
        post: likewise, fine-tuned from `pre`, with the same tensor names and shapes.
        args: further arguments of `timm.create_model`, for instance `{img_size: 32}`.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        dtype: the dtype in which the model is evaluated.
        base: as `pre`, another model that the delta is put onto; None: it stays where it is.
    """

    name: str
    pre: str
    post: str
    args: tuple[tuple[str, Any], ...] | None = None
    device: str = "auto"
    dtype: str = "float32"
    base: str | None = None
    contents: ClassVar = {"pre": "model", "post": "model", "base": "model"}
    reads: ClassVar = ("checkpoint",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", frozen_args(self.args))
        check_dtype(self.dtype)

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The local paths of both checkpoints, fetched from the hub if need be."""
        return locate(self.pre, "model.pre"), locate(self.post, "model.post")

    @property
    def other_base(self) -> Path | None:
        """The local path of the base that the delta is put onto, if there is one."""
        return None if self.base is None else locate(self.base, "model.base")

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> torch.nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        _, post = _sides(self)
        with torch.device("meta"):
            module = _architecture(self, post)
        return module.to(dtype=getattr(torch, self.dtype))


@latest("model")
def _open(spec: TimmPair) -> ModelPair:
    pre, post = _sides(spec)
    check_same_layout(pre, post)
    if line := mixed_dtypes(pre, post):
        log.warning(line)
    module = _architecture(spec, post)
    transform = transform_of(module, dict(spec.args or ()))
    pair = live_pair(module, pre, post, spec.device, spec.dtype, transform)
    if (place := spec.other_base) is None:
        return pair
    base = opened(place, "model.base")
    return rebased(pair, cast(base, getattr(torch, spec.dtype)))


def _sides(spec: TimmPair) -> tuple[Checkpoint, Checkpoint]:
    pre, post = spec.checkpoints
    return opened(pre, "model.pre"), opened(post, "model.post")


def transform_of(module: torch.nn.Module, args: Mapping[str, Any], **changes: Any) -> Any:
    """Return timm's own preparation of images for a module.

    Args:
        module: a module of timm.
        args: what it was created with.
        changes: what differs from timm's data configuration, for instance `crop_pct`.
    """
    import timm

    data = {**timm.data.resolve_model_data_config(module), **changes}
    if "img_size" in args:  # timm's data configuration keeps the architecture's default size
        channels = data["input_size"][0]
        size = args["img_size"]
        height, width = (size, size) if isinstance(size, int) else size
        data["input_size"] = (args.get("in_chans", channels), height, width)
    return timm.data.create_transform(**data)


def frozen_args(given: Any) -> tuple[tuple[str, Any], ...] | None:
    """Return `model.args` as sorted pairs: a spec is a key of the caches.

    Raises:
        ValueError: no mapping, or a name by which timm would fetch other weights.
    """
    if not isinstance(given, Mapping | tuple | None):
        raise ValueError(f"model.args={given}: must be a mapping, as {{img_size: 32}}")
    args = tuple(sorted(given.items())) if isinstance(given, Mapping) else given
    for key, _ in args or ():
        if key.startswith(("pretrained", "checkpoint", "cache")):
            raise ValueError(f"model.args.{key}: weights come from model.pre and model.post alone")
    return args


def _architecture(spec: TimmPair, post: Checkpoint) -> torch.nn.Module:
    """Create the module, with as many outputs as the checkpoint's classifier has."""
    import timm

    args = dict(spec.args or ())
    if timm.is_model(spec.name):
        classifier = timm.models.get_pretrained_cfg_value(spec.name, "classifier")
        if "num_classes" not in args and f"{classifier}.weight" in post:
            args["num_classes"] = post.shape(f"{classifier}.weight")[0]
    return created(spec.name, args)


def created(name: str, args: Mapping[str, Any]) -> torch.nn.Module:
    """Create a module of timm with weights at random.

    Raises:
        ValueError: an unknown architecture, or arguments that it refuses.
    """
    import timm

    if not timm.is_model(name):
        hint = near(name, timm.list_models()) or "; timm.list_models() names them"
        raise ValueError(f"model.name={name}: not a timm architecture{hint}")
    try:
        module: torch.nn.Module = timm.create_model(name, pretrained=False, **args)
    except Exception as error:  # whatever an architecture makes of an argument that it cannot use
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"model.args={dict(args)}: {name} refuses them ({reason})") from None
    return module


def locate(source: str, setting: str) -> Path:
    """Return a local path for a file, a directory, or a hub id (`org/name`, safetensors only).

    Raises:
        FileNotFoundError: neither a local path nor a repository that the hub knows.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix:
        raise FileNotFoundError(f"{setting}={source}: no such file or directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    download = partial(snapshot_download, allow_patterns=["*.safetensors", "*.json"])
    try:
        return Path(download(source, local_files_only=not reach.settle()))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{setting}={source}: no such path here, and not to be had from the hub"
            f" ({reach.reason(error)})"
        ) from None
