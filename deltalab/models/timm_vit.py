"""Pairs of timm image models, from safetensors files, shard directories or the hub."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltalab.weights.mapping import (
    Checkpoint,
    LazyWeights,
    ModelPair,
    Weights,
    check_same_layout,
    fingerprint,
    mixed_dtypes,
)

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16", "float64")


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
    """

    name: str
    pre: str
    post: str
    args: tuple[tuple[str, Any], ...] | None = None
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", frozen_args(self.args))
        check_dtype(self.dtype)

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Content fingerprints of both checkpoints."""
        pre, post = self.checkpoints
        return fingerprint(pre), fingerprint(post)

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The local paths of both checkpoints, fetched from the hub if need be."""
        return locate(self.pre, "model.pre"), locate(self.post, "model.post")

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> torch.nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        with torch.device("meta"):
            module = _architecture(self, Checkpoint(locate(self.post, "model.post")))
        return module.to(dtype=getattr(torch, self.dtype))


@lru_cache(maxsize=1)
def _open(spec: TimmPair) -> ModelPair:
    pre = Checkpoint(locate(spec.pre, "model.pre"))
    post = Checkpoint(locate(spec.post, "model.post"))
    check_same_layout(pre, post)
    if line := mixed_dtypes(pre, post):
        log.warning(line)
    module = _architecture(spec, post)
    transform = transform_of(module, dict(spec.args or ()))
    return live_pair(module, pre, post, spec.device, spec.dtype, transform)


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


def check_dtype(dtype: str) -> None:
    """Raise `ValueError` for a dtype in which no image model is evaluated."""
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype}: must be one of {', '.join(DTYPES)}")


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
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"model.name={name}: not a timm architecture; near: {near}")
    try:
        module: torch.nn.Module = timm.create_model(name, pretrained=False, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"model.args={dict(args)}: {name} refuses them ({error})") from None
    return module


def live_pair(
    module: torch.nn.Module,
    pre: Weights,
    post: Weights,
    device: str,
    dtype: str,
    transform: Any,
) -> ModelPair:
    """Fill a module with the post-trained weights and return the pair around it.

    Raises:
        ValueError: the module and the checkpoints differ in a tensor's name or shape.
    """
    expected = module.state_dict()
    try:
        check_same_layout(expected, post)
    except ValueError as error:
        text = str(error).replace("pre-trained model", "architecture")
        raise ValueError(text.replace("post-trained model", "checkpoint")) from None
    kind = getattr(torch, dtype)
    pre, post = cast(pre, kind), cast(post, kind)
    module = module.to(device=device_of(device), dtype=kind).eval()
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.copy_(post[name])
    return ModelPair(pre=pre, post=post, module=module, transform=transform)


def device_of(device: str) -> str:
    """Return the device that a setting means: `auto` is a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, number = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, number = "", 0
    if kind not in ("cpu", "cuda", "meta"):
        raise ValueError(f"model.device={device}: must be auto, cpu, cuda, cuda:1, ...")
    if kind == "cuda" and number >= torch.cuda.device_count():
        raise ValueError(f"model.device={device}: {torch.cuda.device_count()} GPUs are here")
    return device


def cast(weights: Weights, dtype: torch.dtype) -> LazyWeights:
    """Return weights whose floating-point tensors have the dtype in which they are evaluated."""

    def load(name: str) -> Tensor:
        tensor = weights[name]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return LazyWeights(weights, load)


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
        return Path(download(source))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{setting}={source}: no such path here, and not to be had from the hub ({reason})"
        ) from None
