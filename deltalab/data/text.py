"""Text sources: prompts and answers from files, as a language model's token batches.

Every source keeps the order of its file, so that per-example losses of two models stay aligned.
What a batch holds and how answers are found in a text, `deltalab.data.tokens` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deltalab.data.formats import plain, short
from deltalab.data.rows import Row, checked, read
from deltalab.data.tokens import Marked, Tokens, batches, code, common, fit, fit_pairs

Message = dict[str, str]


@dataclass(frozen=True, eq=False)
class Encoder:
    """What turns text into a language model's tokens: the `transform` of such a pair.

    Args:
        tokenizer: a tokenizer of transformers.
        context: the most tokens that a sequence may have.
        chat: whether prompts are wrapped in the tokenizer's chat template.

    Raises:
        ValueError: chat without a chat template, or a context of fewer than two tokens.
    """

    tokenizer: Any
    context: int
    chat: bool = False

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"model.context={self.context}: must be at least 2 tokens")
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError("model.chat=true: this model's tokenizer has no chat template")

    def render(self, messages: Sequence[Message], where: str, ask: bool = False) -> str:
        """Return messages as the chat template writes them.

        Args:
            messages: each with `role` and `content`.
            where: the file and line, for messages.
            ask: whether to end with the words that begin the assistant's answer.

        Raises:
            ValueError: no chat template, or one that refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(f"{where}: messages need a chat template, this tokenizer has none")
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program, and raises whatever it likes
            raise ValueError(f"{where}: the chat template refuses it ({plain(error)})") from None
        return text

    def dialogue(self, messages: Sequence[Message], where: str) -> Marked:
        """Return messages as the chat template writes them, the assistant's turns marked.

        A turn ends with the token that closes it; white space that follows is no part of it.

        Raises:
            ValueError: no turn of the assistant, or a template that rewrites earlier turns.
        """
        text, spans = self.render(messages, where), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                after = self.render(messages[: number + 1], where).rstrip()
                if not text.startswith(after):
                    raise ValueError(
                        f"{where}: the chat template writes message {number} otherwise when it is"
                        " followed by more, so that no answer can be told from its prompt"
                    )
                spans.append((self._begin(messages, number, after, where), len(after)))
        if not spans:
            raise ValueError(f"{where}: no message of the assistant")
        return Marked(text, tuple(spans), where)

    def _begin(self, messages: Sequence[Message], number: int, after: str, where: str) -> int:
        """Return where the assistant's turn of this number begins in the text that ends with it.

        That is where the words end that ask for it. Templates of models that reason begin the
        answer with those words (`<think>`), but write no thoughts in a turn that is given: it
        begins where the two part, or with its own first word.
        """
        asked = self.render(messages[:number], where, ask=True)
        if after.startswith(asked):
            return len(asked)
        before = self.render(messages[:number], where) if number else ""
        if not after.startswith(before):
            raise ValueError(
                f"{where}: the chat template writes what comes before message {number} otherwise"
                " than without it, so that no answer can be told from its prompt"
            )
        shared = common(asked, after)
        own = after.find(messages[number]["content"].strip(), len(before))
        return shared if own < 0 else min(shared, own)

    def pair(self, prompt: str, separator: str, answer: str, where: str) -> Marked:
        """Return one prompt with its answer, marked: a chat of two turns, or plain text."""
        if self.chat:
            turns = {"user": prompt, "assistant": answer}
            return self.dialogue([{"role": r, "content": c} for r, c in turns.items()], where)
        text = f"{prompt}{separator}{answer}"
        return Marked(text, ((len(prompt), len(text)),), where, ends=True)


