"""The embedded language models: small Llamas of two sizes, post-trained, with one tokenizer."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltalab.data.text import Encoder
from deltalab.models.timm_vit import live_pair
from deltalab.weights.mapping import Checkpoint, ModelPair, fingerprint

if TYPE_CHECKING:
    from transformers import LlamaConfig

DIRECTORY = Path(str(files("deltalab"))) / "zoo" / "llm"
PRE_OF = {"sft": "base", "far": "base", "dpo": "sft", "small_sft": "small_base"}
"""What every post-trained model was trained from."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
AROUND = ("config.json", *TOKENIZER)
"""What a directory of one of the larger models needs beside its weights."""


@dataclass(frozen=True)
class EmbeddedLlm:
    """A pair of the small Llamas that ship with the package, with 2.0 or 1.0 million parameters.

    Args:
        post: `sft` (base -> fine-tuned on word problems), `far` (the same with a large delta),
            `dpo` (sft -> preferences) or `small_sft` (base -> fine-tuned, narrower, another seed).
        device: as for `TimmPair`.

    Raises:
        ValueError: no such model.

    >>> EmbeddedLlm("sft").pre
    'base'
    """

    post: str
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.post not in PRE_OF:
            raise ValueError(f"model.post={self.post}: must be one of {', '.join(sorted(PRE_OF))}")

    @property
    def pre(self) -> str:
        """The name of the model that `post` was trained from."""
        return PRE_OF[self.post]

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Content fingerprints of both models, tokenizer and architecture included."""
        names = (_config_name(self.post), *TOKENIZER)
        around = b"".join((DIRECTORY / name).read_bytes() for name in names)
        pre, post = (
            hashlib.sha256(fingerprint(_weights(name)).encode() + around).hexdigest()[:16]
            for name in (self.pre, self.post)
        )
        return pre, post

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        with torch.device("meta"):
            return _architecture(_config(self.post))


@lru_cache(maxsize=1)
def _open(spec: EmbeddedLlm) -> ModelPair:
    from transformers import AutoTokenizer

    config = _config(spec.post)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, local_files_only=True)
    return live_pair(
        _architecture(config),
        Checkpoint(_weights(spec.pre)),
        Checkpoint(_weights(spec.post)),
        spec.device,
        "float32",
        Encoder(tokenizer, context=int(config.max_position_embeddings or 0)),
    )


def _weights(name: str) -> Path:
    return DIRECTORY / f"{name}.safetensors"


def _config_name(model: str) -> str:
    return "small_config.json" if model.startswith("small_") else "config.json"


def _config(model: str) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(DIRECTORY / _config_name(model), local_files_only=True)


def _architecture(config: "LlamaConfig") -> nn.Module:
    from transformers import LlamaForCausalLM

    module: nn.Module = LlamaForCausalLM(config)
    return module
