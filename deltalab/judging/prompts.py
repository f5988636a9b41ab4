"""How an instruction becomes a language model's tokens: a template, or the tokenizer's chat."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltalab.data.text import Encoder, Message

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
            message = {"role": "user", "content": text}
            return chat_ids(encoder, [message], f"instruction {instruction[:40]!r}")
        found: list[int] = encoder.tokenizer(text)["input_ids"]
        if found and found[-1] == encoder.tokenizer.eos_token_id:
            found = found[:-1]  # some tokenizers end every text, a prompt goes on
        return found


def chat_ids(encoder: Encoder, messages: Sequence[Message], where: str) -> list[int]:
    """Return the tokens of messages in the tokenizer's chat template, up to the answer's start.

    Raises:
        ValueError: the template refuses the messages.
    """
    text = encoder.render(messages, where, ask=True)
    found: list[int] = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
