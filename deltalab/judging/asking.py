"""Asking an endpoint for verdicts: by several threads, within a budget, each kept as it comes."""

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from deltalab.judging.comparisons import Messages, verdict
from deltalab.judging.endpoint import Client, Refused, Stopped
from deltalab.judging.kept import Verdicts
from deltalab.terminal.console import steps

log = logging.getLogger(__name__)
CHARACTERS_PER_TOKEN = 4.0
"""Of English text, for the estimate; what was really used is counted by the endpoint."""
MOST_REFUSALS = 5
"""So many prompts refused before the first is answered, and the request itself must be wrong."""


@dataclass(frozen=True)
class Terms:
    """How much may be asked, how often, and at what price; see `judges.Endpoint`."""

    concurrency: int
    attempts: int
    ask_again: bool
    price_in: float | None
    price_out: float | None
    max_cost: float | None

    def cost(self, tokens_in: float, tokens_out: float) -> float | None:
        """Return dollars, or None without prices.

        >>> Terms(1, 1, False, 10.0, 30.0, None).cost(1e6, 1e5)
        13.0
        """
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def over(self, cost: float | None) -> bool:
        """Whether a cost is more than allowed."""
        return cost is not None and self.max_cost is not None and cost > self.max_cost


@dataclass(eq=False)
class Round:
    """One evaluation's requests: what is not kept yet, and what asking for it cost.

    Args:
        client: makes the requests.
        request: the fields that all requests share, `model` and `max_tokens` among them.
        verdicts: where answers are kept.
        terms: the bounds.
    """

    client: Client
    request: Mapping[str, Any]
    verdicts: Verdicts
    terms: Terms
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answers(self, prompts: Sequence[Messages]) -> list[float | None]:
        """Return the verdict on every prompt, asking for those that are not kept.

        Raises:
            ValueError: the endpoint refuses the request, the budget does not suffice, or not one
                answer could be used.
            OSError: the endpoint cannot be reached. In both cases what was answered is kept.
        """
        keys = [self.verdicts.key(prompt) for prompt in prompts]
        for key in dict.fromkeys(keys):
            held = self.verdicts.read(key)
            if held is not None and not (self.terms.ask_again and held["first"] is None):
                self.found[key] = held
        left = {k: p for k, p in zip(keys, prompts, strict=True) if k not in self.found}
        if left:
            self._announce(len(set(keys)), left)
            self._ask(left)
        verdicts = [self.found.get(key, {"first": None})["first"] for key in keys]
        if prompts and all(first is None for first in verdicts):
            reason = self.refused[0] if self.refused else "every answer was nonsense"
            raise ValueError(f"judge {self.request.get('model')}: no usable verdict; {reason}")
        return verdicts

    def _announce(self, total: int, left: Mapping[str, Messages]) -> None:
        """Say what asking will cost, and refuse where that is more than allowed."""
        characters = sum(len(m["content"]) for prompt in left.values() for m in prompt)
        tokens = characters / CHARACTERS_PER_TOKEN
        most = len(left) * int(self.request.get("max_tokens", 1))
        cost = self.terms.cost(tokens, most)
        log.warning(
            "judge %s: asking for %d of %d verdicts, about %s tokens in and at most %s out%s",
            self.request.get("model"), len(left), total, f"{tokens:,.0f}", f"{most:,}",
            _dollars(cost),
        )  # fmt: skip
        if self.terms.over(cost):
            raise ValueError(
                f"evaluator.judge.max_cost={self.terms.max_cost:g}: {len(left)} verdicts would cost"
                f" about ${cost:.2f}"
            )

    def _ask(self, left: Mapping[str, Messages]) -> None:
        futures: list[Future[None]] = []
        with (
            steps("verdicts", len(left)) as step,
            ThreadPoolExecutor(self.terms.concurrency) as pool,
        ):
            try:
                futures += [pool.submit(self._one, key, prompt) for key, prompt in left.items()]
                for future in futures:
                    future.add_done_callback(lambda _: step())
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # an interrupt too: what is under way ends, nothing new begins
                if any(not future.done() for future in futures):
                    self.client.stop.set()
                pool.shutdown(cancel_futures=True)
                self._report()
        failures = [f.exception() for f in futures if not f.cancelled()]
        for failure in sorted(filter(None, failures), key=lambda e: isinstance(e, Stopped)):
            raise failure

    def _one(self, key: str, prompt: Messages) -> None:
        """Ask for one verdict and keep it; a failure stops the others."""
        try:
            self._until_sense(key, prompt)
        except Refused as refusal:
            with self.lock:
                self.refused.append(str(refusal))
                hopeless = len(self.refused) >= MOST_REFUSALS and not self.found
            if hopeless:
                self.client.stop.set()
                raise
        except BaseException:
            self.client.stop.set()
            raise

    def _until_sense(self, key: str, prompt: Messages) -> None:
        for attempt in range(1, self.terms.attempts + 1):
            answer = self.client.complete({**self.request, "messages": prompt})
            choice = answer["choices"][0]
            first, spent = verdict(choice), _usage(answer.get("usage"))
            if first is not None or attempt == self.terms.attempts:
                held = {"first": first, "answer": self._said(choice), "attempts": attempt}
                self.verdicts.write(key, held | {"usage": spent})
                with self.lock:
                    self.found[key] = held
            with self.lock:
                self.tokens_in += spent[0]
                self.tokens_out += spent[1]
                cost = self.terms.cost(self.tokens_in, self.tokens_out)
            if self.terms.over(cost):
                raise ValueError(
                    f"evaluator.judge.max_cost={self.terms.max_cost:g}: used up, ${cost:.2f} spent"
                )
            if key in self.found:
                return

    def _said(self, choice: Mapping[str, Any]) -> str | None:
        message = choice.get("message")
        text = message.get("content") if isinstance(message, Mapping) else None
        return self.client.clean(text)[:200] if isinstance(text, str) else None

    def _report(self) -> None:
        nonsense = sum(held["first"] is None for held in self.found.values())
        cost = self.terms.cost(self.tokens_in, self.tokens_out)
        log.warning(
            "judge %s: %d verdicts, %d answers without sense, %d prompts refused; %s tokens in,"
            " %s out%s", self.request.get("model"), len(self.found) - nonsense, nonsense,
            len(self.refused), f"{self.tokens_in:,}", f"{self.tokens_out:,}", _dollars(cost),
        )  # fmt: skip


def _usage(usage: Any) -> list[int]:
    """Return the tokens asked and answered, as the endpoint counts them; 0 where it does not."""
    names = ("prompt_tokens", "completion_tokens")
    given = [usage.get(name) if isinstance(usage, Mapping) else 0 for name in names]
    return [n if isinstance(n, int) and n > 0 else 0 for n in given]


def _dollars(cost: float | None) -> str:
    return "" if cost is None else f", ${cost:.2f}"
