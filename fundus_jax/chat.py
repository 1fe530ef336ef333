"""One client for any server that speaks OpenAI's chat protocol: answers checked against a schema, or an error
that says of what kind it is.

    chat = Chat(ChatConfig(address="http://127.0.0.1:8000/v1", model="judge"), "judge.server")
    async with chat:
        answers = await chat.ask([{"role": "user", "content": "..."}], Answer, n=5)

`Answer` is a pydantic model; its JSON schema goes out as `response_format`, and what comes back is validated
by it. Nothing is guessed and nothing has a default: each of the n answers is an `Answer` or a `ChatError`.

What is tried again (with jitter, and not before Retry-After): a server that is busy, fails, or is not there.
The first two use up the call's own `deadline`. A server that is not there opens the breaker: one call at a
time looks whether it is back, the others wait, up to `patience`. Never tried again: a request that the server
rejects, a refusal, an answer that is cut off or does not match. What only the user can mend (a wrong key, no
such model, a redirect) is a ConfigError.

The connections belong to one event loop, `async with` by `async with`; breaker and budget last as long as the
object. Neighbours: `grpo/judge_server.py`, and the pipeline's votes.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import openai
import pydantic
import tenacity
from absl import logging

from fundus_jax.records import ConfigError

Model = TypeVar("Model", bound=pydantic.BaseModel)

RETRIED = ("unreachable", "busy", "timeout", "failed")
KINDS = (*RETRIED, "rejected", "refused", "filtered", "truncated", "malformed", "down", "budget")
BACKOFF = tenacity.wait_random_exponential(multiplier=0.5, max=20)  # seconds
CONNECT = 10.0  # seconds after which a host that says nothing is not there
PROBES = (0.5, 15.0)  # seconds from one look for a lost server to the next: the first; doubling up to these
POLL, TELL = 0.05, 30.0  # seconds: how often a waiting call looks, and how often the log says that one waits
SHOWN = 200  # characters of a server's own words in an error


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """A server, and how long and how hard to try.

    address: up to and with the /v1; "" takes FUNDUS_SERVER of the environment, for one that moves between
    restarts. model: the name it is served under. key: the environment variable that holds the API key, "" for
    none. concurrency: calls under way at a time. timeout: seconds for one request. deadline: for one call,
    its tries and pauses together, the wait for a lost server apart. tries: how often a server may take a
    request and fail. breaker: after so many failures in a row the server counts as lost. patience: seconds to
    wait for a lost one; 0 fails at once. budget_requests, budget_tokens: what all calls of one process may
    use together (0: no bound); what is under way when a bound is reached still counts on top.
    """

    address: str = ""
    model: str = ""
    key: str = ""
    concurrency: int = 16
    timeout: float = 60.0
    deadline: float = 180.0
    tries: int = 3
    breaker: int = 5
    patience: float = 1800.0
    budget_requests: int = 0
    budget_tokens: int = 0

    def validate(self, where: str) -> None:
        """Raises ConfigError that names the field, its value, what is allowed and what to do."""
        for name in ("concurrency", "tries", "breaker", "timeout", "deadline"):
            _require(getattr(self, name) > 0, where, name, getattr(self, name), "must be above 0")
        for name in ("patience", "budget_requests", "budget_tokens"):
            _require(getattr(self, name) >= 0, where, name, getattr(self, name), "must be at least 0")
        _require(self.deadline >= self.timeout, where, "deadline", self.deadline, "must be at least timeout")
        _require(bool(self.model), where, "model", self.model, "must be the name that the server serves")

    def url(self, where: str) -> str:
        """The address that is used. Raises ConfigError unless it is http(s), and holds no password."""
        text = self.address or os.environ.get("FUNDUS_SERVER", "")
        parts = urlsplit(text)
        plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        remedy = "must be like http://HOST:8000/v1 (or be set in FUNDUS_SERVER)"
        _require("@" not in parts.netloc, where, "address", "...@...", "must hold no password: use `key`")
        _require(bool(plain), where, "address", text, remedy)
        return text

    def secret(self, where: str) -> str:
        """The API key. Raises ConfigError when the variable that `key` names is not set."""
        if not self.key:
            return "none"  # and never OPENAI_API_KEY, which is not this server's business
        _require(bool(os.environ.get(self.key)), where, "key", self.key, "must name a variable that is set")
        return os.environ[self.key]


class ChatError(Exception):
    """No answer. `kind` is one of KINDS; `retry_after`: seconds that the server asks to be left alone."""

    def __init__(self, kind: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.retry_after = kind, retry_after


class Breaker:
    """Whether the server is there. Open: it was lost `limit` times in a row, and is waited for."""

    def __init__(self, name: str, limit: int, patience: float) -> None:
        self.name, self.limit, self.patience = name, limit, patience
        self.failures, self.since = 0, 0.0  # since: when it opened, 0 while it is closed
        self._pause, self._probe_at, self._probing, self._told = 0.0, 0.0, False, 0.0

    @property
    def open(self) -> bool:
        """Whether the server counts as lost."""
        return self.since > 0

    async def enter(self) -> bool:
        """Return when a request may be sent: the server is there (False), or it is this call's turn to look
        whether it is back (True).

        Raises ChatError "down" when it has been lost for `patience` seconds.
        """
        while self.open:
            now = time.monotonic()
            if not self._probing and now >= self._probe_at:
                self._probing = True
                return True
            if now - self.since >= self.patience:
                raise ChatError("down", f"{self.name} has been lost for {now - self.since:.0f} s")
            if now - self._told >= TELL:
                self._told = now
                left = self.patience - (now - self.since)
                logging.warning("%s is not there; waiting for it, %.0f s more", self.name, left)
            await asyncio.sleep(POLL)
        return False

    def leave(self, probe: bool, lost: bool | None, retry_after: float = 0.0) -> None:
        """Note how a request ended, for which `enter` gave `probe`: the server was lost, was there, or (None)
        nobody knows."""
        now = time.monotonic()
        if probe:
            self._probing = False
        if lost is False:
            if self.open:
                logging.info("%s is back after %.0f s", self.name, now - self.since)
            self.failures, self.since = 0, 0.0
        elif lost:
            self.failures += 1
            if not self.open and self.failures >= self.limit:
                self.since, self._pause, self._probe_at, self._told = now, PROBES[0], now + PROBES[0], 0.0
            elif self.open and probe:
                self._pause = min(2 * self._pause, PROBES[1])
                self._probe_at = now + self._pause
            self._probe_at = max(self._probe_at, now + retry_after)


class Memory(Protocol):
    """Answers that need not be paid for twice. A request is its JSON body, an answer a text."""

    def take(self, request: object) -> str | None:
        """An answer to this very request that was not taken yet, or None."""
        ...

    def keep(self, request: object, answer: str) -> None:
        """Hold the answer that the server gave."""
        ...


class Chat:
    """A client of the server of `config`; `where` is what errors call that part of the configuration.

    Attributes:
        counts: requests, retries, prompt_tokens and answer_tokens so far.

    Raises ConfigError for an address or key that can not be used.
    """

    def __init__(self, config: ChatConfig, where: str) -> None:
        config.validate(where)
        self.config, self.where = config, where
        self.address, self._key = config.url(where), config.secret(where)
        self.breaker = Breaker(f"{where} at {self.address}", config.breaker, config.patience)
        self.counts: Counter[str] = Counter()
        self._memory: Memory | None = None

    def remembering(self, memory: Memory) -> Chat:
        """This client, which asks the server for nothing that `memory` has the answer to."""
        other = copy.copy(self)  # connections, breaker and counts are those of this one
        other._memory = memory
        return other

    async def __aenter__(self) -> Chat:
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=self.address,
            api_key=self._key,
            max_retries=0,
            timeout=openai.Timeout(None, connect=CONNECT),  # asyncio's bounds a request, this one each read
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        schema: type[Model],
        *,
        n: int = 1,
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Model | ChatError]:
        """n answers to one conversation, sampled in one request; each is a `schema`, or why it is none.

        Raises ChatError where there is no answer at all, ConfigError for what only the user can mend.
        """
        described = {"name": schema.__name__, "schema": schema.model_json_schema(), "strict": True}
        body = {
            "model": self.config.model,
            "messages": list(messages),
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "response_format": {"type": "json_schema", "json_schema": described},
            **({} if seed is None else {"seed": seed}),
        }
        known = self._memory.take(body) if self._memory else None
        if known is not None:
            completion = _Completion.model_validate_json(known)
        else:
            async with self._slots:
                completion = await self._persist(body)
            if self._memory:
                self._memory.keep(body, completion.model_dump_json())
        if len(completion.choices) != n:
            raise ChatError("malformed", f"{len(completion.choices)} answers where {n} were asked for")
        return [_read(choice, schema) for choice in completion.choices]

    async def _persist(self, body: dict[str, Any]) -> _Completion:
        """The answer to a request, tried as often as the configuration allows."""
        spent, failed, began = 0.0, 0, 0.0

        def gives_up(state: tenacity.RetryCallState) -> bool:
            nonlocal spent, failed
            error = _error(state)
            if error.kind == "unreachable" and self.breaker.open:
                return False  # `enter` waits, or ends it
            failed += error.kind in ("timeout", "failed")
            spent += time.monotonic() - began + state.upcoming_sleep
            return failed >= self.config.tries or spent >= self.config.deadline

        def pause(state: tenacity.RetryCallState) -> float:
            if self.breaker.open:
                return 0.0
            after = _error(state).retry_after
            return after + random.uniform(0, 1) if after else BACKOFF(state)  # noqa: S311 - jitter

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, ChatError) and e.kind in RETRIED),
            wait=pause,
            stop=gives_up,
            reraise=True,
        )
        async for attempt in tries:
            with attempt:
                probe = await self.breaker.enter()
                began = time.monotonic()
                self.counts["retries"] += attempt.retry_state.attempt_number > 1
                return await self._send(body, min(self.config.timeout, self.config.deadline - spent), probe)
        raise AssertionError("tenacity ends with an answer or an error")

    async def _send(self, body: dict[str, Any], timeout: float, probe: bool) -> _Completion:
        """One request. Raises ChatError; tells the breaker how it went."""
        lost: bool | None = None
        after = 0.0
        try:
            self._check_budget()
            self.counts["requests"] += 1
            async with asyncio.timeout(timeout):
                raw = await self._client.chat.completions.with_raw_response.create(**body)
            lost = False
        except TimeoutError:
            lost = True
            raise ChatError("timeout", f"no answer within {timeout:.3g} s") from None
        except openai.APIConnectionError as error:
            lost = True
            kind = "unreachable" if type(error.__cause__).__name__.startswith("Connect") else "failed"
            raise ChatError(kind, self._clean(str(error.__cause__ or error))) from None
        except openai.APIStatusError as error:
            after, lost = _retry_after(error.response.headers), error.status_code >= 500
            raise self._status(error, after) from None
        finally:
            self.breaker.leave(probe, lost, after)
        try:
            completion = _Completion.model_validate_json(raw.content)
        except pydantic.ValidationError as error:
            raise ChatError("malformed", f"not a chat completion: {_first(error)}") from None
        if completion.usage is not None:
            self.counts["prompt_tokens"] += completion.usage.prompt_tokens
            self.counts["answer_tokens"] += completion.usage.completion_tokens
        return completion

    def _check_budget(self) -> None:
        tokens = self.counts["prompt_tokens"] + self.counts["answer_tokens"]
        for name, used in (("budget_requests", self.counts["requests"]), ("budget_tokens", tokens)):
            bound = getattr(self.config, name)
            if bound and used >= bound:
                raise ChatError("budget", f"{used} of {self.where}.{name} = {bound} are used; raise it")

    def _status(self, error: openai.APIStatusError, after: float) -> ChatError | ConfigError:
        """What a status other than 2xx means."""
        code, words = error.status_code, self._clean(str(error.message))
        if code in (401, 403, 404) or code < 400:
            remedy = "check address, model and key" if code >= 400 else "give the address that it points to"
            return ConfigError(f"{self.where} at {self.address} answers {code} ({words}); {remedy}")
        kinds = {429: "busy", 529: "busy", 502: "unreachable", 503: "unreachable", 504: "timeout"}
        kind = "failed" if code >= 500 or code in (408, 409, 425) else "rejected"
        return ChatError(kinds.get(code, kind), f"status {code}: {words}", after)

    def _clean(self, text: str) -> str:
        """A server's words for an error: short, on one line, and without the key."""
        return " ".join((text.replace(self._key, "...") if self.config.key else text).split())[:SHOWN]


