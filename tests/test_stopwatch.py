"""Phases of a step: their seconds, the programs that were compiled, and the warning where that goes on."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import pytest

from fundus_jax.stopwatch import Stopwatch


def test_phases_add_up_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr("fundus_jax.stopwatch.time.perf_counter", lambda: next(now))
    watch = Stopwatch("sft")
    for name in ("data", "update", "data"):
        with watch(name):
            pass
    assert watch.lap(1) == {"time/data": 4.0, "time/update": 2.0, "compiles": 0}
    assert watch.lap(2) == {"compiles": 0}


def story(steps: list[tuple[str, int, int | None]]) -> list[float]:
    """Programs that each of the steps compiled: (phase, length of its array, what the watch is told)."""
    arrays = {size: jnp.zeros(size) for _, size, _ in steps}  # each of which is a program too
    run, watch, found = jax.jit(lambda x: x * 2 + 1), Stopwatch("grpo"), []
    for number, (name, size, told) in enumerate(steps, 1):
        with watch(name, told):
            run(arrays[size])
        found.append(watch.lap(number)["compiles"])
    return found


def test_new_shapes_and_new_phases_may_compile(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        found = story([("a", 1, 1), ("a", 1, 1), ("a", 2, 2), ("a", 3, 3), ("exam", 4, None), ("a", 2, 2)])
    assert found == [1, 0, 1, 1, 1, 0]
    assert not caplog.records


def test_steps_that_go_on_compiling_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert story([("a", size, None) for size in (1, 1, 2)]) == [1, 0, 1]
        assert not caplog.records, "one may be something rare"
        assert story([("a", size, None) for size in (1, 1, 2, 2, 3, 4)]) == [1, 0, 1, 0, 1, 1]
    (warning,) = caplog.messages
    assert "grpo: step 5 compiled 1 programs, though its shapes were known" in warning
