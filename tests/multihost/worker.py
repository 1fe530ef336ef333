"""launch/run.py with rewards that an untrained policy can earn, and a SIGTERM to itself if a test wants it.

    python -m tests.multihost.worker [STAGE:STEP] --config=... (the rest as for launch/run.py)

The process that is given STAGE:STEP gets SIGTERM while it logs that step; the others learn of it from it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import numpy as np
from absl import app

from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.rewards import Score
from fundus_jax.metrics import Metrics
from launch import run


def likes(prompts: Any, index: Any, rollout: Any, judge: Any, config: Any) -> tuple[list, list]:
    """Scores by what was said first, and by whom: a reward that came to another row or prompt would show."""
    first = np.asarray(rollout.tokens)[:, :, 0]
    totals = [
        [float((token + prompt) % 3) for token in group] for group, prompt in zip(first, index, strict=True)
    ]
    scores = [
        [Score(answer=0.0, format=0.0, process=0.0, total=t, verdict=None) for t in group] for group in totals
    ]
    return [[f"prompt {prompt}"] * config.group_size for prompt in index], scores


def stop_at(place: str) -> None:
    """Send this process SIGTERM when it logs STAGE:STEP."""
    log = Metrics.log

    def logged(self: Metrics, stage: str, step: int, values: Any) -> None:
        log(self, stage, step, values)
        if place == f"{stage}:{step}":
            os.kill(os.getpid(), signal.SIGTERM)

    Metrics.log = logged


if __name__ == "__main__":
    grpo.score_all = likes
    if not sys.argv[1].startswith("--"):
        stop_at(sys.argv.pop(1))
    app.run(run.main)
