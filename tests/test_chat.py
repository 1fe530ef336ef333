"""The client against a real HTTP server: answers, every kind of error, what is tried again and what not."""

from __future__ import annotations

import asyncio
import base64
import re
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Literal

import pydantic
import pytest

from fundus_jax import chat, endpoints
from fundus_jax.chat import Chat, ChatConfig, ChatError, picture
from fundus_jax.endpoints import Endpoints
from fundus_jax.records import ConfigError
from tests.chat_server import Reply, Server

GOOD = '{"label": "cat", "sure": true}'


class Animal(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    label: Literal["cat", "dog"]
    sure: bool


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF", chat.tenacity.wait_random_exponential(multiplier=0.01, max=0.05))
    monkeypatch.setattr(endpoints, "PROBES", (0.1, 0.2))


def client(server: Server, **changes: Any) -> Chat:
    fields = {"model": "m", "timeout": 5.0, "deadline": 20.0, "patience": 0.0, **changes}
    return Chat(ChatConfig(address=server.address, **fields), "test.server")


def ask(one: Chat, times: int = 1, **options: Any) -> list[Any]:
    """What each of `times` calls at once gives or raises; the list of one call is taken apart."""

    async def run() -> list[Any]:
        async with one:
            calls = [one.ask([{"role": "user", "content": f"{i}"}], Animal, **options) for i in range(times)]
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    return answers[0] if times == 1 and isinstance(answers[0], list) else answers


def kind(answers: list[Any]) -> str:
    assert isinstance(answers[0], ChatError), answers
    assert answers[0].kind in chat.KINDS
    return answers[0].kind


def in_turn(*replies: Reply) -> Callable[[Any, int], Reply]:
    """The replies one after the other; the last stays."""
    return lambda body, number: replies[min(number, len(replies) - 1)]


def test_an_answer_is_what_its_schema_says() -> None:
    with Server(in_turn(Reply(texts=[GOOD] * 5))) as server:
        one = client(server)
        assert ask(one, n=5, seed=3, max_tokens=64) == [Animal(label="cat", sure=True)] * 5
    [body], [headers] = server.bodies, server.headers
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["n"], body["seed"], body["max_tokens"]) == ("m", 5, 3, 64)
    assert body["temperature"] == 0
    sent = body["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["strict"] is True
    assert sent["json_schema"]["schema"]["properties"]["label"]["enum"] == ["cat", "dog"]
    assert sent["json_schema"]["schema"]["additionalProperties"] is False
    assert not [name for name in body if name.startswith("guided")], "servers ignore these silently"
    assert headers["authorization"] == "Bearer none"
    assert one.counts == {"requests": 1, "retries": 0, "prompt_tokens": 10, "answer_tokens": 5}


def test_a_picture_goes_as_a_data_url() -> None:
    with Server(in_turn(Reply(texts=[GOOD]))) as server:

        async def run() -> None:
            async with client(server) as one:
                content = [picture(b"\x89PNG"), {"type": "text", "text": "What is it?"}]
                await one.ask([{"role": "user", "content": content}], Animal)

        asyncio.run(run())
    sent = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert sent == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(texts=[GOOD], finish="length"), "truncated"),
        (Reply(texts=[GOOD], finish="content_filter"), "filtered"),
        (Reply(texts=[GOOD], refusal="I can not help with that."), "refused"),
        (Reply(texts=[GOOD], finish="tool_calls"), "malformed"),
        (Reply(texts=[""]), "malformed"),
        (Reply(texts=["cat"]), "malformed"),
        (Reply(texts=[GOOD[:-1]]), "malformed"),
        (Reply(texts=[f"Sure! {GOOD}"]), "malformed"),
        (Reply(texts=['{"label": "cow", "sure": true}']), "malformed"),
        (Reply(texts=['{"label": "cat", "sure": "yes"}']), "malformed"),
        (Reply(texts=['{"label": "cat"}']), "malformed"),
        (Reply(texts=['{"label": "cat", "sure": true, "score": 9}']), "malformed"),
        (Reply(texts=[GOOD, GOOD]), "malformed"),
        (Reply(texts=[]), "malformed"),
        (Reply(raw="<html>Sign in</html>"), "malformed"),
        (Reply(raw='{"choices": [{"index": 0}]}'), "malformed"),
        (Reply(status=400), "rejected"),
        (Reply(status=413), "rejected"),
        (Reply(status=422), "rejected"),
    ],
)
def test_what_is_never_tried_again(reply: Reply, expected: str) -> None:
    with Server(in_turn(reply)) as server:
        assert kind(ask(client(server))) == expected
        assert len(server.bodies) == 1


def test_a_control_character_within_a_string_is_a_space() -> None:
    class Said(pydantic.BaseModel):
        text: str

    async def run(server: Server) -> list[Any]:
        async with client(server) as one:
            return await one.ask([{"role": "user", "content": "?"}], Said)

    with Server(in_turn(Reply(texts=['{\n\t"text": "a\x01b\tc\\n"}']))) as server:
        assert asyncio.run(run(server)) == [Said(text="a b c\n")]


