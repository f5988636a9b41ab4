"""A causal language model of transformers: its configuration, its module, and the weights in it."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltalab.data.text import Encoder
from deltalab.models import hub
from deltalab.weights import checkpoints, configs
from deltalab.weights.aligned import fill, matched, paired
from deltalab.weights.headers import plain
from deltalab.weights.mapping import Checkpoint, ModelPair, mixed_dtypes

log = logging.getLogger(__name__)


def filled(
    module: nn.Module, pre: Checkpoint, post: Checkpoint, mismatch: str, encoder: Encoder
) -> ModelPair:
    """Fill a module with the post-trained weights and return the pair around it.

    The checkpoints are read tensor by tensor; the module holds the only copy in memory.

    Raises:
        ValueError: the checkpoints fit neither the module nor each other.
    """
    if line := mixed_dtypes(pre, post):
        log.warning(line)
    new = matched(module, post, "model.post")
    old = matched(module, pre, "model.pre")
    dtype = next(module.parameters()).dtype
    weights = paired(old, new, mismatch, dtype)
    fill(module, new)
    return ModelPair(pre=weights[0], post=weights[1], module=module, transform=encoder)


def configuration(
    path: Path, setting: str, code: bool = False, dequantize: bool | None = None
) -> Any:
    """Return the configuration in a directory; no code that comes with it is run, unless asked.

    Args:
        path: the directory.
        setting: the setting that names it, for messages.
        code: whether Python code that the directory holds or names may be run.
        dequantize: as for `checkpoints.opened`.

    Raises:
        FileNotFoundError: no `config.json`.
        ValueError: one that transformers does not read, or of quantised weights.
    """
    from transformers import AutoConfig

    content = hub.described_by(path)
    if not content:
        adapter = (path / "adapter_config.json").is_file()
        hint = "an adapter; merge it into its model and save that" if adapter else "no config.json"
        raise FileNotFoundError(f"{setting}={path}: {hint}")
    checkpoints.check_declared(path, setting, dequantize)
    if code:
        log.warning(
            "model.trust_remote_code=true: the classes of configuration, model and tokenizer that"
            " auto_map names in %s may run any code",
            path,
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=code)
    except Exception as error:  # a configuration is read by code that raises what it likes
        if "auto_map" in content and not code:
            raise ValueError(
                f"{setting}={path}: a model with code of its own, which is not run unless"
                " model.trust_remote_code=true"
            ) from None
        raise ValueError(f"{setting}={path}: config.json: {_line(error)}") from None
    config._attn_implementation = None  # the file could name code on the hub
    if hasattr(config, "quantization_config"):  # of weights that are decoded
        del config.quantization_config
    return config


def architecture(config: Any, dtype: str, device: str, attn: str | None, code: bool) -> Any:
    """Return the module of a configuration in evaluation mode, its weights not yet filled.

    Nothing is initialised but the buffers that no checkpoint holds, such as rotary tables.

    Raises:
        ValueError: no causal language model, or transformers refuses the settings.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    options = {"dtype": getattr(torch, dtype), "attn_implementation": attn}
    try:
        with no_init_weights(), torch.device(device):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=code, **options)
    except (ValueError, ImportError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        if attn not in (None, "eager") and "attention" in str(error).lower():
            raise ValueError(f"model.attn={attn}: {_line(error)}") from None
        raise ValueError(
            f"model.post: transformers makes no causal language model of its config.json"
            f" ({_line(error)})"
        ) from None
    module.tie_weights()
    return module.eval()


def generation(module: Any, path: Path) -> None:
    """Give a module the generation settings beside its weights: where an answer ends, above all."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        try:
            module.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:  # as for a configuration
            raise ValueError(f"{path}/generation_config.json: {_line(error)}") from None


def differences(pre: Path, post: Path, config: Any, code: bool) -> str | None:
    """Return the line to warn with where two configurations compute differently.

    Args:
        pre: the pre-trained model.
        post: the post-trained model.
        config: its configuration, with all defaults.
        code: whether the models have code of their own: then their files are compared as they are.
    """
    contents = hub.described_by(pre), hub.described_by(post)
    if not contents[0] or code:
        return configs.differences(*contents)
    try:
        other = configuration(pre, "model.pre", dequantize=True)
    except ValueError:  # of a model that is not opened by it
        return configs.differences(*contents)
    return configs.differences(other.to_dict(), config.to_dict(), complete=True)


def _line(error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return plain(" ".join(line.strip() for line in lines if line.strip())[:200])
