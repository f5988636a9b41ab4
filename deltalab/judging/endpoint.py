"""Chat completions of an OpenAI-compatible endpoint, by the standard library's HTTP client.

What fails for a while is tried again, with delays that double, or that the server names; all
threads wait together where the server asks for fewer requests. The key is in no message.
"""

import contextlib
import email.utils
import http.client
import json
import math
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltalab.store.records import redacted, secret_in
from deltalab.weights.headers import plain

FOR_A_WHILE = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
OF_THE_PROMPT = (400, 413, 422)
FIRST_CONTACT = 2
"""How often connecting is tried again where the endpoint has never answered."""
MOST_BYTES = 4 << 20


class Refused(ValueError):
    """The endpoint refuses one prompt, for instance as too long; others may pass."""


class Stopped(Exception):
    """Another thread failed: this request need not be made."""


@dataclass(eq=False)
class Client:
    """A connection to `<url>/chat/completions`.

    Args:
        url: the endpoint's base, `https://host/v1`.
        key: sent as a bearer token; empty sends none.
        timeout: seconds until a request without a full answer is given up.
        retries: how often a failed request is tried again.
        backoff: seconds before the first retry; doubles each time.
        longest_wait: seconds that a wait may take at most, also where the server names a longer.
    """

    url: str
    key: str = field(repr=False)
    timeout: float
    retries: int
    backoff: float
    longest_wait: float
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._not_before = 0.0
        self._reached = False

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request, which has at least one choice.

        Raises:
            Refused: the endpoint refuses this prompt, or it holds a secret of the environment.
            ValueError: key, model or address are wrong, the quota is used up, or the request's
                fields hold a secret.
            OSError: the endpoint cannot be reached, or keeps failing.
            Stopped: another thread gave up meanwhile.
        """
        self._check(body)
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            self._wait(self._not_before - time.monotonic())
            delay = min(self.backoff * 2**attempt, self.longest_wait) * random.uniform(0.5, 1)
            try:
                return self._once(data)
            except urllib.error.HTTPError as error:
                self._reached = True
                trouble = self._judge(error)
                asked = _retry_after(error.headers)
                if asked is not None:
                    if asked > self.longest_wait:
                        raise OSError(
                            f"{self._name()}: {trouble}; asks to wait {asked:.0f} s, more than"
                            f" evaluator.judge.longest_wait={self.longest_wait:g}: run again then"
                        ) from None
                    self._not_before = max(self._not_before, time.monotonic() + asked)
            except (OSError, http.client.HTTPException, _NoCompletion) as error:
                trouble = self._plain(str(getattr(error, "reason", error)) or type(error).__name__)
                if not self._reached and attempt >= FIRST_CONTACT:
                    break
            if attempt < self.retries:
                self._wait(delay)
        raise OSError(f"{self._name()}: no answer after {attempt + 1} tries ({trouble})")

    def _check(self, body: Mapping[str, Any]) -> None:
        """Let no secret of the environment leave in a body: a key belongs into its header."""
        fields = json.loads(json.dumps({k: v for k, v in body.items() if k != "messages"}))
        for kind, part in ((ValueError, fields), (Refused, body.get("messages"))):
            if name := secret_in(part):
                raise kind(f"{self._name()}: a request would hold what {name} holds; not sent")

    def _once(self, data: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "deltalab"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers)
        end = time.monotonic() + self.timeout
        text = b""
        with self._open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 16):
                text += part
                if time.monotonic() > end or len(text) > MOST_BYTES:
                    raise TimeoutError("the answer does not end")
            if response.length:
                raise http.client.IncompleteRead(text, response.length)
        try:
            answer = json.loads(text)
            if not isinstance(answer["choices"][0], dict):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _NoCompletion("an answer that is no chat completion") from None
        self._reached = True
        found: dict[str, Any] = answer
        return found

    def _judge(self, error: urllib.error.HTTPError) -> str:
        """Return what happened, where a later try may do better; raise where none will."""
        body = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = error.read(1 << 16).decode(errors="replace")
        error.close()
        trouble = f"HTTP {error.code} {self._plain(_message(body))}".strip()
        if error.code in OF_THE_PROMPT:
            raise Refused(f"{self._name()}: {trouble}") from None
        if error.code in FOR_A_WHILE and "insufficient_quota" not in body:
            return trouble
        hint = {
            401: "; is DELTALAB_JUDGE_KEY (or OPENAI_API_KEY) right?",
            403: "; may this key use this model?",
            404: "; are evaluator.judge.url and evaluator.judge.model right?",
        }.get(error.code, "")
        raise ValueError(f"{self._name()}: {trouble}{hint}") from None

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, min(seconds, self.longest_wait))):
            raise Stopped

    def _name(self) -> str:
        return f"judge at {self.url}"

    def _plain(self, text: str) -> str:
        """Return a server's text in one short line without the key."""
        return self.clean(plain(text))[:200]

    def clean(self, text: str) -> str:
        """Return a text without the key and the environment's other secrets."""
        text = text.replace(self.key, "***") if self.key else text
        return str(redacted(text))


class _NoCompletion(Exception):
    """An answer came, of another kind than asked for: a proxy's page, or half of one."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to where nobody named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return no request."""


def _message(body: str) -> str:
    """Return the message in an error's body, or its beginning."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return body.strip()[:200]


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait: a number, or a date."""
    value = headers.get("Retry-After") if headers else None
    if not value:
        return None
    try:
        seconds = float(value)
        return None if math.isnan(seconds) else max(0.0, seconds)
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def address(url: str, setting: str) -> str:
    """Return a base address without its last slash.

    Raises:
        ValueError: no http or https address, or one that holds a password or a secret.

    >>> address("http://localhost:8000/v1/", "judge.url")
    'http://localhost:8000/v1'
    """
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, good = None, False
    if parts is not None and "@" in parts.netloc:
        raise ValueError(f"{setting}: must not hold a user or password; DELTALAB_JUDGE_KEY may")
    if name := secret_in(url):
        raise ValueError(f"{setting}: must not hold what {name} holds")
    if not good or parts is None or parts.query or parts.fragment:
        raise ValueError(f"{setting}={plain(url)}: must be an address as https://host/v1")
    return url.rstrip("/").removesuffix("/chat/completions")
