"""How an instruction becomes a language model's tokens: a template, or the tokenizer's chat."""

from dataclasses import dataclass
from typing import Any

from deltalab.text import Encoder

FIELD = "{instruction}"


@dataclass(frozen=True)
class Prompts:
    """The prompt of an instruction.

    Args:
        template: a text with `{instruction}`; in a chat it is the user's message.
        chat: wrap it in the tokenizer's chat template; None does as the pair does.
    """

    template: str = FIELD
    chat: bool | None = None

    def __post_init__(self) -> None:
        if FIELD not in self.template:
            raise ValueError(f"evaluator.prompt={self.template}: must contain {FIELD}")

    def check(self, encoder: Encoder) -> None:
        """Raise `ValueError` where a chat is asked for and the tokenizer has no template."""
        if self.in_chat(encoder) and not getattr(encoder.tokenizer, "chat_template", None):
            raise ValueError(
                "evaluator.chat=true: the tokenizer has no chat template; evaluator.chat=false and"
                " evaluator.prompt='...{instruction}...' make a plain prompt"
            )

    def in_chat(self, encoder: Encoder) -> bool:
        """Return whether prompts are wrapped in the tokenizer's chat template."""
        return encoder.chat if self.chat is None else self.chat

    def ids(self, encoder: Encoder, instruction: str) -> list[int]:
        """Return the tokens of a prompt, special ones in front as the tokenizer puts them."""
        text = self.template.replace(FIELD, instruction)
        if self.in_chat(encoder):
            return chat_ids(encoder.tokenizer, [{"role": "user", "content": text}])
        found: list[int] = encoder.tokenizer(text)["input_ids"]
        if found and found[-1] == encoder.tokenizer.eos_token_id:
            found = found[:-1]  # some tokenizers end every text, a prompt goes on
        return found


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return the tokens of messages in the tokenizer's chat template, up to the answer's start."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