def test_choices_fail_one_by_one() -> None:
    with Server(in_turn(Reply(texts=[GOOD, "dog", GOOD]))) as server:
        first, second, third = ask(client(server), n=3)
    assert first == third == Animal(label="cat", sure=True)
    assert second.kind == "malformed"


@pytest.mark.parametrize(
    "reply",
    [
        *[Reply(status=status) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)],
        Reply(hang_up=True),
        Reply(texts=[GOOD], wait=3.0),
    ],
    ids=lambda reply: "hang_up" if reply.hang_up else f"{reply.status}-{reply.wait}",
)
def test_what_is_tried_again(reply: Reply) -> None:
    with Server(in_turn(reply, reply, Reply(texts=[GOOD]))) as server:
        one = client(server, timeout=1.5)
        assert ask(one) == [Animal(label="cat", sure=True)]
    assert len(server.bodies) == one.counts["requests"] == 3
    assert one.counts["retries"] == 2


@pytest.mark.parametrize(
    ("reply", "expected"),
    [(Reply(status=500), "failed"), (Reply(hang_up=True), "failed"), (Reply(status=504), "timeout")],
    ids=["500", "hang_up", "504"],
)
def test_a_request_may_fail_so_often(reply: Reply, expected: str) -> None:
    with Server(in_turn(reply)) as server:
        assert kind(ask(client(server, tries=3))) == expected
        assert len(server.bodies) == 3


def test_the_deadline_bounds_tries_and_pauses_together() -> None:
    with Server(in_turn(Reply(texts=[GOOD], wait=2.0))) as server:
        assert kind(ask(client(server, timeout=0.3, deadline=0.7, tries=100, breaker=100))) == "timeout"
        assert len(server.bodies) <= 3
    with Server(in_turn(Reply(status=429))) as server:
        assert kind(ask(client(server, timeout=3.0, deadline=3.0))) in ("busy", "timeout")  # the last try
        assert len(server.bodies) > 3, "being busy is no failure: only the deadline ends it"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(form: str) -> None:
    def reply(body: Any, number: int) -> Reply:
        wait = "1.2" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
        return Reply(texts=[GOOD]) if number else Reply(status=429, headers={"Retry-After": wait})

    with Server(reply) as server:
        assert ask(client(server)) == [Animal(label="cat", sure=True)]
    first, second = server.times
    assert second - first >= 1.2
    with Server(in_turn(Reply(status=429, headers={"Retry-After": "3000"}))) as server:
        assert kind(ask(client(server))) == "busy", "longer than the deadline: it is not waited for"
        assert len(server.bodies) == 1


def test_retry_after_in_no_form_is_ignored() -> None:
    for text in ("soon", "", "nan", "-4"):
        assert chat._retry_after({"retry-after": text}) == 0
    assert chat._retry_after({"retry-after": "inf"}) == 3600


def test_calls_under_way_are_bounded() -> None:
    with Server(in_turn(Reply(texts=[GOOD], wait=0.1))) as server:
        answers = ask(client(server, concurrency=3), times=10)
    assert [one for [one] in answers] == [Animal(label="cat", sure=True)] * 10
    assert server.most == 3


def test_a_lost_server_fails_at_once_without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "PROBES", (600.0, 600.0))
    with Server(in_turn(Reply(status=500))) as server:
        one = client(server, tries=2, breaker=4)
        assert [kind(ask(one)) for _ in range(2)] == ["failed", "failed"]
        assert one.endpoints.lost
        assert kind(ask(one)) == "down", "nothing is sent"
        assert len(server.bodies) == 4
        one.endpoints.all[0]._probe_at = 0.0
        assert kind(ask(one)) == "down"  # it looked once, and then
        assert len(server.bodies) == 5
        server.reply = in_turn(Reply(texts=[GOOD]))
        one.endpoints.all[0]._probe_at = 0.0
        assert ask(one) == [Animal(label="cat", sure=True)]
        assert not one.endpoints.lost


def test_a_lost_server_is_waited_for_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="absl")
    with Server(in_turn(Reply(texts=[GOOD], wait=0.05))) as server:
        one = client(server, patience=60.0, concurrency=4)
        threading.Timer(0.2, server.stop).start()
        threading.Timer(1.5, server.start).start()
        answers = ask(one, times=40)
    assert [answer for [answer] in answers] == [Animal(label="cat", sure=True)] * 40
    assert "is not there; waiting for it, " in caplog.text
    assert re.search(r"is back after [1-9]\d* s", caplog.text)
    looks = one.counts["requests"] - 40
    assert one.config.breaker <= looks < 30, "one at a time, with pauses"


def test_patience_ends() -> None:
    with Server(in_turn(Reply(texts=[GOOD]))) as server:
        server.stop()
        answers = ask(client(server, patience=0.6), times=3)
        assert {answer.kind for answer in answers} == {"down"}
        assert re.search(r"has been lost for [1-9]\d* s", str(answers[0]))


