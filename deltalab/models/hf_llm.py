"""Pairs of causal language models in the Hugging Face layout, from directories or the hub."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from deltalab.checkpoints import check_local, opened
from deltalab.data.text import Encoder
from deltalab.models import facts, hub, vocabulary
from deltalab.models.causal import architecture, configuration, differences, filled, generation
from deltalab.models.live import device_of
from deltalab.store.latest import latest
from deltalab.weights import contents
from deltalab.weights.aligned import MISMATCH
from deltalab.weights.mapping import ModelPair

log = logging.getLogger(__name__)
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
ATTENTION = (None, "eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True)
class HfPair:
    """Any causal language model of transformers, with a pre- and a post-trained checkpoint.

    Architecture, tokenizer and generation settings are those of the post-trained model.

    Args:
        pre: a directory, a safetensors file, or a hub id.
        post: a directory or a hub id, post-trained from `pre`; or the directory of a LoRA adapter
            of `pre` in PEFT's layout, whose configuration is then that of `pre`.
        dtype: the dtype in which the model is evaluated; `auto`: the post-trained model's own, by
            its config.json, else by its files.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        attn: the implementation of attention: `eager`, `sdpa` or `flash_attention_2`; None lets
            transformers choose.
        pre_revision: branch, tag or commit, where `pre` is a hub id.
        post_revision: likewise of `post`.
        tokenizer: a directory or a hub id, where it is not the post-trained model's own.
        chat: whether prompts are wrapped in the tokenizer's chat template.
        context: the most tokens that a sequence may have; what the model allows when None.
        mismatch: where the vocabularies differ: "error", or "keep_post" to leave embeddings and
            head as the post-trained model has them.
        trust_remote_code: whether Python code that comes with the models may be run.
        dequantize: whether weights in 8-bit floats or packed integers are decoded, as
            `deltalab.checkpoints.decoded` says; else quantised models are refused.
        base: a directory or a hub id, another model of the same architecture and vocabulary that
            the delta is put onto, as a chat vector; None: it stays where it is.

    Raises:
        ValueError: a setting is none of those.
    """

    pre: str
    post: str
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    pre_revision: str | None = None
    post_revision: str | None = None
    tokenizer: str | None = None
    chat: bool = False
    context: int | None = None
    mismatch: str = "error"
    trust_remote_code: bool = False
    dequantize: bool = False
    base: str | None = None
    contents: ClassVar = {
        "pre": "model",
        "post": "model",
        "base": "model",
        "tokenizer": "tokenizer",
        "dtype": "dtype",
    }
    reads: ClassVar = ("checkpoint", "tokens")

    def __post_init__(self) -> None:
        choices = {"dtype": DTYPES, "attn": ATTENTION, "mismatch": MISMATCH}
        for name, allowed in choices.items():
            if (given := getattr(self, name)) not in allowed:
                words = ", ".join(word or "null" for word in allowed)
                raise ValueError(f"model.{name}={given}: must be one of {words}")
        if self.context is not None and self.context < 2:
            raise ValueError(f"model.context={self.context}: must be at least 2 tokens")
        if self.base is not None and self.mismatch != "error":
            raise ValueError(
                f"model.base={self.base}: goes with model.mismatch=error, as every tensor must move"
            )

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The local paths of both models, fetched from the hub if need be."""
        code = self.trust_remote_code
        return (
            hub.directory(self.pre, "model.pre", self.pre_revision, code),
            hub.directory(self.post, "model.post", self.post_revision, code),
        )

    @property
    def other_base(self) -> Path | None:
        """The local path of the base that the delta is put onto, if there is one."""
        if self.base is None:
            return None
        return hub.directory(self.base, "model.base", None, self.trust_remote_code)

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory.

        Where the hub cannot be asked, a preset's is built from what its publisher says of it.
        """
        code = self.trust_remote_code
        check_local(self.pre, "model.pre", self.dequantize)
        check_local(self.post, "model.post", self.dequantize, self.pre)
        try:
            post = hub.described(self.post, "model.post", self.post_revision, code)
            if contents.is_adapter(post):
                post = hub.described(self.pre, "model.pre", self.pre_revision, code)
            config = configuration(post, "model.post", code, self.dequantize)
            dtype = self._own(post)
        except hub.Absent:
            known = facts.known(self.post)
            if known is None or (config := facts.configuration(self.post)) is None:
                raise
            dtype = known.dtype if self.dtype == "auto" else self.dtype
        module: nn.Module = architecture(config, dtype, "meta", "eager", code)
        return module

    def _own(self, post: Path) -> str:
        """Return the dtype to evaluate in; where nothing tells it, float32 can hold any."""
        return self.dtype if self.dtype != "auto" else contents.dtype_of(post) or "float32"


@latest("model")
def _open(spec: HfPair) -> ModelPair:
    device = device_of(spec.device)
    pre, post = spec.checkpoints
    code = spec.trust_remote_code
    home = contents.around(pre, post)
    config = configuration(home, "model.post", code, spec.dequantize)
    if line := differences(pre, home, config, code):
        log.warning(line)
    sides = (
        opened(pre, "model.pre", spec.dequantize),
        opened(post, "model.post", spec.dequantize, onto=pre),
    )
    encoder = _encoder(spec, pre, post if vocabulary.has_tokenizer(post) else home, config)
    module = architecture(config, spec._own(home), device, spec.attn, code)
    base = None
    if (place := spec.other_base) is not None:
        base = opened(place, "model.base", spec.dequantize)
        if vocabulary.has_tokenizer(place):
            other = vocabulary.opened(place, "model.base", code)
            vocabulary.check_same(other, encoder.tokenizer)
    pair = filled(module, *sides, spec.mismatch, encoder, base=base)
    generation(module, home)
    if line := vocabulary.beyond(encoder.tokenizer, module.get_input_embeddings().weight.shape[0]):
        log.warning(line)
    return pair


def _encoder(spec: HfPair, pre: Path, post: Path, config: Any) -> Encoder:
    """Open the tokenizer and hold it against that of the pre-trained model, if it has one."""
    place, setting = post, "model.post"
    if spec.tokenizer is not None:
        setting = "model.tokenizer"
        place = hub.around(spec.tokenizer, setting, code=spec.trust_remote_code)
    tokenizer = vocabulary.opened(place, setting, spec.trust_remote_code)
    if vocabulary.has_tokenizer(pre) and not _same_file(pre, place, "tokenizer.json"):
        other = vocabulary.opened(pre, "model.pre", spec.trust_remote_code)
        vocabulary.check_same(other, tokenizer)
    return Encoder(
        tokenizer, vocabulary.context_of(config, tokenizer, spec.context), chat=spec.chat
    )


def _same_file(one: Path, other: Path, name: str) -> bool:
    files = one / name, other / name
    return all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes()
