"""`kill -9` at any moment of a job that asks a server: the same bytes in the end, and hardly a request twice.

The server is in this process and counts. The job is forked with its imports done, so that the signal hits its
work and not the start of an interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import jobs, kept, manifest
from fundus_jax.records import Findings
from tests.chat_server import Reply, Server
from tests.data_pipeline import asked_job
from tests.data_pipeline.asked_job import CONCURRENCY, ITEMS, SHARDS

KILLS = 50
REQUESTS = 2 * SHARDS * ITEMS  # of an undisturbed run
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.data_pipeline.asked_job"])


def reply(body: dict[str, Any], number: int) -> Reply:
    """The same answer to the same request, now and then none that can be used."""
    words = body["messages"][0]["content"]
    count = sum(words.encode()) % 1000
    wait = random.Random(words).uniform(0.002, 0.02)
    return Reply(texts=["?" if words.startswith("33 ") else f'{{"count": {count}}}'], wait=wait)


def contents(out: Path) -> dict[str, bytes]:
    """Everything in a finished directory; the empty lock files, which hold no data, are left out."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".lock")}


def killed(out: Path, server: Server, moment: float) -> bool:
    """Run the job and kill it `moment` seconds after its first request, or until it ends; whether it was
    killed."""
    before = len(server.bodies)
    process = FORKS.Process(target=asked_job.run, args=(out, server.address))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while len(server.bodies) == before and process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.join(moment)
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def quiet(server: Server) -> int:
    """The requests that came, when those under way have been answered."""
    while server.now:
        time.sleep(0.001)
    return len(server.bodies)


def test_killed_at_50_random_moments(tmp_path: Path) -> None:
    moments = random.Random(7)
    with Server(reply) as server:
        asked_job.run(tmp_path / "whole", server.address)
        undisturbed, whole = quiet(server), contents(tmp_path / "whole")
        assert undisturbed == REQUESTS - 1, "item 33 is not asked a second time"
        kills = rounds = 0
        while kills < KILLS:
            out, before, here = tmp_path / f"{rounds}", quiet(server), 0
            while killed(out, server, moments.uniform(0.0, 0.15)):
                here += 1
            repeated = quiet(server) - before - undisturbed
            # Less than a shard (40 requests) each time: what was under way. Item 33 is malformed for good.
            assert 0 <= repeated <= here * CONCURRENCY
            assert contents(out) == whole
            kills, rounds = kills + here, rounds + 1
    assert len(list(jobs.read(tmp_path / "0", Findings))) == SHARDS * ITEMS - 1


def test_what_is_torn_is_asked_for_again(tmp_path: Path) -> None:
    with Server(reply) as server:
        asked_job.run(tmp_path / "whole", server.address)
        out = tmp_path / "out"
        while not killed(out, server, 0.1) or not [
            one for one in out.glob(".*.answers") if one.stat().st_size
        ]:
            pass
        path = max(out.glob(".*.answers"), key=lambda one: one.stat().st_size)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0].replace(b"sha256", b"sha265"), *lines[1:]]) + lines[0][:30])
        before = quiet(server)
        asked_job.run(out, server.address)
        assert contents(out) == contents(tmp_path / "whole")
        assert len(manifest.load(out)) == SHARDS
        assert quiet(server) > before


def test_equal_requests_take_an_answer_each(tmp_path: Path) -> None:
    one = kept.Kept(tmp_path, "s")
    one.keep({"a": 1}, "first")
    one.keep({"a": 1}, "second")
    one.keep({"a": 2}, "other")
    again = kept.Kept(tmp_path, "s")
    assert [again.take({"a": 1}) for _ in range(3)] == ["first", "second", None]
    assert again.take({"a": 3}) is None
    assert again.take({"a": 2}) == "other"
    again.drop()
    assert kept.Kept(tmp_path, "s").take({"a": 1}) is None


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_of_something_else_is_no_answer(tmp_path: Path, end: str) -> None:
    one = kept.Kept(tmp_path, "s")
    one.keep({"a": 1}, "first")
    with one.path.open("a") as stream:
        stream.write('{"request": "x", "answer": "y", "sha256": "z"}' + end)
    kept.Kept(tmp_path, "s").keep({"a": 2}, "second")
    again = kept.Kept(tmp_path, "s")
    assert [again.take({"a": 1}), again.take({"a": 2})] == ["first", "second"]
