"""A causal language model of transformers: its configuration, its module, and the weights in it."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltalab import checkpoints
from deltalab.data.text import Encoder
from deltalab.models import conversion, hub
from deltalab.weights import configs
from deltalab.weights.aligned import fill, matched, paired
from deltalab.weights.headers import plain
from deltalab.weights.layouts import set_layout
from deltalab.weights.mapping import Checkpoint, ModelPair, mixed_dtypes
from deltalab.weights.rebased import rebased

log = logging.getLogger(__name__)


def filled(
    module: nn.Module,
    pre: Checkpoint,
    post: Checkpoint,
    mismatch: str,
    encoder: Encoder,
    untied: bool = True,
    base: Checkpoint | None = None,
) -> ModelPair:
    """Fill a module with the post-trained weights and return the pair around it.

    The checkpoints are read tensor by tensor; the module holds the only copy in memory.

    Args:
        module: of the post-trained model's architecture.
        pre: the pre-trained checkpoint.
        post: the post-trained checkpoint.
        mismatch: as for `aligned.paired`.
        encoder: the pair's tokenizer.
        untied: whether a head that the pre-trained checkpoint lacks is its embedding.
        base: the checkpoint that the delta is put onto, if any.

    Raises:
        ValueError: the checkpoints fit neither the module nor each other.
    """
    if line := mixed_dtypes(pre, post):
        log.warning(line)
    new = matched(module, post, "model.post", conversion.found)
    old = matched(module, pre, "model.pre", conversion.found, untied)
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    buffers = dict(module.named_buffers())
    weights = paired(old, new, mismatch, dtypes, buffers)
    set_layout(module, new.layout(module))
    fill(module, new)
    pair = ModelPair(pre=weights[0], post=weights[1], module=module, transform=encoder)
    if base is None:
        return pair
    other = matched(module, base, "model.base", conversion.found, untied)
    try:
        onto, _ = paired(other, new, mismatch, dtypes, buffers)
    except ValueError as error:
        told = str(error).replace("the pre-trained model", "the base")
        raise ValueError(f"model.base: {told}") from None
    return rebased(pair, onto)


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

    kind = getattr(torch, dtype)
    options = {"dtype": kind, "attn_implementation": attn}
    try:
        with no_init_weights(), torch.device(device):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=code, **options)
        _kept_wide(module, kind)
        if device != "meta":
            _tables(module)
    except Exception as error:  # built by code that raises what it likes, assertions too
        if attn not in (None, "eager") and "attention" in str(error).lower():
            raise ValueError(f"model.attn={attn}: {_line(error)}") from None
        if isinstance(error, AssertionError) and "padding_idx" in str(error).lower():
            raise ValueError(
                f"model.post: pad_token_id={config.pad_token_id} in its config.json is beyond the"
                f" vocabulary of {config.vocab_size}; set it to null there: padding is masked"
            ) from None
        raise ValueError(
            f"model.post: transformers makes no causal language model of its config.json"
            f" ({_line(error)})"
        ) from None
    module.tie_weights()
    padding_learns(module)
    return module.eval()


def _kept_wide(module: Any, dtype: torch.dtype) -> None:
    """Give the tensors that an architecture keeps in float32 in 16 bits that dtype.

    Which they are, transformers says (`_keep_in_fp32_modules` and its strict sister).
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = module._get_dtype_plan(dtype) if hasattr(module, "_get_dtype_plan") else {}
    if plan:
        wanted, of, _ = build_glob_alternation(list(plan))
        for name, tensor in module.state_dict(keep_vars=True).items():
            if (match := wanted.search(name)) is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(plan[of[match.lastgroup]])


def _tables(module: Any) -> None:
    """Compute the tables that no checkpoint holds, as transformers does on loading.

    In float32 and rounded once, where building a module in 16 bits computes them in those; frozen
    all else, which is read from the checkpoint.
    """
    if hasattr(module, "initialize_weights"):
        for tensor in module.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        module.initialize_weights()


def padding_learns(module: Any) -> None:
    """Let the padding token's row of the input embedding have its gradient like any other.

    `nn.Embedding` leaves it out (`padding_idx`), also where the token stands in the text, as one
    that is the end of a sequence too. What is padding, the batches' masks say; no output changes.
    """
    for part in module.modules():
        if type(part) is nn.Embedding or part is module.get_input_embeddings():
            part.padding_idx = None


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
