"""launch/run.py with rewards that an untrained policy can earn, and with places where it gets stuck.

    python -m tests.run_worker [POINT] --config=... (the rest as for launch/run.py)

POINT: `STAGE:STEP` sends the process SIGTERM while it logs that step. A name of STUCK makes it wait for ever
at that place, each in the way that the real thing waits; before, it prints "stuck at POINT" for a test.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app

from fundus_jax import training
from fundus_jax.evaluation import exam
from fundus_jax.grpo import sampler, stream
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.rewards import Score
from fundus_jax.metrics import Metrics
from launch import evaluate, run, stages

# A large eps: where the gradient is nothing but rounding, Adam would make a whole step of its sign.
OPTIM = {"name": "adamw", "lr": 0.01, "eps": 1e-3}
FIELDS = {
    **{"data.train": 36, "data.test": 6, "data.size": 56, "data.workers": 1, "unroll": 1},
    **{"policy.vocab": 400, "policy.width": 32, "policy.layers": 1, "policy.heads": 2, "policy.kv_heads": 1},
    **{"policy.mlp": 48, "policy.vision_width": 32, "policy.vision_layers": 1, "policy.vision_mlp": 48},
    **{"policy.pixels": 56, "base.steps": 2, "base.batch": 4, "base.optim.warmup": 0},
    **{"sft.steps": 10, "sft.batch": 4, "sft.optim.warmup": 2, "sft.max_length": 512},
    **{"grpo.steps": 5, "grpo.prompts_per_step": 4, "grpo.group_size": 2, "grpo.micro_batch": 8},
    **{"grpo.max_new_tokens": 8, "grpo.flat_groups": "keep", "evaluate.questions": 4, "evaluate.before": 4},
    **{"evaluate.sampled": 4, "evaluate.samples": 2, "evaluate.batch": 4},
    **{f"{stage}.optim.{name}": value for stage in ("base", "sft", "grpo") for name, value in OPTIM.items()},
}


def command(workdir: Path, *more: str) -> list[str]:
    """The command line of a run in miniature; a POINT may come first in `more`."""
    point = [word for word in more if not word.startswith("--")]
    words = ["--config=configs/demo.py:quick", f"--workdir={workdir}"]
    words += [f"--config.{name}={value}" for name, value in FIELDS.items()]
    options = [word for word in more if word.startswith("--")]
    return [sys.executable, "-m", "tests.run_worker", *point, *words, *options]


def likes(prompts: Any, index: Any, rollout: Any, judge: Any, config: Any) -> tuple[list, list]:
    """Scores by what was said first, and to which prompt: a reward that came to another row would show."""
    first = np.asarray(rollout.tokens)[:, :, 0]
    totals = [[float((t + prompt) % 3) for t in group] for group, prompt in zip(first, index, strict=True)]
    scores = [
        [Score(answer=0.0, format=0.0, process=0.0, total=total) for total in group] for group in totals
    ]
    return [[f"prompt {prompt}"] * config.group_size for prompt in index], scores


def signal_at(place: str) -> None:
    """Send this process SIGTERM when it logs STAGE:STEP."""
    log = Metrics.log

    def logged(self: Metrics, stage: str, step: int, values: Any) -> None:
        log(self, stage, step, values)
        if place == f"{stage}:{step}":
            print(f"stuck at {place}", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    Metrics.log = logged  # type: ignore[method-assign]


def in_python(work: Callable[[], Any]) -> Any:
    """As for a server's answer: handlers of signals run."""
    time.sleep(10_000)
    return work()


def in_c(work: Callable[[], Any]) -> Any:
    """As while XLA compiles: one call that takes hours, lets other threads run, but no handler."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    return work()


def in_hours(array: jax.Array) -> jax.Array:
    """The array, which is there but will not be computed for hours."""

    @jax.jit
    def spin(array: jax.Array, side: jax.Array) -> jax.Array:
        side = jax.lax.fori_loop(0, 2**31 - 1, lambda _, x: jax.numpy.tanh(x @ x), side)
        return array + (side[0, 0] > 2)

    return spin(array, jax.numpy.ones((512, 512)))  # a CPU would compute anything small before it returns


def on_device(work: Callable[[], Any]) -> Any:
    """As in a long rollout."""
    rollout, counts = work()
    return rollout._replace(tokens=in_hours(rollout.tokens)), counts


def in_slots(work: Callable[[], Any]) -> Any:
    """As in an evaluation whose slots do not end."""
    decode = stream.decode_slots

    def endless(*args: Any) -> Any:
        decoding, ended = decode(*args)
        return decoding, in_hours(ended)

    stream.decode_slots = endless
    return work()


def in_steps(work: Callable[[], Any]) -> Any:
    """As in rollouts and exams that take hours, in many calls."""
    sampler.STEPS = stream.STEPS = 0  # of each
    return work()


# POINT -> module, what is called in it, which call gets stuck, and how
STUCK: dict[str, tuple[Any, str, int, Callable[[Any], Any]]] = {
    "data": (stages.knowledge_base, "run", 1, in_python),
    "compile": (training, "make_step", 2, in_c),  # SFT's; the first is the base stage's
    "rollout": (grpo, "sample", 2, on_device),
    "decode": (sampler, "fill_all", 3, in_steps),
    "judge": (grpo, "score_all", 3, in_python),
    "exam": (exam, "in_order", 1, in_steps),
    "next exam": (exam, "in_order", 2, in_steps),
    "evaluate": (evaluate, "_engine", 1, in_slots),
}


def get_stuck(point: str) -> None:
    """Arm a point of STUCK."""
    module, name, number, wait = STUCK[point]
    work, calls = getattr(module, name), iter(range(1, 1000))

    def called(*args: Any, **named: Any) -> Any:
        if next(calls) != number:
            return work(*args, **named)
        if point == "compile":  # not the making of the step, but its first call
            return lambda *given: stuck(lambda: work(*args, **named)(*given))
        return stuck(lambda: work(*args, **named))

    def stuck(work: Callable[[], Any]) -> Any:
        print(f"stuck at {point}", flush=True)
        return wait(work)

    setattr(module, name, called)


def main(argv: list[str]) -> None:
    """Arm the point, if one is given, and run."""
    grpo.score_all = likes
    point = "" if argv[1].startswith("--") else argv.pop(1)
    if point in STUCK:
        get_stuck(point)
    elif point:
        signal_at(point)
    app.run(run.main, argv)


if __name__ == "__main__":
    main(sys.argv)
