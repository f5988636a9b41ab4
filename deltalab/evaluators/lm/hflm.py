"""The live module as lm-eval's language model: quiet, never retied, generation stopped by row."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

ALONE = {"num_return_sequences": 1, "return_dict_in_generate": False, "max_time": None}
"""One text a prompt, and whole: what `generation_config.json` may say of it is no matter of scores.
How far a text may go is the task's; whatever else that file says, transformers puts where the task
says nothing, as it would on the saved checkpoint."""

_LOUD = ("lm_eval", "transformers", "datasets", "evaluate")


def wrapper(
    module: nn.Module, tokenizer: Any, context: int, batch_size: int | str
) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """Return what makes lm-eval's language model of a module, for the time of an evaluation.

    Args:
        module: the live module of transformers.
        tokenizer: it may be given a padding token.
        context: the most tokens of a sequence.
        batch_size: sequences a forward pass, or `auto`.
    """
    with quiet(), untied(module):
        lm = _class()(
            pretrained=module, tokenizer=tokenizer, batch_size=batch_size, max_length=context
        )

    @contextmanager
    def live(module: nn.Module) -> Iterator[Any]:
        lm._model = module
        with quiet():
            yield lm

    return live


@contextmanager
def untied(module: nn.Module) -> Iterator[None]:
    """Keep lm-eval from tying the head to the embedding: it would undo an edit of one of them."""
    module.__dict__["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del module.__dict__["tie_weights"]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what lm-eval and its libraries log, warn and print on stdout."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class Ticks:
    """Stands where lm-eval would cache responses: is told of each, and only counts them.

    Nothing is kept. lm-eval's cache is keyed by the request alone, so that an edited model would be
    given the answers of the model before it.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def add_partial(self, *_: Any) -> None:
        """Count one response."""
        self._step()


class Stops:
    """Ends every row of a batch at its own first stop text; lm-eval waits for all to meet one.

    A row ends at the step at which lm-eval, given this row alone, would end: when one of the texts
    is in the decoded end of what was generated. Only tokens whose own text holds the last character
    of a stop text can complete it, and only then anything is decoded.

    Args:
        tokenizer: what decodes.
        texts: the stop texts.
        start: tokens of the prompts, which are not looked at.
        closing: for each text, by token, whether the token can complete it: from `closing_tokens`.
        beams: of beam search, which asks of every candidate whether it has just ended, and keeps
            those that have itself: a row is another candidate at every step.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], start: int, closing: Tensor, beams: int = 1
    ) -> None:
        self._tokenizer = tokenizer
        self._beams = beams
        self._texts = texts
        self._start = start
        self._closing = closing
        self._reach = [len(tokenizer.encode(t, add_special_tokens=False)) + 2 for t in texts]
        self._done = torch.zeros(0, dtype=torch.bool)
        self.ends: dict[int, int] = {}

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows have ended, shape (rows,)."""
        if not len(self._done) or self._beams > 1:
            self._done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            self.ends.clear()
        for which, row in (self._closing[:, ids[:, -1]] & ~self._done).nonzero().tolist():
            tail = ids[row, max(self._start, ids.shape[1] - self._reach[which]) :]
            if self._texts[which] in self._tokenizer.decode(tail):
                self.ends.setdefault(row, ids.shape[1])
        if self.ends:
            self._done[list(self.ends)] = True
        return self._done

    def padded(self, ids: Tensor, pad: int) -> Tensor:
        """Return the generated batch with every row's tokens after its end replaced by padding."""
        if self._beams == 1:  # beam search has done so
            for row, end in self.ends.items():
                ids[row, end:] = pad
        return ids


def closing_tokens(tokenizer: Any, texts: Sequence[str], vocabulary: int) -> Tensor:
    """Return which tokens can complete which stop text, shape (texts, vocabulary).

    A token that holds only a part of a character, or is not the tokenizer's, may complete any. So
    may every token a text that ends in a space, which some tokenizers drop from a token on its own.
    """
    own = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    own += ["\N{REPLACEMENT CHARACTER}"] * (vocabulary - len(own))
    return torch.tensor(
        [
            [t[-1:] in (" ", "") or t[-1] in o or "\N{REPLACEMENT CHARACTER}" in o for o in own]
            for t in texts
        ],
        dtype=torch.bool,
    ).reshape(len(texts), len(own))


@lru_cache(maxsize=1)
def _class() -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import StoppingCriteriaList

    class InMemory(HFLM):  # type: ignore[misc]
        """`HFLM` without its bars, whose generation ends row by row."""

        closing: dict[tuple[str, ...], Tensor]

        def _closing(self, texts: tuple[str, ...]) -> Tensor:
            known = self.__dict__.setdefault("closing", {})
            if texts not in known:
                size = self.model.get_input_embeddings().weight.shape[0]
                known[texts] = closing_tokens(self.tokenizer, texts, size).to(self.device)
            found: Tensor = known[texts]
            return found

        def _model_generate(
            self, context: Tensor, max_length: int, stop: list[str], **settings: Any
        ) -> Tensor:
            if settings.get("temperature", 0.0) == 0.0 and not settings.get("do_sample"):
                settings.pop("temperature", None)
                settings["do_sample"] = False
            texts, start = tuple(text for text in stop if text), context.shape[1]
            settings = {**ALONE, **settings, "max_new_tokens": self._room(max_length, start)}
            beams = settings.get("num_beams") or self.model.generation_config.num_beams or 1
            stops = Stops(self.tokenizer, texts, start, self._closing(texts), beams)
            if self.model.generation_config.stop_strings:
                settings["tokenizer"] = self.tokenizer
            ids = self.model.generate(
                input_ids=context,
                stopping_criteria=StoppingCriteriaList([stops]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **settings,
            )
            return stops.padded(ids, self.tokenizer.pad_token_id)

        def _room(self, length: int, start: int) -> int:
            """Return how many tokens may follow the prompt, whatever the checkpoint's files say."""
            room = min(length, self.max_length) - start
            if room < 1:
                raise ValueError(
                    f"generation_kwargs.max_length={length}: the prompt has {start} tokens and the"
                    f" context holds {self.max_length}; set evaluator.max_new_tokens instead"
                )
            return int(room)

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **settings: Any) -> Any:
            settings["disable_tqdm"] = True
            return super()._loglikelihood_tokens(requests, **settings)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return InMemory
