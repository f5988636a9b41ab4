"""The embedded language models: small Llamas of two sizes, post-trained, with one tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from deltalab.data.text import Encoder
from deltalab.models import embedded
from deltalab.models.causal import padding_learns
from deltalab.models.live import live_pair
from deltalab.store.latest import latest
from deltalab.weights.mapping import Checkpoint, ModelPair, check_same_layout

if TYPE_CHECKING:
    from transformers import LlamaConfig

DIRECTORY = embedded.ZOO / "llm"
AROUND = ("config.json", *embedded.TOKENIZER)
"""What a directory of one of the larger models needs beside its weights."""


@dataclass(frozen=True)
class EmbeddedLlm:
    """A pair of the small Llamas that ship with the package, of 0.6, 1.0 or 2.0 million parameters.

    Args:
        post: `sft` (base -> fine-tuned on word problems), `far` (the same with a large delta),
            `dpo` (sft -> preferences), `small_sft` (base -> fine-tuned, narrower, another seed),
            `small_counts`, `small_groups`, `small_compares` (that base -> one kind of problem), or
            one of `embedded.SAFETY` (an aligned model -> fine-tunes that undo it, or do not).
        device: as for `TimmPair`.
        weights: a safetensors file of another training of the same architecture, which takes the
            place of `post`'s own weights; None: those that ship with the package.

    Raises:
        ValueError: no such model.

    >>> EmbeddedLlm("sft").pre
    'base'
    """

    post: str
    device: str = "cpu"
    weights: str | None = None
    contents: ClassVar = {"post": "packaged llm", "weights": "model"}
    reads: ClassVar = ("checkpoint", "tokens")

    def __post_init__(self) -> None:
        if self.post not in embedded.LLM:
            raise ValueError(
                f"model.post={self.post}: must be one of {', '.join(sorted(embedded.LLM))}"
            )

    @property
    def pre(self) -> str:
        """The name of the model that `post` was trained from."""
        return embedded.LLM[self.post]

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The files of both models' weights."""
        post = _weights(self.post) if self.weights is None else Path(self.weights).expanduser()
        return _weights(self.pre), post

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        with torch.device("meta"):
            return _architecture(_config(self.post))


@latest("model")
def _open(spec: EmbeddedLlm) -> ModelPair:
    from transformers import AutoTokenizer

    config = _config(spec.post)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, local_files_only=True)
    pre, post = map(Checkpoint, spec.checkpoints)
    if spec.weights is not None:
        check_same_layout(pre, post)
    return live_pair(
        _architecture(config),
        pre,
        post,
        spec.device,
        "float32",
        Encoder(tokenizer, context=int(config.max_position_embeddings or 0)),
    )


def _weights(name: str) -> Path:
    return DIRECTORY / f"{name}.safetensors"


def _config(model: str) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(
        DIRECTORY / embedded.llm_config(model), local_files_only=True
    )


def _architecture(config: "LlamaConfig") -> nn.Module:
    from transformers import LlamaForCausalLM

    module: nn.Module = LlamaForCausalLM(config)
    padding_learns(module)
    return module
