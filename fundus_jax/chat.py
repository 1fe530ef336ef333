"""One client for servers that speak OpenAI's chat protocol: answers checked against a schema, or an error
that says of what kind it is.

    chat = Chat(ChatConfig(address="http://127.0.0.1:8000/v1", model="judge"), "judge.server")
    async with chat:
        answers = await chat.ask([{"role": "user", "content": "..."}], Answer, n=5)

`Answer` is a pydantic model; its JSON schema goes out as `response_format`, and what comes back is validated
by it. Nothing is guessed and nothing has a default: each of the n answers is an `Answer` or a `ChatError`.

What is tried again (with jitter, and not before Retry-After): a server that is busy, fails, or is not there.
The first two use up the call's own `deadline`. A server that is not there is left out and looked for; when
that was the last one, the calls wait for up to `patience` (`endpoints`). Never tried again: a request that
the server rejects, a refusal, an answer that is cut off or does not match. What only the user can mend (a
wrong key, no such model, a redirect) is a ConfigError.

The connections belong to one event loop, `async with` by `async with`; what is known of the servers and the
budget last as long as the object. Neighbours: `grpo/judge_server.py`, and the pipeline's `asking.py`.
"""

import asyncio
import base64
import copy
import functools
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import openai
import pydantic
import tenacity

from fundus_jax.endpoints import Endpoint, Endpoints, LostError
from fundus_jax.records import ConfigError

Model = TypeVar("Model", bound=pydantic.BaseModel)

