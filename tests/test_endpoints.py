"""Several servers behind one client: shared out by load, a lost one left out and found again."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pydantic
import pytest

from fundus_jax import chat, endpoints
from fundus_jax.chat import Chat, ChatConfig, ChatError
from fundus_jax.endpoints import Endpoint, Endpoints, LostError
from fundus_jax.records import ConfigError
from tests.chat_server import Reply, Server

GOOD = Reply(texts=['{"yes": true}'], wait=0.02)


class Answer(pydantic.BaseModel):
    yes: bool


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF", chat.tenacity.wait_random_exponential(multiplier=0.01, max=0.05))
    monkeypatch.setattr(endpoints, "PROBES", (0.1, 0.2))


def client(*servers: Server, **changes: Any) -> Chat:
    fields = {"model": "m", "timeout": 5.0, "deadline": 20.0, "patience": 0.0, "concurrency": 4, **changes}
    return Chat(ChatConfig(address=" , ".join(one.address for one in servers), **fields), "test.server")


async def many(one: Chat, count: int) -> list[Any]:
    calls = (one.ask([{"role": "user", "content": f"{i}"}], Answer) for i in range(count))
    return await asyncio.gather(*calls, return_exceptions=True)


def ask(one: Chat, count: int) -> list[Any]:
    async def run() -> list[Any]:
        async with one:
            return await many(one, count)

    return asyncio.run(run())


def good(*_: Any) -> Reply:
    return GOOD


def test_the_least_loaded_is_asked() -> None:
    def slow(*_: Any) -> Reply:
        return Reply(texts=GOOD.texts, wait=0.2)

    with Server(good) as first, Server(slow) as second:
        answers = ask(client(first, second), 60)
        assert answers == [[Answer(yes=True)]] * 60
        assert len(first.bodies) > 2 * len(second.bodies) > 0, "each has two under way, and one is slower"
        assert first.most <= 4
        assert second.most <= 3


def test_work_goes_on_while_one_lives_and_a_dead_one_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="absl")
    with Server(good) as first, Server(good) as second:
        second.stop()
        one = client(first, second, breaker=2)

        async def run() -> list[Any]:
            async with one:
                answers = await many(one, 30)
                assert one.endpoints.all[1].lost
                second.start()
                while one.endpoints.all[1].lost:
                    answers += await many(one, 4)
                before = len(second.bodies)
                answers += await many(one, 20)
                assert len(second.bodies) >= before + 5
                return answers

        assert set(map(str, asyncio.run(run()))) == {str([Answer(yes=True)])}
        assert second.looks >= 1, "it had to say that it is there before a request was risked"
    assert f"{second.address} failed 2 times in a row" in caplog.text
    assert f"{second.address} is back after" in caplog.text


def test_one_that_says_it_is_not_well_gets_no_request() -> None:
    with Server(good) as first, Server(lambda *_: Reply(status=500)) as second:
        second.there = 503
        one = client(first, second, breaker=2, tries=5)
        assert ask(one, 60) == [[Answer(yes=True)]] * 60
        refused = len(second.bodies)
        assert second.looks >= 1
        second.there, second.reply = 200, good
        time.sleep(0.3)
        assert ask(one, 60) == [[Answer(yes=True)]] * 60
        assert len(second.bodies) > refused


def test_one_that_hangs_is_left_out_and_its_requests_go_elsewhere() -> None:
    with Server(good) as first, Server(lambda *_: Reply(texts=GOOD.texts, wait=2.0)) as second:
        one = client(first, second, timeout=0.4, breaker=2)
        assert ask(one, 40) == [[Answer(yes=True)]] * 40
        assert one.endpoints.all[1].lost
        assert one.counts["retries"] == len(second.bodies) >= 2
        answered = [body["messages"] for body in first.bodies]
        assert all(body["messages"] in answered for body in second.bodies)


def test_when_all_are_lost_the_calls_wait_for_any() -> None:
    with Server(good) as first, Server(good) as second:
        first.stop()
        second.stop()
        one = client(first, second, patience=60.0)
        threading.Timer(0.8, second.start).start()
        assert ask(one, 12) == [[Answer(yes=True)]] * 12
        assert len(second.bodies) == 12
    with Server(good) as first, Server(good) as second:
        first.stop()
        second.stop()
        answers = ask(client(first, second, patience=0.5), 3)
        assert {answer.kind for answer in answers if isinstance(answer, ChatError)} == {"down"}
        assert f"{first.address}, {second.address} has been lost for" in str(answers[0])


def test_a_wrong_one_is_named() -> None:
    with Server(good) as first, Server(lambda *_: Reply(status=404)) as second:
        answers = ask(client(first, second), 8)
        wrong = [answer for answer in answers if isinstance(answer, ConfigError)]
        assert wrong
        assert f"test.server at {second.address} answers 404" in str(wrong[0])


def test_addresses_are_checked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNDUS_SERVER", "http://a:1/v1,http://b:1/v1")
    found = Chat(ChatConfig(model="m"), "judge").endpoints.all
    assert [one.address for one in found] == ["http://a:1/v1", "http://b:1/v1"]
    with pytest.raises(ConfigError, match=r"judge\.address is 'b:1/v1'"):
        Chat(ChatConfig(model="m", address="http://a:1/v1,b:1/v1"), "judge")
    with pytest.raises(ConfigError, match="must name each server once"):
        Chat(ChatConfig(model="m", address="http://a:1/v1, http://a:1/v1"), "judge")


def test_a_look_that_is_cancelled_leaves_the_server_to_the_next() -> None:
    async def run() -> None:
        servers = Endpoints("the server", ["http://a", "http://b"], limit=1, patience=600.0)
        for one in servers.all:
            one.leave(one.enter(), True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await servers.enter(lambda _: asyncio.sleep(60, True))
        answer = await servers.enter(lambda _: asyncio.sleep(0, True))
        assert answer[1] is True
        assert [one.under_way for one in servers.all].count(1) == 1

    asyncio.run(run())


def test_the_ill_are_looked_for_in_turn_and_patience_ends() -> None:
    seen: list[Endpoint] = []

    async def ill(one: Endpoint) -> bool:
        seen.append(one)
        return False

    async def run() -> None:
        servers = Endpoints("the server", ["http://a", "http://b"], limit=1, patience=1.0)
        for one in servers.all:
            one.leave(one.enter(), True)
        with pytest.raises(LostError, match="the server at http://a, http://b has been lost for 1 s"):
            await servers.enter(ill)
        assert set(seen) == set(servers.all)
        assert len(seen) < 20, "with pauses between the looks"

    asyncio.run(run())