@dataclass(frozen=True)
class Problems:
    """Questions with their answers, as GSM8K has them; the answer and its end are labelled.

    Args:
        path: as for `deltalab.data.rows.read`: a file, a directory, a data set, or `package:...`.
        question: the field that holds the question.
        answer: the field that holds the answer.
        split: the split of a data set.
        config: the configuration of a data set that has several.
        template: the prompt, with `{question}` where the question goes.
        separator: between prompt and answer, where no chat template stands between them.
        limit: the first so many rows; all when None.

    Raises:
        ValueError: on opening: a row without question or answer, naming its line.
    """

    path: str
    question: str = "question"
    answer: str = "answer"
    split: str | None = None
    config: str | None = None
    template: str = "Question: {question}\nAnswer:"
    separator: str = " "
    limit: int | None = None
    contents: ClassVar = {"path": "rows"}
    reads: ClassVar = ("rows", "tokens")

    def __post_init__(self) -> None:
        _check(self.limit, self.template, "{question}")

    def open(self, transform: Encoder, batch_size: int) -> list[Tokens]:
        """Return the batches, in the order of the file."""
        return _open(self, transform, batch_size)

    def mark(self, row: Row, encoder: Encoder) -> Marked:
        """Return one row with its answer marked."""
        question = row.text(self.question, "question")
        answer = row.text(self.answer, "answer")
        prompt = self.template.replace("{question}", question)
        return encoder.pair(prompt, self.separator, answer, row.where)


@dataclass(frozen=True)
class Chats:
    """Conversations through the chat template; all turns of the assistant are labelled.

    Args:
        path: as for `Problems`.
        messages: the field that holds a list of messages, each with `role` and `content`.
        split: as for `Problems`.
        config: likewise.
        limit: likewise.
    """

    path: str
    messages: str = "messages"
    split: str | None = None
    config: str | None = None
    limit: int | None = None
    contents: ClassVar = {"path": "rows"}
    reads: ClassVar = ("rows", "tokens")

    def __post_init__(self) -> None:
        _check(self.limit)

    def open(self, transform: Encoder, batch_size: int) -> list[Tokens]:
        """Return the batches, in the order of the file."""
        return _open(self, transform, batch_size)

    def mark(self, row: Row, encoder: Encoder) -> Marked:
        """Return one row with the assistant's turns marked."""
        return encoder.dialogue(_messages(row, self.messages, "messages"), row.where)


@dataclass(frozen=True)
class Plain:
    """Text of which every token is predicted from those before it.

    The first token is predicted where the tokenizer sets a beginning-of-sequence token before it.

    Args:
        path: as for `Problems`.
        text: the field that holds the text.
        split: as for `Problems`.
        config: likewise.
        limit: likewise.
    """

    path: str
    text: str = "text"
    split: str | None = None
    config: str | None = None
    limit: int | None = None
    contents: ClassVar = {"path": "rows"}
    reads: ClassVar = ("rows", "tokens")

    def __post_init__(self) -> None:
        _check(self.limit)

    def open(self, transform: Encoder, batch_size: int) -> list[Tokens]:
        """Return the batches, in the order of the file."""
        return _open(self, transform, batch_size)

    def mark(self, row: Row, encoder: Encoder) -> Marked:
        """Return one row with all of its text marked."""
        text = row.text(self.text, "text")
        return Marked(text, ((0, len(text)),), row.where)


