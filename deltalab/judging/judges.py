"""Judges: which of two outputs to one instruction is the better one.

A judge is a frozen dataclass whose `open(pair, prompts, directory)` gives a function from the
module under evaluation and comparisons to preferences in [0, 1] for the module's outputs, NaN where
there is no verdict. Verdicts are kept below the directory as they come.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from deltalab.data.text import Encoder
from deltalab.judging import local_judge
from deltalab.judging.asking import Round, Terms
from deltalab.judging.comparisons import Comparison, Messages, how_to_ask
from deltalab.judging.difficulties import Array
from deltalab.judging.endpoint import Client, address
from deltalab.judging.kept import Verdicts
from deltalab.judging.likelihood import Said, log_likelihoods
from deltalab.judging.prompts import Prompts
from deltalab.weights.mapping import ModelPair, loaded

Judge = Callable[[nn.Module, Sequence[Comparison]], Array]
log = logging.getLogger(__name__)
OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint, asked as AlpacaEval 2's `weighted_alpaca_eval_gpt4_turbo`.

    The address is `url`, else DELTALAB_JUDGE_URL, else OPENAI_BASE_URL, else OpenAI's. A key goes
    to its own address alone: DELTALAB_JUDGE_KEY to DELTALAB_JUDGE_URL (where that is not set, to
    the one after it), OPENAI_API_KEY to OPENAI_BASE_URL or OpenAI's.

    Args:
        model: the judge's name at the endpoint.
        url: its base address, `https://host/v1`.
        template: a file with the prompt; None takes deltalab's own.
        order: `random` or `both`, see `Asking`.
        seed: of the order.
        logprobs: ask for log-probabilities; without them every verdict is 0 or 1.
        max_tokens: of the answer.
        temperature: None is 1 with log-probabilities, which it does not change, and 0 without.
        options: further fields of the request, for instance `{max_completion_tokens: 300}`; null
            removes a field.
        concurrency: requests at once.
        timeout: seconds a request.
        retries: of a request that failed for a while.
        backoff: seconds before the first retry.
        longest_wait: the longest wait in seconds before a retry.
        attempts: how often a nonsense answer is asked for anew before it counts as missing.
        ask_again: ask anew what an earlier run found missing.
        price_in: of a million tokens asked, in dollars.
        price_out: of a million tokens answered.
        max_cost: dollars that one evaluation may cost; needs the prices.
    """

    model: str
    url: str | None = None
    template: str | None = None
    order: str = "random"
    seed: int = 0
    logprobs: bool = True
    max_tokens: int = 1
    temperature: float | None = None
    options: str | Mapping[str, Any] | None = None
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    backoff: float = 1.0
    longest_wait: float = 120.0
    attempts: int = 3
    ask_again: bool = False
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    contents: ClassVar = {"template": "file"}
    beside: ClassVar[tuple[str, ...]] = (
        "concurrency", "timeout", "retries", "backoff", "longest_wait", "ask_again",
        "price_in", "price_out", "max_cost",
    )  # fmt: skip

    def __post_init__(self) -> None:
        where = "evaluator.judge"
        how_to_ask(None, self.order, self.seed)
        for name, least in (("max_tokens", 1), ("concurrency", 1), ("retries", 0), ("attempts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{where}.{name}={getattr(self, name)}: must be at least {least}")
        for name in ("timeout", "backoff", "longest_wait"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{where}.{name}={getattr(self, name)}: must be above 0")
        if self.url is not None:
            address(self.url, f"{where}.url")
        if not self.model:
            raise ValueError(f"{where}.model=: name the judge, or set DELTALAB_JUDGE_MODEL")
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise ValueError(f"{where}.max_cost={self.max_cost}: needs price_in and price_out")
        if isinstance(self.options, Mapping):  # frozen: a spec is a key of the caches
            object.__setattr__(self, "options", json.dumps(dict(self.options), sort_keys=True))

    def open(self, pair: ModelPair, prompts: Prompts, directory: Path) -> Judge:
        """Return the judge; nothing is asked yet.

        Raises:
            ValueError: the key is missing, or an address or the template is wrong.
        """
        ask = how_to_ask(self.template, self.order, self.seed)
        url, key = self._place()
        request = self._request()
        verdicts = Verdicts(directory / "verdicts", request)
        prices = (self.price_in, self.price_out, self.max_cost)
        terms = Terms(self.concurrency, self.attempts, self.ask_again, *prices)

        def judge(module: nn.Module, comparisons: Sequence[Comparison]) -> Array:
            client = Client(url, key, self.timeout, self.retries, self.backoff, self.longest_wait)
            return ask.preferences(comparisons, Round(client, request, verdicts, terms).answers)

        return judge

    def _request(self) -> dict[str, Any]:
        """Return the fields of a request that are the same for all prompts."""
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if self.logprobs else 0.0
        fields: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens}
        fields |= {"temperature": temperature}
        if self.logprobs:
            fields |= {"logprobs": True, "top_logprobs": 5}
        options = json.loads(self.options) if isinstance(self.options, str) else {}
        if not isinstance(options, dict) or "messages" in options or "stream" in options:
            raise ValueError(
                f"evaluator.judge.options={self.options}: must be fields of a request other than"
                " messages and stream"
            )
        return {k: v for k, v in {**fields, **options}.items() if v is not None}

    def _place(self) -> tuple[str, str]:
        """Return the address and the key that belongs to it, which may be empty.

        A config may come from elsewhere: an address that it names gets a key only where the
        person's environment names the same address for that key.
        """
        own, openai = (
            os.environ.get(f"{n}_KEY", "").strip() for n in ("DELTALAB_JUDGE", "OPENAI_API")
        )
        theirs = address(os.environ.get("OPENAI_BASE_URL") or OPENAI, "OPENAI_BASE_URL")
        ours = address(os.environ.get("DELTALAB_JUDGE_URL") or theirs, "DELTALAB_JUDGE_URL")
        chosen = ours if self.url is None else address(self.url, "evaluator.judge.url")
        key = (own if chosen == ours else "") or (openai if chosen == theirs else "")
        if not key and chosen == OPENAI:
            raise ValueError(
                "evaluator.judge: no key for OpenAI's endpoint; set OPENAI_API_KEY, or"
                " DELTALAB_JUDGE_URL (or evaluator.judge.url) for an endpoint of your own"
            )
        if own and not key:
            log.warning(
                "evaluator.judge.url=%s: DELTALAB_JUDGE_KEY is not sent to an address that only a"
                " config names; DELTALAB_JUDGE_URL makes it that address's key",
                chosen,
            )
        return chosen, key


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model of transformers, asked for the probabilities of its next token.

    Args:
        path: a directory, or a hub id.
        template: a file with the prompt; None takes deltalab's own.
        order: `random` or `both`, see `Asking`.
        seed: of the order.
        device: `cpu`, `cuda`, ...; `auto` takes a GPU where there is one.
        dtype: the dtype in which it runs.
        batch_size: prompts at once; changes nothing beyond rounding.
    """

    path: str
    template: str | None = None
    order: str = "random"
    seed: int = 0
    device: str = "auto"
    dtype: str = "bfloat16"
    batch_size: int = 8
    contents: ClassVar = {"path": "model", "template": "file"}

    def __post_init__(self) -> None:
        how_to_ask(None, self.order, self.seed)
        _check_model(self.batch_size, self.dtype)

    def open(self, pair: ModelPair, prompts: Prompts, directory: Path) -> Judge:
        """Return the judge, its model opened.

        Raises:
            ValueError: the model or the template cannot be used.
        """
        ask = how_to_ask(self.template, self.order, self.seed)
        model, encoder = local_judge.open_model(self.path, self.device, self.dtype)
        local_judge.letters(encoder.tokenizer)
        verdicts = Verdicts(
            directory / "verdicts", {**local_judge.identity(self.path), "dtype": self.dtype}
        )

        def answers(asked: Sequence[Messages]) -> list[float | None]:
            keys = [verdicts.key(prompt) for prompt in asked]
            found = {key: verdicts.read(key) for key in keys}
            left = [(k, p) for k, p in zip(keys, asked, strict=True) if found[k] is None]
            for start in range(0, len(left), self.batch_size):
                batch = left[start : start + self.batch_size]
                firsts = local_judge.first_shares(model, encoder, [p for _, p in batch])
                for (key, _), first in zip(batch, firsts, strict=True):
                    found[key] = {"first": first}
                    if first is not None:
                        verdicts.write(key, {"first": first})
            return [(found[key] or {})["first"] for key in keys]

        return lambda module, comparisons: ask.preferences(comparisons, answers)


@dataclass(frozen=True)
class Likelihood:
    """A reward by likelihood: no judge's opinion, but cheap, offline and without order.

    preference = sigmoid(scale (r(output) - r(reference))) with r(y) = log p_post(y | x) -
    log p_pre(y | x) of the pair, DPO's implicit reward (Rafailov et al., arXiv 2305.18290,
    equation 5), or log p(y | x) of a named model.

    Args:
        path: a directory or hub id of the model that scores; None takes the pair's two ends.
        scale: of the reward's difference, in 1 / nats.
        per_token: divide an output's log-probability by its number of tokens.
        device: of the named model.
        dtype: of the named model.
        batch_size: outputs at once; changes nothing beyond rounding.
    """

    path: str | None = None
    scale: float = 1.0
    per_token: bool = True
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 8
    contents: ClassVar = {"path": "model"}

    def __post_init__(self) -> None:
        _check_model(self.batch_size, self.dtype)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"evaluator.judge.scale={self.scale}: must be above 0")

    def open(self, pair: ModelPair, prompts: Prompts, directory: Path) -> Judge:
        """Return the judge."""
        known: dict[Said, float] = {}

        def rewards(module: nn.Module, said: Sequence[Said]) -> list[float]:
            left = [one for one in dict.fromkeys(said) if one not in known]
            if left:
                known.update(zip(left, self._rewards(pair, prompts, module, left), strict=True))
            return [known[one] for one in said]

        def judge(module: nn.Module, comparisons: Sequence[Comparison]) -> Array:
            ours = [(c.instruction, c.output) for c in comparisons]
            theirs = [(c.instruction, c.reference) for c in comparisons]
            values = np.array(rewards(module, [*ours, *theirs])).reshape(2, -1)
            differences = torch.from_numpy(values[0] - values[1])
            preferences: Array = torch.sigmoid(self.scale * differences).numpy()
            return preferences

        return judge

    def _rewards(
        self, pair: ModelPair, prompts: Prompts, module: nn.Module, said: Sequence[Said]
    ) -> list[float]:
        def score(model: nn.Module, encoder: Encoder, how: Prompts) -> list[float]:
            return log_likelihoods(model, encoder, how, said, self.per_token, self.batch_size)

        if self.path is not None:
            model, encoder = local_judge.open_model(self.path, self.device, self.dtype)
            return score(model, encoder, Prompts(prompts.template, None))
        held = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with loaded(module, pair.post, restore=held):
            post = score(module, pair.transform, prompts)
        with loaded(module, pair.pre, restore=held):
            pre = score(module, pair.transform, prompts)
        return [a - b for a, b in zip(post, pre, strict=True)]


def _check_model(batch_size: int, dtype: str) -> None:
    if batch_size < 1:
        raise ValueError(f"evaluator.judge.batch_size={batch_size}: must be at least 1")
    if dtype not in (names := ("float32", "bfloat16", "float16", "float64")):
        raise ValueError(f"evaluator.judge.dtype={dtype}: must be one of {', '.join(names)}")
