"""Token batches of text whose answers are marked: where they begin, what is cut, how it is padded.

A text is tokenised as a whole, its prompt once more alone. The answer begins where the two token
lists part. Almost always that is the prompt's last token, and the split is the one that lm-eval
makes of context and continuation; where the tokenizer joins the prompt's end with the answer's
beginning (a prompt that ends in a space), the joined token belongs to the answer and no character
is lost or doubled, as would happen if both were tokenised apart.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
IGNORED = -100
"""The label of a token that no loss is taken of."""

Tokens = tuple[Tensor, Tensor, Tensor]
"""A batch `(ids, mask, labels)`, each (n, length) int64, padded on the right: `labels` repeats
`ids` where a token belongs to the answer and holds `IGNORED` elsewhere."""


@dataclass(frozen=True)
class Marked:
    """A text and the stretches of it that are answers.

    Attributes:
        text: prompt and answers.
        spans: begin and end of every answer, in characters.
        where: the file and line, for messages.
        ends: whether the end-of-sequence token follows, as part of the last answer.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str
    ends: bool = False


@dataclass(frozen=True)
class Coded:
    """One sequence: its tokens, and the same where they are labels, `IGNORED` elsewhere."""

    ids: list[int]
    labels: list[int]
    where: str

    @property
    def prompt(self) -> int:
        """How many tokens stand before the first answer."""
        return next((i for i, x in enumerate(self.labels) if x != IGNORED), len(self.ids))


def code(tokenizer: Any, texts: Sequence[Marked]) -> list[Coded]:
    """Tokenise marked texts.

    Special tokens are added as the tokenizer does by default, unless the text begins with the
    beginning-of-sequence token already, as chat templates make it.
    """
    wholes = _ids(tokenizer, [marked.text for marked in texts])
    places = [
        (number, at)
        for number, marked in enumerate(texts)
        for at in sorted({at for span in marked.spans for at in span})
        if 0 < at < len(marked.text)
    ]
    starts = _ids(tokenizer, [texts[number].text[:at] for number, at in places])
    found: list[dict[int, int]] = [{0: 0} for _ in texts]
    joined, eos = set(), tokenizer.eos_token_id
    for (number, at), start in zip(places, starts, strict=True):
        found[number][at] = length = common(start, wholes[number])
        if length < len(start) - (start[-1] == eos):
            joined.add(number)
    if joined:
        log.warning(
            "%d of %d prompts: the tokenizer joins the prompt's end with the answer (does the"
            " template end in a space?); the joined token counts as answer",
            len(joined),
            len(texts),
        )
    return [_label(*each, eos) for each in zip(texts, wholes, found, strict=True)]


def _label(marked: Marked, ids: list[int], found: dict[int, int], eos: int | None) -> Coded:
    if marked.ends and eos is not None and ids[-1:] != [eos]:
        ids = [*ids, eos]
    labels = [IGNORED] * len(ids)
    for begin, end in marked.spans:
        place = slice(found[begin], found.get(end, len(ids)))
        labels[place] = ids[place]
    return Coded(ids, labels, marked.where)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    begin = tokenizer.bos_token
    for has in (False, True):
        chosen = [
            i for i, text in enumerate(texts) if has == bool(begin and text.startswith(begin))
        ]
        if chosen:
            batch = [texts[i] for i in chosen]
            output = tokenizer(batch, add_special_tokens=not has, verbose=False)
            found |= dict(zip(chosen, output["input_ids"], strict=True))
    return [found[i] for i in range(len(texts))]


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the common beginning of two lists or texts.

    >>> common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def fit(sequences: Sequence[Coded], context: int, source: str) -> list[Coded]:
    """Cut sequences at their end to the context, and warn of how many there were.

    Raises:
        ValueError: nothing of an answer is left to predict.
    """
    cut = [Coded(s.ids[:context], s.labels[:context], s.where) for s in sequences]
    for whole, part in zip(sequences, cut, strict=True):
        _check_answer(whole, part, context)
    _report(sequences, cut, context, source, "cut at the end")
    return cut


def fit_pairs(
    pairs: Sequence[tuple[Coded, Coded]], context: int, source: str, bos: int | None = None
) -> list[tuple[Coded, Coded]]:
    """Cut preferences to the context: prompts at their beginning, then answers at their end.

    Both answers keep the same prompt, of which at least half a context is left; a
    beginning-of-sequence token, `bos`, stays in its place.

    Raises:
        ValueError: nothing of an answer is left to predict.
    """
    cut = []
    for pair in pairs:
        lengths, prompt = [len(s.ids) for s in pair], min(s.prompt for s in pair)
        drop = max(0, min(max(lengths) - context, prompt - context // 2))
        keep = int(pair[0].ids[:1] == [bos])
        one, other = (_without(s, keep, keep + drop, context) for s in pair)
        for whole, part in zip(pair, (one, other), strict=True):
            _check_answer(whole, part, context)
        cut.append((one, other))
    if same := sum(one.ids == other.ids for one, other in cut):
        log.warning(
            "%s: %d of %d preferences have the same answer on both sides: no weights change their"
            " loss",
            *(source, same, len(cut)),
        )
    before, after = ([s for pair in side for s in pair] for side in (pairs, cut))
    how = "prompts cut at the beginning down to half the context, then answers at the end"
    _report(before, after, context, source, how)
    return cut


def _without(whole: Coded, begin: int, end: int, length: int) -> Coded:
    """Return a sequence without the tokens from begin to end, then cut to a length."""
    ids, labels = ((x[:begin] + x[end:])[:length] for x in (whole.ids, whole.labels))
    return Coded(ids, labels, whole.where)


def _check_answer(whole: Coded, part: Coded, context: int) -> None:
    if all(label == IGNORED for label in part.labels[1:]):
        reason = (
            f"the prompt alone has {whole.prompt} tokens and the model's context is {context}"
            if len(whole.ids) > context
            else "too short: no token of an answer is left to predict"
        )
        raise ValueError(f"{whole.where}: {reason}")


def _report(
    before: Sequence[Coded], after: Sequence[Coded], context: int, source: str, how: str
) -> None:
    lost = [len(a.ids) - len(b.ids) for a, b in zip(before, after, strict=True)]
    if count := sum(n > 0 for n in lost):
        log.warning(
            "%s: %d of %d sequences are longer than the model's context of %d tokens: %s,"
            " %d tokens in all",
            *(source, count, len(lost), context, how, sum(lost)),
        )


def padded(sequences: Sequence[Coded], pad: int) -> Tokens:
    """Return (ids, mask, labels), each (n, length) int64, padded on the right to the longest.

    >>> ids, mask, labels = padded([Coded([5], [5], ""), Coded([6, 7], [-100, 7], "")], pad=0)
    >>> ids.tolist(), mask.tolist(), labels.tolist()
    ([[5, 0], [6, 7]], [[1, 0], [1, 1]], [[5, -100], [-100, 7]])
    """
    width = max(len(s.ids) for s in sequences)

    def stacked(part: Callable[[Coded], list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([part(s) + [fill] * (width - len(part(s))) for s in sequences])

    return (
        stacked(lambda s: s.ids, pad),
        stacked(lambda s: [1] * len(s.ids), 0),
        stacked(lambda s: s.labels, IGNORED),
    )


def batches(tokenizer: Any, sequences: Sequence[Coded], size: int) -> list[Tokens]:
    """Return batches in the order of the sequences, each padded to its own longest."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in known if token is not None)
    return [padded(sequences[i : i + size], pad) for i in range(0, len(sequences), size)]
