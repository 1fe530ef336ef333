"""A server that does everything wrong: each item ends as its answer or as a quarantine that says why."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import asking, jobs, manifest
from fundus_jax import chat, endpoints
from fundus_jax.chat import ChatConfig, LostError
from fundus_jax.records import ConfigError, Findings
from tests.chat_server import Reply, Server
from tests.data_pipeline import asked_job

TIMEOUT = 2.0
SLOW = 3 * TIMEOUT
GOOD = '{"count": 3}'
# What goes over: it is tried again.
PASSING = {
    "429": Reply(status=429, headers={"Retry-After": "1"}),
    "500": Reply(status=500),
    "503": Reply(status=503, headers={"Retry-After": "0.2"}),
    "hangs": Reply(texts=[GOOD], wait=SLOW),
    "drips": Reply(texts=[GOOD], drip=0.1),
    "hangs up": Reply(hang_up=True),
    "half a response": Reply(texts=[GOOD], half=True),
}
# What stays: the item is a quarantine of this kind.
STAYING = {
    "half JSON": (Reply(texts=[GOOD[:-3]]), "malformed"),
    "prose": (Reply(texts=[f"Certainly! {GOOD}"]), "malformed"),
    "wrong schema": (Reply(texts=['{"count": "three"}']), "malformed"),
    "more fields": (Reply(texts=['{"count": 3, "sure": true}']), "malformed"),
    "no choices": (Reply(texts=[]), "malformed"),
    "a page": (Reply(raw="<html>Sign in</html>"), "malformed"),
    "truncated": (Reply(texts=[GOOD], finish="length"), "truncated"),
    "filtered": (Reply(texts=[GOOD], finish="content_filter"), "filtered"),
    "refused": (Reply(texts=[GOOD], refusal="I am no doctor."), "refused"),
    "400": (Reply(status=400), "rejected"),
    "always 500": (Reply(status=500), "failed"),
    "always hangs": (Reply(texts=[GOOD], wait=SLOW), "timeout"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF", chat.tenacity.wait_random_exponential(multiplier=0.01, max=0.05))
    monkeypatch.setattr(endpoints, "PROBES", (0.1, 0.2))


def plan(item: int) -> tuple[list[Reply], Reply, str]:
    """For an item: what its first tries get, what every later one gets, and the kind of its quarantine."""
    passing, staying = list(PASSING.values()), list(STAYING.values())
    turn, kind = divmod(item, 20)
    if kind < len(passing):
        return [passing[kind], passing[(kind + turn) % len(passing)]], Reply(texts=[GOOD]), ""
    if kind < len(passing) + 4:
        reply, why = staying[(item + 5 * turn) % len(staying)]
        return [], reply, why
    return [], Reply(texts=[GOOD]), ""


class Chaos:
    """Replies by plan; whichever of an item's two requests it strikes is the item's parity."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any], number: int) -> Reply:
        words = body["messages"][0]["content"]
        item, turn, _ = words.split()
        if (turn == "first") != (int(item) % 2 == 0):
            return Reply(texts=[GOOD])
        first, later, _ = plan(int(item))
        with self._lock:
            number = self.tries[words]
            self.tries[words] += 1
        return first[number] if number < len(first) else later


def blinking(server: Server, stop: threading.Event) -> Iterator[None]:
    """Take the server off its port and put it back, again and again."""
    while not stop.wait(0.7):
        server.stop()
        stop.wait(0.3)
        server.start()
        yield


def outcomes(out: Path) -> tuple[dict[str, Findings], dict[str, str]]:
    """Answers and quarantine reasons by item; fails where one is there twice."""
    records = list(jobs.read(out, Findings))
    lines = [json.loads(line) for path in out.glob("*.quarantine.jsonl") for line in path.open()]
    answers = {record.example.removeprefix("item "): record for record in records}
    quarantined = {line["key"]: line["reason"] for line in lines}
    assert len(answers) == len(records)
    assert len(quarantined) == len(lines)
    assert not answers.keys() & quarantined.keys()
    return answers, quarantined