def picture(data: bytes, kind: str = "png") -> dict[str, Any]:
    """An image file as a part of a message's content."""
    text = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{text}"}}


class _Message(pydantic.BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(pydantic.BaseModel):
    finish_reason: str | None = None
    message: _Message


class _Usage(pydantic.BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(pydantic.BaseModel):
    """What is read of an answer; whatever else a server sends is left alone."""

    choices: list[_Choice]
    usage: _Usage | None = None


def _read(choice: _Choice, schema: type[Model]) -> Model | ChatError:
    ends = {"length": "truncated", "content_filter": "filtered"}
    if choice.message.refusal:
        return ChatError("refused", choice.message.refusal[:SHOWN])
    if choice.finish_reason in ends:
        return ChatError(ends[choice.finish_reason], f"the answer ends with {choice.finish_reason!r}")
    if choice.finish_reason != "stop" or not choice.message.content:
        return ChatError("malformed", f"no text, and the end is {choice.finish_reason!r}")
    # Where JSON allows a raw control character, it is white space. vLLM's grammar lets others into strings.
    text = re.sub(r"[\x00-\x1f]", " ", choice.message.content)
    try:
        return schema.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        return ChatError("malformed", _first(error))


def _first(error: pydantic.ValidationError) -> str:
    """The first complaint, without the text that it is about."""
    one = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, one['loc'])) or 'answer'}: {one['msg']}"[:SHOWN]


def _error(state: tenacity.RetryCallState) -> ChatError:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, ChatError)  # noqa: S101 - the only error that is retried
    return error


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, as a number or as a date; 0 where it does not."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else 0.0


def _require(condition: bool, where: str, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{where}.{name} is {value!r}; it {remedy}")