@dataclass(frozen=True)
class Preferences:
    """Prompts with a chosen and a rejected answer, as UltraFeedback has them.

    Answers are texts, or lists of messages that end with the assistant's; what comes before is then
    the prompt.

    Args:
        path: as for `Problems`.
        prompt: the field that holds the prompt.
        chosen: the field that holds the answer that was preferred.
        rejected: the field that holds the other answer.
        split: as for `Problems`.
        config: likewise.
        template: the prompt as the model gets it, with `{prompt}` where the prompt goes.
        separator: as for `Problems`.
        limit: likewise.

    Raises:
        ValueError: on opening: a row without prompt or answers, or whose lists differ before the
            last message, naming its line.
    """

    path: str
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    split: str | None = None
    config: str | None = None
    template: str = "{prompt}"
    separator: str = " "
    limit: int | None = None
    contents: ClassVar = {"path": "rows"}
    reads: ClassVar = ("rows", "tokens")

    def __post_init__(self) -> None:
        _check(self.limit, self.template, "{prompt}")

    def open(self, transform: Encoder, batch_size: int) -> list[tuple[Tokens, Tokens]]:
        """Return pairs of batches, chosen and rejected, in the order of the file."""
        encoder = _encoder(transform)
        rows = read(self.path, self.config, self.split, self.limit)
        coded = code(encoder.tokenizer, [each for row in rows for each in self._both(row, encoder)])
        pairs = list(zip(coded[::2], coded[1::2], strict=True))
        bos, source = encoder.tokenizer.bos_token_id, f"data.path={self.path}"
        pairs = fit_pairs(pairs, encoder.context, source, bos)
        sides = (batches(encoder.tokenizer, [p[i] for p in pairs], batch_size) for i in (0, 1))
        return list(zip(*sides, strict=True))

    def _both(self, row: Row, encoder: Encoder) -> tuple[Marked, Marked]:
        chosen = row.value(self.chosen, "chosen")
        rejected = row.value(self.rejected, "rejected")
        if isinstance(chosen, list) != isinstance(rejected, list):
            raise ValueError(f"{row.where}: one answer is a list of messages, the other is not")
        if isinstance(chosen, list):
            return self._both_lists(row, encoder)
        prompt = self.template.replace("{prompt}", row.text(self.prompt, "prompt"))
        answers = row.text(self.chosen, "chosen"), row.text(self.rejected, "rejected")
        one, other = (encoder.pair(prompt, self.separator, a, row.where) for a in answers)
        return one, other

    def _both_lists(self, row: Row, encoder: Encoder) -> tuple[Marked, Marked]:
        lists = [
            _messages(row, self.chosen, "chosen"),
            _messages(row, self.rejected, "rejected"),
        ]
        history = lists[0][:-1]
        if history != lists[1][:-1]:
            raise ValueError(f"{row.where}: the two lists differ before their last messages")
        if any(messages[-1]["role"] != "assistant" for messages in lists):
            raise ValueError(f"{row.where}: the last message must be the assistant's")
        if encoder.chat:
            found = [encoder.dialogue(messages, row.where) for messages in lists]
            one, other = (Marked(m.text, m.spans[-1:], m.where) for m in found)
            return one, other
        if [message["role"] for message in history] != ["user"]:
            raise ValueError(
                f"{row.where}: {len(history)} messages before the answer need a chat template"
                " (model.chat=true); without one there can be one, the user's"
            )
        prompt = self.template.replace("{prompt}", history[0]["content"])
        answers = (messages[-1]["content"] for messages in lists)
        one, other = (encoder.pair(prompt, self.separator, a, row.where) for a in answers)
        return one, other


def _open(source: Problems | Chats | Plain, transform: Encoder, batch_size: int) -> list[Tokens]:
    """Return the batches of a source in the order of its file, every row as it marks it."""
    encoder = _encoder(transform)
    rows = read(source.path, source.config, source.split, source.limit)
    coded = code(encoder.tokenizer, [source.mark(row, encoder) for row in rows])
    cut = fit(coded, encoder.context, f"data.path={source.path}")
    return batches(encoder.tokenizer, cut, batch_size)


def _encoder(transform: Any) -> Encoder:
    if not isinstance(transform, Encoder):
        raise ValueError("data: texts are for language models, and model= names another kind")
    return transform


def _check(limit: int | None, template: str = "", needed: str = "") -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"data.limit={limit}: must be at least 1, or null for all rows")
    if needed not in template:
        raise ValueError(f"data.template={template!r}: must hold {needed}")


def _messages(row: Row, field: str, setting: str) -> list[Message]:
    """Return a field's messages, of which every one has a role and a text."""
    found = row.value(field, setting)
    where = f"{row.where}: field {field!r}"
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where} is {short(found)}, must be a list of messages")
    messages = []
    for number, message in enumerate(found):
        place = f"{where}, message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{place} is {short(message)}, must have role and content")
        role = checked(message["role"], f"{place}, role")
        content = checked(message["content"], place, empty=role != "assistant")
        messages.append({"role": role, "content": content})
    return messages
