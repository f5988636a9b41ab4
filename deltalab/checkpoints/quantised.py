"""Checkpoints whose tensors are codes and scales instead of weights: told before any is edited.

An edit of the scales alone, while integers or 8-bit floats stay, decodes to neither model. What a
checkpoint holds is judged by what its configuration declares and by names and dtypes in the
headers, of which either is enough: both get lost when files are copied.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltalab.weights import configs
from deltalab.weights.headers import plain
from deltalab.weights.mapping import Checkpoint

DECLARED = ("quantization_config", "compression_config")
"""Fields of `config.json`, at its top or in the section of a model's part."""
BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which GPTQ, AWQ and ModelOpt say the same."""
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4")
_CODES = re.compile(
    r"(^|[._:])(weight|\w+_proj|qweight|qzeros|\w*weight_packed|W_q|codes|\w*_blocks|\w*q?data)$"
)
_TABLE = re.compile(r"ids$|index$|mask$|(^|[._])(masked_)?bias$")
"""Integers of ordinary models: positions and masks."""
_COMPANION = re.compile(r"scale|absmax|quant_|zero_point|zeros$|SCB$|codebook|lut$")


def sign(checkpoint: Checkpoint) -> str | None:
    """Return what shows that a checkpoint is quantised, for a message, or None.

    Args:
        checkpoint: an open checkpoint; only its headers and the files beside it are looked at.

    >>> from safetensors.torch import save_file
    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     codes = {"up.qweight": torch.zeros(4, 4).int(), "up.scales": torch.ones(1, 4)}
    ...     save_file(codes, f"{directory}/model.safetensors")
    ...     sign(Checkpoint(directory))
    "tensor 'up.qweight' of dtype I32"
    """
    path = checkpoint.path
    return declared(path if path.is_dir() else path.parent) or coded(checkpoint, checkpoint)


def declared(directory: Path) -> str | None:
    """Return what the configuration files in a directory say of quantised weights, or None."""
    return next((f"{where}{_method(found)}" for where, found in _given(directory)), None)


def given(directory: Path) -> list[Mapping[str, Any]]:
    """Return all settings of quantisation that the configuration files in a directory have."""
    return [found for _, found in _given(directory) if isinstance(found, Mapping)]


def _given(directory: Path) -> Iterator[tuple[str, Any]]:
    for content in _sections(configs.content(directory / "config.json")):
        for field in DECLARED:
            if found := content.get(field):
                yield f"{field} in config.json", found
    for file in BESIDE:
        if found := configs.content(directory / file):
            yield file, found


def coded(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """Return the first of some tensors that holds codes, by its name and dtype, or None."""
    stems = {name.rpartition(".")[0] for name in checkpoint if _COMPANION.search(name)} - {""}
    for name in names:
        dtype, dimensions = checkpoint.dtype(name), len(checkpoint.shape(name))
        integers = dtype in INTEGERS and dimensions > 1 and not _TABLE.search(name)
        scaled = {name, name.rpartition(".")[0]} & stems
        if (integers and (scaled or _CODES.search(name))) or (dtype in EIGHT_BITS and dimensions):
            return f"tensor {plain(name[:100])!r} of dtype {dtype}"
    return None


def _sections(content: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and those of the model's parts, such as `text_config`."""
    yield content
    for key, value in content.items():
        if isinstance(value, Mapping) and key.endswith("config"):
            yield value


def _method(found: Any) -> str:
    """Return the name of the method in brackets, where it is said."""
    names = ("quant_method", "quant_algo", "format", "quantization")
    values = [found.get(name) for name in names] if isinstance(found, Mapping) else []
    values = [v["quant_algo"] if isinstance(v, dict) and "quant_algo" in v else v for v in values]
    name = next((v for v in values if isinstance(v, str) and v), None)
    return f" ({plain(name[:40])})" if name else ""
