"""One line of requests through all shards: in order, not drained at a shard's end, ended with its caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import asking, jobs, manifest
from data_pipeline.jobs import Quarantine, ShardInput
from fundus_jax.chat import Chat, ChatConfig
from fundus_jax.records import ConfigError, Findings
from tests.chat_server import Reply, Server
from tests.data_pipeline import asked_job

GOOD = '{"count": 3}'


def item_of(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].split()[0])


def config(server: Server, **changes: Any) -> ChatConfig:
    return ChatConfig(address=server.address, model="m", **{"concurrency": 4, **changes})


def test_results_come_in_the_order_of_the_items() -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        item = item_of(body)
        return Reply(texts=[GOOD if item % 7 else "?"], wait=0.05 if item % 5 == 0 else 0.0)

    with Server(reply) as server:
        found = list(
            asking.ask_all(range(40), asked_job.ask, config(server), "toy", name=lambda i: f"no. {i}")
        )
        assert 1 < server.most <= 4
    names = [one.key if isinstance(one, Quarantine) else one.example for one in found]
    assert names == [f"item {i}" if i % 7 else f"no. {i}" for i in range(40)]


def test_the_next_shard_is_asked_about_before_this_one_has_ended(tmp_path: Path) -> None:
    begun = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Reply:
        item = item_of(body)
        if item >= 30:
            begun.set()
        if item == 3:
            assert begun.wait(30), "the line is drained at the end of a shard"
        return Reply(texts=[GOOD])

    with Server(reply) as server:
        summary = asked_job.run(tmp_path, server.address, inputs=asked_job.shards(4, 10), timeout=60.0)
    assert summary == jobs.Summary(40, 0, 4, 0)


def test_a_stage_gets_results_in_the_place_of_items_and_its_own_quarantines_count(tmp_path: Path) -> None:
    def process(shard: ShardInput, folder: Path) -> Iterator[Any]:
        (folder / f"{shard.name}.side").write_text("x")
        for number, result in enumerate(shard.items):  # type: ignore[arg-type]
            assert isinstance(result, Findings), "the quarantines of the server are not its business"
            yield result if number else Quarantine(result.example, "the first is never good enough")

    inputs = [ShardInput("a", "a", range(5)), ShardInput("b", "b", []), ShardInput("c", "c", range(5, 9))]
    with Server(lambda body, _: Reply(texts=[GOOD if item_of(body) != 6 else "?"])) as server:
        through = asking.through(asked_job.ask, config(server), "toy", name=str)
        job = jobs.Job("toy", {})
        assert jobs.run(job, inputs, process, tmp_path, limit=1.0, through=through).answers == 6
        with pytest.raises(ConfigError, match="workers is 2; a stage that asks a server takes 1"):
            jobs.run(job, inputs, process, tmp_path / "2", workers=2, through=through)
    counts = {one.name: (one.items, one.answers, one.quarantined) for one in manifest.complete(tmp_path)}
    assert counts == {"a": (5, 4, 1), "b": (0, 0, 0), "c": (4, 2, 2)}


def test_a_process_that_leaves_results_unread_does_not_shift_the_next_shard(tmp_path: Path) -> None:
    def process(shard: ShardInput, folder: Path) -> Iterator[Any]:
        yield next(iter(shard.items))  # type: ignore[arg-type]

    with Server(lambda body, _: Reply(texts=[GOOD if item_of(body) != 8 else "?"])) as server:
        through = asking.through(asked_job.ask, config(server), "toy", name=str)
        jobs.run(jobs.Job("toy", {}), asked_job.shards(3, 5), process, tmp_path, limit=1.0, through=through)
    assert [(one.items, one.quarantined) for one in manifest.complete(tmp_path)] == [(5, 0), (5, 1), (5, 0)]
    assert [one.example for one in jobs.read(tmp_path, Findings)] == ["item 0", "item 5", "item 10"]


def test_a_failing_ask_stops_at_its_item_and_begins_no_other() -> None:
    asked: list[int] = []

    async def ask(chat: Chat, item: int) -> int:
        asked.append(item)
        if item == 10:
            raise ZeroDivisionError("of item 10")
        return item

    others = set(threading.enumerate())
    with Server(lambda *_: Reply(texts=[GOOD])) as server:
        results = asking.ask_all(range(1000), ask, config(server), "toy", name=str)
        assert [next(results) for _ in range(10)] == list(range(10))
        with pytest.raises(ZeroDivisionError, match="of item 10"):
            next(results)
    assert len(asked) <= 11 + 4
    left = {thread.name for thread in set(threading.enumerate()) - others}
    assert "toy" not in left, "the loop's thread has ended"