RETRIED = ("unreachable", "busy", "timeout", "failed")
KINDS = (*RETRIED, "rejected", "refused", "filtered", "truncated", "malformed", "down", "budget")
BACKOFF = tenacity.wait_random_exponential(multiplier=0.5, max=20)  # seconds
CONNECT = 10.0  # seconds after which a host that says nothing is not there
LOOK = 5.0  # seconds in which a server has to say that it is there
SHOWN = 200  # characters of a server's own words in an error


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """A server, or several with the same model; and how long and how hard to try.

    address: up to and with the /v1, several with commas between; "" takes FUNDUS_SERVER of the environment,
    for those that move between restarts. model: the name it is served under. key: the environment variable
    that holds the API key, "" for none. concurrency: calls under way at a time, at all servers together.
    timeout: seconds for one request. deadline: for one call, its tries and pauses together, the wait for a
    lost server apart. tries: how often a server may take a request and fail. breaker: after so many failures
    in a row a server counts as lost. patience: seconds to wait when all are; 0 fails at once.
    budget_requests, budget_tokens: what all calls of one process may use together (0: no bound); what is
    under way when a bound is reached still counts on top.
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

    def urls(self, where: str) -> tuple[str, ...]:
        """The addresses. Raises ConfigError unless each is http(s), holds no password, and is named once."""
        text = self.address or os.environ.get("FUNDUS_SERVER", "")
        found = tuple(one.strip() for one in text.split(","))
        remedy = "must be like http://HOST:8000/v1 (or be set in FUNDUS_SERVER)"
        for one in found:
            parts = urlsplit(one)
            plain = parts.scheme in ("http", "https") and parts.hostname
            _require("@" not in parts.netloc, where, "address", "...@...", "must hold no password: use `key`")
            _require(bool(plain and not (parts.query or parts.fragment)), where, "address", one, remedy)
        _require(len(set(found)) == len(found), where, "address", text, "must name each server once")
        return found

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


class Memory(Protocol):
    """Answers that need not be paid for twice. A request is its JSON body, an answer a text."""

    def take(self, request: object) -> str | None:
        """An answer to this very request that was not taken yet, or None."""
        ...

    def keep(self, request: object, answer: str) -> None:
        """Hold the answer that the server gave."""
        ...


class Chat:
    """A client of the servers of `config`; `where` is what errors call that part of the configuration.

    Attributes:
        counts: requests, retries, prompt_tokens and answer_tokens so far.

    Raises ConfigError for an address or key that can not be used.
    """

    def __init__(self, config: ChatConfig, where: str) -> None:
        config.validate(where)
        self.config, self.where = config, where
        self._key = config.secret(where)
        self.endpoints = Endpoints(where, config.urls(where), config.breaker, config.patience)
        self.counts: Counter[str] = Counter()
        self._memory: Memory | None = None

    def remembering(self, memory: Memory) -> Self:
        """This client, which asks the server for nothing that `memory` has the answer to."""
        other = copy.copy(self)  # connections, endpoints and counts are those of this one
        other._memory = memory
        return other

    async def __aenter__(self) -> Self:
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=self.endpoints.all[0].address,
            api_key=self._key,
            max_retries=0,
            timeout=openai.Timeout(None, connect=CONNECT),  # asyncio's bounds a request, this one each read
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )
        self._at = {one: self._client.with_options(base_url=one.address) for one in self.endpoints.all}
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
        body = {
            "model": self.config.model,
            "messages": list(messages),
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "response_format": {"type": "json_schema", "json_schema": _described(schema)},
            **({} if seed is None else {"seed": seed}),
        }
        return [_read(choice, schema) for choice in await self._choices(body)]

    async def say(
        self, messages: Sequence[Mapping[str, Any]], *, n: int = 1, **fields: Any
    ) -> "list[Choice]":
        """n free answers to one conversation, as the server gives them; `fields` are the rest of the request.

        Raises as `ask`.
        """
        return await self._choices({"model": self.config.model, "messages": list(messages), "n": n, **fields})

    async def _choices(self, body: dict[str, Any]) -> "list[Choice]":
        known = self._memory.take(body) if self._memory else None
        if known is not None:
            completion = _Completion.model_validate_json(known)
        else:
            async with self._slots:
                completion = await self._persist(body)
            if self._memory:
                self._memory.keep(body, completion.model_dump_json())
        if (count := len(completion.choices)) != body["n"]:
            raise ChatError("malformed", f"{count} answers where {body['n']} were asked for")
        return completion.choices

    async def _persist(self, body: dict[str, Any]) -> "_Completion":
        """The answer to a request, tried as often as the configuration allows."""
        spent, failed, began = 0.0, 0, 0.0
        endpoint: Endpoint | None = None  # where it was tried last

        def gives_up(state: tenacity.RetryCallState) -> bool:
            nonlocal spent, failed
            error = _error(state)
            if error.kind == "unreachable" and self.endpoints.lost:
                return False  # `enter` waits, or ends it
            failed += error.kind in ("timeout", "failed")
            spent += time.monotonic() - began + state.upcoming_sleep
            return failed >= self.config.tries or spent >= self.config.deadline

        def pause(state: tenacity.RetryCallState) -> float:
            error = _error(state)
            if self.endpoints.lost or (error.kind == "unreachable" and self.endpoints.spare(endpoint)):
                return 0.0
            after = error.retry_after
            return after + random.uniform(0, 1) if after else BACKOFF(state)  # noqa: S311 - jitter

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, ChatError) and e.kind in RETRIED),
            wait=pause,
            stop=gives_up,
            reraise=True,
        )
        async for attempt in tries:
            with attempt:
                try:
                    endpoint, probe = await self.endpoints.enter(self._healthy, endpoint)
                except LostError as error:
                    raise ChatError("down", str(error)) from None
                began = time.monotonic()
                self.counts["retries"] += attempt.retry_state.attempt_number > 1
                timeout = min(self.config.timeout, self.config.deadline - spent)
                return await self._send(endpoint, probe, body, timeout)
        raise AssertionError("tenacity ends with an answer or an error")

    async def _send(
        self, endpoint: Endpoint, probe: bool, body: dict[str, Any], timeout: float
    ) -> "_Completion":
        """One request. Raises ChatError; tells the endpoint how it went."""
        lost: bool | None = None
        after = 0.0
        try:
            self._check_budget()
            self.counts["requests"] += 1
            async with asyncio.timeout(timeout):
                # As text: `create` takes body and answer apart, which costs more than all else of a request.
                text = await self._at[endpoint].post("/chat/completions", cast_to=str, body=body)
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
            raise self._status(endpoint.address, error, after) from None
        finally:
            endpoint.leave(probe, lost, after)
        try:
            completion = _Completion.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise ChatError("malformed", f"not a chat completion: {_first(error)}") from None
        if completion.usage is not None:
            self.counts["prompt_tokens"] += completion.usage.prompt_tokens
            self.counts["answer_tokens"] += completion.usage.completion_tokens
        return completion

    async def _healthy(self, endpoint: Endpoint) -> bool:
        """Whether a server answers at all, by a request that every one of them knows."""
        try:
            async with asyncio.timeout(LOOK):
                await self._at[endpoint].models.with_raw_response.list()
        except (TimeoutError, openai.APIConnectionError):
            return False
        except openai.APIStatusError as error:
            return error.status_code < 500
        return True

    def _check_budget(self) -> None:
        tokens = self.counts["prompt_tokens"] + self.counts["answer_tokens"]
        for name, used in (("budget_requests", self.counts["requests"]), ("budget_tokens", tokens)):
            bound = getattr(self.config, name)
            if bound and used >= bound:
                raise ChatError("budget", f"{used} of {self.where}.{name} = {bound} are used; raise it")

    def _status(self, address: str, error: openai.APIStatusError, after: float) -> ChatError | ConfigError:
        """What a status other than 2xx means."""
        code, words = error.status_code, self._clean(str(error.message))
        if code in (401, 403, 404) or code < 400:
            remedy = "check address, model and key" if code >= 400 else "give the address that it points to"
            return ConfigError(f"{self.where} at {address} answers {code} ({words}); {remedy}")
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


class Choice(pydantic.BaseModel):
    """One answer of a completion; `logprobs` are as the server sends them, where they were asked for."""

    finish_reason: str | None = None
    message: _Message
    logprobs: Any = None


class _Usage(pydantic.BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(pydantic.BaseModel):
    """What is read of an answer; whatever else a server sends is left alone."""

    choices: list[Choice]
    usage: _Usage | None = None


@functools.cache
def _described(schema: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {"name": schema.__name__, "schema": schema.model_json_schema(), "strict": True}


def _read(choice: Choice, schema: type[Model]) -> Model | ChatError:
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