def test_every_item_ends_as_its_answer_or_as_a_quarantine_with_the_reason(tmp_path: Path) -> None:
    stop = threading.Event()
    with Server(Chaos()) as server:
        thread = threading.Thread(target=lambda: list(blinking(server, stop)))
        thread.start()
        try:
            # A server that leaves its port resets what waits there: a try more than those of the plan.
            asked_job.run(tmp_path, server.address, timeout=TIMEOUT, tries=5, concurrency=16)
        finally:
            stop.set()
            thread.join()
    answers, quarantined = outcomes(tmp_path)
    items = range(asked_job.SHARDS * asked_job.ITEMS)
    assert answers.keys() | quarantined.keys() == set(map(str, items))
    expected = {str(item): kind for item in items if (kind := plan(item)[2])}
    assert {item: reason.split(":")[0] for item, reason in quarantined.items()} == expected
    assert {kind for _, kind in STAYING.values()} == set(expected.values()), "every kind has its turn"
    assert all(record.votes == {"drusen": 3} for record in answers.values())
    entries = manifest.complete(tmp_path)
    assert sum(entry.items for entry in entries) == len(items)
    assert sum(entry.answers for entry in entries) == len(answers)
    assert not list(tmp_path.glob(".*.answers"))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"budget_requests": 30},
            ConfigError,
            "budget: 30 of toy.server.budget_requests = 30 are used; raise it; the same",
        ),
        (
            {"patience": 0.3},
            LostError,
            "down: toy.server at .* has been lost for 0 s; the same command, given again",
        ),
        ({"key": "NO_SUCH_VARIABLE"}, ConfigError, "toy.server.key is 'NO_SUCH_VARIABLE'"),
    ],
    ids=["budget", "lost", "key"],
)
def test_what_no_item_would_escape_stops_and_nothing_is_lost(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        if number == 30 and "patience" in change:
            threading.Thread(target=server.stop).start()
        return Reply(texts=[GOOD], wait=0.01)

    inputs = asked_job.shards(2)
    with Server(reply) as server:
        with pytest.raises(kind, match=message):
            asked_job.run(tmp_path, server.address, inputs=inputs, **change)
        server.stop()
        server.start()
        asked_job.run(tmp_path, server.address, inputs=inputs)
        answers, quarantined = outcomes(tmp_path)
        assert (len(answers), quarantined) == (40, {})
        assert len(server.bodies) <= 80 + asked_job.CONCURRENCY, "what had been answered was not asked again"


def test_too_many_quarantined_stop_the_job_and_its_requests(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        return Reply(status=400)

    others = set(threading.enumerate())  # whatever earlier tests left running
    with Server(reply) as server:
        with pytest.raises(jobs.DataError, match="(?s)60 of 60 items are quarantined.*rejected: status 400"):
            asked_job.run(tmp_path, server.address, limit=0.02)
        asked = len(server.bodies)
        assert asked <= asking.AHEAD * asked_job.CONCURRENCY
        assert set(manifest.load(tmp_path)) == {"s000", "s001"}, "few items are not judged before the end"
    left = {thread.name for thread in set(threading.enumerate()) - others}
    assert "toy.server" not in left, "the thread of the requests has ended"


def test_items_are_taken_as_they_are_needed() -> None:
    items = itertools.count()

    with Server(lambda *_: Reply(texts=[GOOD])) as server:
        config = ChatConfig(address=server.address, model="m", concurrency=2)
        results = asking.ask_all(items, asked_job.ask, config, "toy.server", name=str)
        first = [next(results) for _ in range(3)]
        assert next(items) <= 3 + asking.AHEAD * 2
        results.close()
        asked = len(server.bodies)
    assert [one.example for one in first] == ["item 0", "item 1", "item 2"]
    assert asked <= 2 * (3 + asking.AHEAD * 2)
