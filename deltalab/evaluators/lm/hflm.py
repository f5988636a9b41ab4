"""The live module as lm-eval's language model: quiet, never retied, every beginning read once."""

import copy
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltalab.inference import beginnings, greedy, scoring
from deltalab.inference.budget import Budget
from deltalab.inference.passes import Passes, refusal
from deltalab.store import digests, unfinished

log = logging.getLogger(__name__)

ALONE = {"num_return_sequences": 1, "return_dict_in_generate": False, "max_time": None}
"""One text a prompt, and whole: what `generation_config.json` may say of it is no matter of scores.
How far a text may go is the task's; whatever else that file says, transformers puts where the task
says nothing, as it would on the saved checkpoint."""

PLAIN = {
    "_from_model_config", "bos_token_id", "do_sample", "eos_token_id", "max_length",
    "max_new_tokens", "min_p", "num_beams", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "pad_token_id", "temperature", "top_k", "top_p",
    "transformers_version", "typical_p", "use_cache", *ALONE,
}  # fmt: skip
"""What settings of generation may name where the likeliest token is taken at every step."""

_LOUD = ("lm_eval", "transformers", "datasets", "evaluate")


def wrapper(
    module: nn.Module, tokenizer: Any, context: int, batch_size: int | str, share: bool = True
) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """Return what makes lm-eval's language model of a module, for the time of an evaluation.

    Args:
        module: the live module of transformers.
        tokenizer: it may be given a padding token.
        context: the most tokens of a sequence.
        batch_size: of how many of the longest rows a forward pass may have the tokens, or `auto`.
        share: whether beginnings that rows share are computed once.
    """
    with quiet(), untied(module):
        lm = _class()(
            pretrained=module, tokenizer=tokenizer, batch_size=batch_size, max_length=context
        )
        why = refusal(module, context) if share else None
    if why is not None:
        log.warning("lm-eval: beginnings that prompts share are computed anew for each: %s", why)
    lm.share = share and why is None
    lm.budget = Budget(batch_size, lm.device.type)

    @contextmanager
    def live(module: nn.Module) -> Iterator[Any]:
        lm._model = module
        lm.passes = Passes(module)
        lm.kept = unfinished.lines(lambda: digest(module))
        lm.work = Work()
        with quiet():
            yield lm
        lm.work.computed = lm.passes.tokens
        if lm.kept is None or not lm.kept.found:
            lm.told = lm.told or lm.work.tell()

    return live


def digest(module: nn.Module) -> str:
    """Return a digest of a module's weights, 16 hexadecimal digits."""

    def one(tensor: Tensor) -> str:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return digests.of_tensor(
            str(tensor.dtype), tensor.shape, hashlib.sha256(data.data).hexdigest()
        )

    weights = module.state_dict()
    with ThreadPoolExecutor() as pool:
        return digests.combined(dict(zip(weights, pool.map(one, weights.values()), strict=True)))


class Work:
    """What an evaluation computed.

    Attributes:
        computed: tokens of all passes.
        asked: tokens that all requests would have been, each alone.
        near: texts in which two tokens were too close to tell the better one.
        texts: how many were generated.
    """

    def __init__(self) -> None:
        self.computed = self.asked = self.near = self.texts = 0

    def tell(self) -> bool:
        """Log it; whether there was any."""
        if self.asked:
            log.info("lm-eval: %d of %d tokens were computed", self.computed, self.asked)
        if self.near:
            log.info("lm-eval: %d of %d texts may differ by rounding", self.near, self.texts)
        return bool(self.asked)


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


class Endings:
    """Tells whether a text ends with its last token, as lm-eval would, given this text alone.

    It ends when one of the stop texts is in the decoded end of what was generated. Only tokens
    whose own text holds the last character of a stop text can complete it, and only then anything
    is decoded.

    Args:
        tokenizer: what decodes.
        texts: the stop texts.
        vocabulary: how many tokens the model knows.
        eos: the tokens at which the model itself ends.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], vocabulary: int, eos: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._eos = frozenset(eos)
        self.closing = closing_tokens(tokenizer, texts, vocabulary)
        self._closes: list[bool] = self.closing.any(0).tolist()
        self._reach = [len(tokenizer.encode(t, add_special_tokens=False)) + 2 for t in texts]

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether a text of these tokens ends with the last one."""
        last = tokens[-1]
        if last in self._eos:
            return True
        return self._closes[last] and any(
            self.completed(which, tokens)
            for which in range(len(self._texts))
            if self.closing[which, last]
        )

    def completed(self, which: int, tokens: Any) -> bool:
        """Whether one of the stop texts is in the end of tokens."""
        return self._texts[which] in self._tokenizer.decode(tokens[-self._reach[which] :])


