"""The one live module of a pair: where it lies, in which dtype, and filled with which weights."""

from typing import Any

import torch

from deltalab.weights.mapping import ModelPair, Weights, cast, check_same_layout

DTYPES = ("float32", "bfloat16", "float16", "float64")


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


def device_of(device: str, here: bool = True) -> str:
    """Return the device that a setting means: `auto` is a GPU where there is one.

    Args:
        device: the setting.
        here: whether it must be in this machine, and not in another one that runs the points.

    Raises:
        ValueError: no device's name, or one that is not here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, number = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, number = "", 0
    if kind not in ("cpu", "cuda", "meta"):
        raise ValueError(f"model.device={device}: must be auto, cpu, cuda, cuda:1, ...")
    if here and kind == "cuda" and number >= torch.cuda.device_count():
        raise ValueError(f"model.device={device}: {torch.cuda.device_count()} GPUs are here")
    return device


def check_dtype(dtype: str) -> None:
    """Raise `ValueError` for a dtype in which no image model is evaluated."""
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype}: must be one of {', '.join(DTYPES)}")
