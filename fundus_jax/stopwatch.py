"""Seconds of each phase of a step, and the programs that were compiled meanwhile.

Shapes are static, so once each has been seen a step compiles nothing. What is compiled again and again has a
shape that follows the data, and can take longer than the work. Neighbours: the loops, whose metrics these
are.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any

import jax
from absl import logging

COMPILED = "/jax/core/compile/backend_compile_duration"  # also of programs that a cache on disk has
_programs = 0  # compiled by this process


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    global _programs
    del duration_secs
    _programs += event == COMPILED


jax.monitoring.register_event_duration_secs_listener(_listen)


class Stopwatch:
    """Of the steps of `stage`: seconds spent in named phases since the last `lap`, and programs compiled
    since then: `with watch("rollout", shapes): ...`.

    `shapes`: what the phase is compiled for, where its steps differ in that by design. A step whose phases
    have all been there with their shapes should compile nothing. The first that does may have come upon
    something rare; the second is warned of, once.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._spent: dict[str, float] = {}
        self._name, self._start = "", 0.0
        self._here: set[tuple[str, Hashable]] = set()
        self._known: set[tuple[str, Hashable]] = set()
        self._programs, self._surprises = _programs, 0

    def __call__(self, name: str, shapes: Hashable = None) -> Stopwatch:
        self._name = name
        self._here.add((name, shapes))
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._spent[self._name] = self._spent.get(self._name, 0.0) + time.perf_counter() - self._start

    def lap(self, step: int) -> dict[str, float]:
        """{"time/<phase>": seconds, "compiles": programs} since the last call; `step` has ended."""
        spent, self._spent = self._spent, {}
        compiles, self._programs = _programs - self._programs, _programs
        if compiles and self._here <= self._known:
            self._surprises += 1
            if self._surprises == 2:
                logging.warning(
                    "%s: step %d compiled %d programs, though its shapes were known, and so did one before "
                    "(compiles in metrics.jsonl); a shape follows the data: JAX_LOG_COMPILES=1 names it",
                    *(self.stage, step, compiles),
                )
        self._known |= self._here
        self._here.clear()
        return {f"time/{name}": seconds for name, seconds in spent.items()} | {"compiles": float(compiles)}
