"""vLLM as lm-eval's language model: it takes no live module, so the edited one is written out."""

import gc
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltalab.evaluators.lm.hflm import quiet

MEMORY = Path("/dev/shm")  # a directory in memory, where there is one


def launcher(
    tokenizer: Any, context: int, batch_size: int | str, seed: int
) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """Return what writes a module to a directory and starts vLLM on it, for an evaluation.

    Args:
        tokenizer: written beside the module.
        context: the most tokens of a sequence.
        batch_size: requests at a time; `auto` leaves it to vLLM.
        seed: of vLLM's sampling.

    Raises:
        ValueError: vLLM is not installed.
    """
    if start is _start and find_spec("vllm") is None:
        raise ValueError(
            "evaluator.backend=vllm: needs the package vllm, which is not installed; it pins"
            " another torch, so give it an environment of its own"
        )

    @contextmanager
    def live(module: nn.Module) -> Iterator[Any]:
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        with quiet(), tempfile.TemporaryDirectory(prefix="deltalab-", dir=room(size)) as directory:
            write(module, tokenizer, directory)
            lm = start(directory, context, batch_size, seed)
            try:
                yield lm
            finally:
                del lm
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    return live


def room(size: int) -> str | None:
    """Return the directory in memory where twice `size` bytes fit, else the system's temporary."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * size:
        return str(MEMORY)
    return None


def write(module: Any, tokenizer: Any, directory: str) -> None:
    """Write a module and its tokenizer; a head that an edit has set apart stays apart."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    tied = module.config.tie_word_embeddings
    if head is not None and head.weight.data_ptr() != embedding.weight.data_ptr():
        module.config.tie_word_embeddings = False
    try:
        with redirect_stderr(io.StringIO()):  # a bar for every file
            module.save_pretrained(directory)
    finally:
        module.config.tie_word_embeddings = tied
    tokenizer.save_pretrained(directory)


def _start(directory: str, context: int, batch_size: int | str, seed: int) -> Any:
    """Return lm-eval's vLLM on a written model."""
    from lm_eval.api.registry import get_model

    return get_model("vllm")(
        pretrained=directory, max_model_len=context, batch_size=batch_size, seed=seed
    )


start = _start
