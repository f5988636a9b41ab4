"""Text sources: what turns prompts and answers into a language model's token batches."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Encoder:
    """What turns text into a language model's tokens: the `transform` of such a pair.

    Args:
        tokenizer: a tokenizer of transformers.
        context: the most tokens that a sequence may have.
        chat: whether prompts are wrapped in the tokenizer's chat template.
    """

    tokenizer: Any
    context: int
    chat: bool = False
