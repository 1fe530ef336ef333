"""What a signal does to a program in each of its states; tests/faults/test_stop.py stops whole runs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from fundus_jax import stop
from fundus_jax.stop import Stopped


@pytest.fixture(autouse=True)
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The handlers without the thread, which would end the tests; and nothing was wanted yet."""
    monkeypatch.setattr(stop, "_wanted", 0)
    before = [signal.signal(number, stop._handle) for number in stop.SIGNALS]
    yield
    for number, handler in zip(stop.SIGNALS, before, strict=True):
        signal.signal(number, handler)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # handlers run between two steps of the interpreter


def test_where_nothing_is_to_be_saved_it_stops_at_once() -> None:
    with pytest.raises(Stopped) as stopped:
        send(signal.SIGINT)
    assert stopped.value.code == 130
    assert stop.requested() == signal.SIGINT


def test_a_loop_goes_on_to_its_next_check() -> None:
    steps = []

    def loop() -> None:
        for step in range(5):
            stop.check()
            if step == 2:
                send()
                send()  # a second one changes nothing
            steps.append(step)

    with pytest.raises(Stopped) as stopped, stop.deferred():
        loop()
    assert steps == [0, 1, 2]
    assert stopped.value.code == 143


def test_the_end_of_a_loop_is_a_check() -> None:
    with pytest.raises(Stopped), stop.deferred():
        send()
    stop._wanted = 0
    with stop.deferred():
        pass


def test_what_changes_nothing_is_left_in_the_middle() -> None:
    reached = []

    def ask() -> str:
        send()
        reached.append("what comes after")
        return "an answer"

    with pytest.raises(Stopped), stop.deferred():
        stop.interruptible(ask)
    assert not reached
    with pytest.raises(Stopped), stop.deferred():
        stop.interruptible(lambda: reached.append("begun though a stop was wanted"))
    assert not reached
    stop._wanted = 0
    with stop.deferred():
        assert stop.interruptible(lambda: "an answer") == "an answer"
        assert stop._deferred == 1, "the loop around is as careful as before"


def test_what_waits_in_an_event_loop_is_cancelled_and_nothing_is_raised_amid_it() -> None:
    """Raised in a callback, the wish was lost ("Exception ignored in"); raised in the code of a connection,
    it came out as that one's error."""
    seen: list[Any] = []

    async def ask() -> str:
        asyncio.get_running_loop().call_soon(send)
        try:
            await asyncio.sleep(30)
        except BaseException as error:
            seen.append(type(error))
            raise
        return "an answer"

    begun = time.monotonic()
    with pytest.raises(Stopped) as stopped, stop.deferred():
        stop.interruptible(lambda: stop.run(ask()))
    assert stopped.value.code == 143
    assert seen == [asyncio.CancelledError]
    stop._wanted = 0
    with pytest.raises(Stopped):
        stop.run(ask())
    assert time.monotonic() - begun < 25, "it did not sleep to the end"


def test_in_a_careful_place_an_event_loop_comes_to_its_end() -> None:
    async def ask() -> str:
        send()
        await asyncio.sleep(3 * stop.LOOK)
        return "an answer"

    said = []
    with pytest.raises(Stopped), stop.deferred():
        said.append(stop.run(ask()))
    assert said == ["an answer"]
    stop._wanted = 0

    async def cancels() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        stop.run(cancels())
    assert stop._deferred == 0


def test_arrays_are_waited_for() -> None:
    tree = {"a": jnp.arange(3) * 2, "b": 1}
    assert stop.settle(tree) is tree
    assert tree["a"].is_ready()  # type: ignore[attr-defined]
    stop._wanted = signal.SIGTERM
    with pytest.raises(Stopped):
        stop.settle(tree)