def test_a_request_that_no_server_survives_does_not_hold_up_the_others() -> None:
    """It fails alone, although each of its failures looks as if the server were lost."""

    def reply(body: Any, number: int) -> Reply:
        poison = body["messages"][0]["content"] == "3"
        return Reply(status=500) if poison else Reply(texts=[GOOD])

    with Server(reply) as server:
        answers = ask(client(server, patience=60.0, breaker=1), times=8)
    assert answers[3].kind == "failed"
    assert all(isinstance(answers[i], list) for i in range(8) if i != 3)


def test_one_call_at_a_time_looks_whether_the_server_is_back() -> None:
    async def enter(servers: Endpoints) -> bool:
        return (await servers.enter(lambda _: pytest.fail("a lone server is not asked twice")))[1]

    async def run() -> None:
        servers = Endpoints("the server", ["http://here"], limit=2, patience=600.0)
        [here] = servers.all
        here.leave(here.enter(), True)
        assert await enter(servers) is False, "one failure is none"
        here.leave(False, True)
        waiting = {asyncio.create_task(enter(servers)) for _ in range(5)}
        for _ in range(2):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert [one.result() for one in done] == [True]
            here.leave(False, True)  # one that was under way from before
            assert not (await asyncio.wait(waiting, timeout=0.5))[0], "while it looks, nobody else does"
            here.leave(True, True)
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        here.leave(True, False)
        done, waiting = await asyncio.wait(waiting, timeout=60)
        assert [one.result() for one in done] == [False] * 2
        assert not waiting
        assert not servers.lost

    asyncio.run(run())


def test_the_budget_ends_with_a_clear_error() -> None:
    with Server(in_turn(Reply(texts=[GOOD]))) as server:
        one = client(server, budget_requests=2)
        assert [isinstance(ask(one)[0], Animal) for _ in range(2)] == [True, True]
        [error] = ask(one)
        assert str(error) == "budget: 2 of test.server.budget_requests = 2 are used; raise it"
        assert len(server.bodies) == 2
        one = client(server, budget_tokens=20)
        assert [kind(ask(one)) if i == 2 else ask(one)[0].sure for i in range(3)] == [True, True, "budget"]


@pytest.mark.parametrize("status", [401, 403, 404, 301, 307, 308])
def test_what_only_the_user_can_mend_stops(status: int) -> None:
    with Server(in_turn(Reply(texts=[GOOD]))) as other:
        headers = {"Location": f"{other.address}/chat/completions"}
        with Server(in_turn(Reply(status=status, headers=headers))) as server:
            [error] = ask(client(server))
            assert isinstance(error, ConfigError)
            assert f"test.server at {server.address} answers {status}" in str(error)
            assert len(server.bodies) == 1
        assert other.bodies == [], "a redirect is not followed"


def test_the_key_comes_from_the_environment_and_is_told_to_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", "another-servers-key")
    monkeypatch.setenv("JUDGE_KEY", "sesame-4711")
    parrot = Reply(status=400, raw='{"error": {"message": "sesame-4711 is your key"}}')
    with Server(in_turn(parrot)) as server:
        one = client(server, key="JUDGE_KEY")
        [error] = ask(one)
        assert server.headers[0]["authorization"] == "Bearer sesame-4711"
        assert "... is your key" in str(error)
        ask(client(server))
        assert server.headers[1]["authorization"] == "Bearer none"
    assert "sesame-4711" not in caplog.text + repr(one.config) + str(error)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match=r"test\.server\.key is 'JUDGE_KEY'.*variable that is set"):
        client(server, key="JUDGE_KEY")


@pytest.mark.parametrize(
    "address",
    ["", "localhost:8000", "ftp://host/v1", "file:///etc/passwd", "http:///v1", "http://h/v1?key=1"],
)
def test_only_plain_web_addresses_are_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUNDUS_SERVER", raising=False)
    with pytest.raises(ConfigError, match=r"judge\.address is .*http://HOST:8000/v1"):
        Chat(ChatConfig(address=address, model="m"), "judge")
    with pytest.raises(ConfigError, match="no password") as caught:
        Chat(ChatConfig(address="http://me:secret@host/v1", model="m"), "judge")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("FUNDUS_SERVER", "http://elsewhere:1/v1")
    assert Chat(ChatConfig(model="m"), "judge").endpoints.all[0].address == "http://elsewhere:1/v1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concurrency", 0),
        ("tries", 0),
        ("breaker", 0),
        ("timeout", 0.0),
        ("patience", -1.0),
        ("deadline", 1.0),
    ],
)
def test_numbers_are_checked(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"judge\.{field} is {value!r}"):
        ChatConfig(model="m", **{field: value}).validate("judge")
    with pytest.raises(ConfigError, match=r"judge\.model is ''"):
        ChatConfig().validate("judge")