class Stops:
    """Ends every row of a batch at its own first stop text; lm-eval waits for all to meet one.

    Args:
        endings: of the stop texts.
        start: tokens of the prompts, which are not looked at.
        beams: of beam search, which asks of every candidate whether it has just ended, and keeps
            those that have itself: a row is another candidate at every step.
    """

    def __init__(self, endings: Endings, start: int, beams: int = 1) -> None:
        self._endings = endings
        self._beams = beams
        self._start = start
        self._done = torch.zeros(0, dtype=torch.bool)
        self.ends: dict[int, int] = {}

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows have ended, shape (rows,)."""
        if not len(self._done) or self._beams > 1:
            self._done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            self.ends.clear()
        closing = self._endings.closing.to(ids.device)
        for which, row in (closing[:, ids[:, -1]] & ~self._done).nonzero().tolist():
            if self._endings.completed(which, ids[row, self._start :]):
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


def stock(model: Any) -> bool:
    """Whether a model generates as those of transformers do; one with a way of its own is asked.

    >>> class Model:
    ...     def generate(self): ...
    >>> stock(Model())
    False
    """
    from transformers import GenerationMixin

    return getattr(model.generate, "__func__", None) is GenerationMixin.generate


def plain(settings: Mapping[str, Any], own: Any) -> bool:
    """Whether generation settings, over a model's own, take the likeliest token at every step.

    Args:
        settings: a task's, normalised by lm-eval.
        own: the model's `generation_config`.
    """
    chosen = {**own.to_diff_dict(), **settings}
    if settings.get("do_sample") or (chosen.get("num_beams") or 1) != 1:
        return False
    return all(name in PLAIN or chosen[name] is None for name in chosen)


@lru_cache(maxsize=1)
def _class() -> Any:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from transformers import StoppingCriteriaList

    class InMemory(HFLM):  # type: ignore[misc]
        """`HFLM` without its bars, which computes what requests share once."""

        share = False
        told = False
        budget: Budget
        passes: Passes
        work: Work
        kept: unfinished.Lines | None

        def _once(self, *key: Any, made: Callable[[], Any]) -> Any:
            """Return what does not depend on the weights, made at the first evaluation."""
            known = self.__dict__.setdefault("_known", {})
            if key not in known:
                known[key] = made()
            return known[key]

        def _endings(self, texts: tuple[str, ...], eos: tuple[int, ...] = ()) -> Endings:
            def made() -> Endings:
                size = self.model.get_input_embeddings().weight.shape[0]
                return Endings(self.tokenizer, texts, size, eos)

            found: Endings = self._once("endings", texts, eos, made=made)
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
            stops = Stops(self._endings(texts), start, beams)
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

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            texts = tuple(request.args for request in requests)

            def made() -> list[beginnings.Row]:
                return beginnings.scored([self._fed(*self._encoded(*each)) for each in texts])

            rows = self._once("scored", texts, made=made)
            return self._likelihoods(rows, len(texts), lambda n: texts[n])

        def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context:
                found: tuple[list[int], list[int]] = self._encode_pair(context, continuation)
                return found
            said = self.tok_encode(continuation, add_special_tokens=False)
            if self.prefix_token_id == said[0]:
                return said[:1], said[1:]
            return [self.prefix_token_id], said

        def _fed(self, before: list[int], said: list[int]) -> tuple[list[int], list[int]]:
            """Return the tokens that score a continuation, cut off on the left, and itself."""
            assert before
            assert 0 < len(said) <= self.max_length
            return (before + said)[-(self.max_length + 1) :][:-1], said

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **settings: Any) -> Any:
            rows = beginnings.scored([self._fed(*each[1:]) for each in requests])
            return self._likelihoods(rows, len(requests), lambda n: None)

        def _likelihoods(
            self, rows: list[beginnings.Row], count: int, text: Callable[[int], Any]
        ) -> list[tuple[float, bool]]:
            """Return what is asked of rows, in the requests' order."""
            found: dict[int, tuple[float, bool]] = {}

            def take(answer: beginnings.Answer, value: tuple[float, bool]) -> None:
                self.work.asked += len(answer.places) * answer.end
                for place in answer.places:
                    found[place] = value
                    if text(place) is not None:
                        self.cache_hook.add_partial("loglikelihood", text(place), value)

            keys, rest = {}, rows
            if self.kept is not None:
                keys = {id(a): _key(r.tokens[: a.end], a.tokens) for r in rows for a in r.answers}
                rest = []
                for row in rows:
                    known = [self.kept.get(keys[id(answer)]) for answer in row.answers]
                    if None in known:
                        rest.append(row)
                        continue
                    for answer, value in zip(row.answers, known, strict=True):
                        take(answer, (value[0], value[1]))
            for part in scoring.answers(self.passes, rest, self.budget, self.share):
                if self.kept is not None:
                    self.kept.add({keys[id(answer)]: value for answer, value in part})
                for answer, value in part:
                    take(answer, value)
            return [found[place] for place in range(count)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            alike: dict[str, list[int]] = {}
            for place, request in enumerate(requests):
                alike.setdefault(repr(request.args[1]), []).append(place)
            found: dict[int, str] = {}
            for places in alike.values():
                some = [requests[place] for place in places]
                settings = normalize_gen_kwargs(
                    copy.deepcopy(some[0].args[1]), default_max_gen_toks=self.max_gen_toks
                )
                texts = [request.args[0] for request in some]
                ours = self.share and all(texts) and stock(self.model)
                if ours and plain(_model(settings), self._own()):
                    said = self._continued(texts, some[0].args[1], settings)
                else:
                    said = super().generate_until(some, disable_tqdm=True)
                found |= dict(zip(places, said, strict=True))
            return [found[place] for place in range(len(requests))]

        def _own(self) -> Any:
            return self.model.generation_config

        def _continued(
            self, texts: list[str], given: Mapping[str, Any], settings: dict[str, Any]
        ) -> list[str]:
            """Return the likeliest continuations of prompts, token by token."""
            eos = settings.get("eos_token_id", self._own().eos_token_id)
            ids = () if eos is None else tuple(np.atleast_1d(eos).tolist())
            stops = handle_stop_sequences(
                settings.get("until"), eos=self.tok_decode(self.eot_token_id, False)
            )
            length = settings["max_gen_toks"]

            def made() -> list[beginnings.Row]:
                most = self.max_length - length
                return beginnings.prompts(
                    [
                        self.tok_batch_encode(
                            [text], left_truncate_len=most, truncation=self.truncation
                        )[0][0].tolist()
                        for text in texts
                    ]
                )

            rows = self._once("prompts", tuple(texts), length, made=made)
            found: dict[int, str] = {}

            def take(row: beginnings.Row, said: str, tokens: int, near: int) -> None:
                self.work.asked += len(row.places) * (len(row) + tokens - 1)
                self.work.texts += len(row.places)
                self.work.near += len(row.places) * (near > 0)
                for place in row.places:
                    found[place] = said
                    self.cache_hook.add_partial("generate_until", (texts[place], given), said)

            keys, rest = {}, rows
            if self.kept is not None:
                keys = {id(row): _key(row.tokens, repr(settings)) for row in rows}
                known = [(row, self.kept.get(keys[id(row)])) for row in rows]
                rest = [row for row, value in known if value is None]
                for row, value in known:
                    if value is not None:
                        take(row, *value)
            whole = settings.get("max_length")

            def room(row: beginnings.Row) -> int:
                return self._room(whole or len(row) + length, len(row))

            endings = self._endings(tuple(text for text in stops if text), ids)
            for part in greedy.continued(self.passes, rest, room, endings, self.budget):
                said = {
                    id(text.row): (self._said(text.tokens, stops), len(text.tokens), text.near)
                    for text in part
                }
                if self.kept is not None:
                    self.kept.add({keys[row]: list(value) for row, value in said.items()})
                for text in part:
                    take(text.row, *said[id(text.row)])
            return [found[place] for place in range(len(texts))]

        def _said(self, tokens: list[int], stops: list[str]) -> str:
            """Return generated tokens as lm-eval gives them to a task."""
            end = self.think_end_token
            if isinstance(end, int) and end in tokens:
                tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
            text = self.tok_decode(tokens)
            return str(
                postprocess_generated_text(
                    generation=text.lstrip() if isinstance(end, int) else text,
                    stop=stops,
                    think_end_token=end if isinstance(end, str) else None,
                )
            )

    return InMemory


def _model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation settings that are the model's and not lm-eval's."""
    return {
        name: value for name, value in settings.items() if name not in ("until", "max_gen_toks")
    }


def _key(tokens: beginnings.Tokens, also: beginnings.Tokens | str) -> str:
    """Return what a request is known by among those that are kept."""
    more = also.encode() if isinstance(also, str) else also.tobytes()
    return hashlib.sha256(tokens.tobytes() + b"|" + more).hexdigest()[:32]
