"""When a judge that fails stops the run: the window, its bound before it is full, and after a restart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fundus_jax.grpo.abstentions import Abstentions
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.rewards import Score
from fundus_jax.records import ConfigError, Verdict

CONFIG, STEPS = GrpoConfig(), 1000  # 0.2 over 50 steps


def step(asked: int, failed: int, why: str = "no answer within 60 s") -> list[list[Score]]:
    """One group with so many requests, of which so many have no verdict, and one rollout not asked about."""
    lost = Verdict(rating="abstain", reference="findings", reasons=(why,))
    fine = Verdict(rating="flawed", reference="findings", reasons=())
    scores = [Score(answer=0, format=0, process=None, total=None, verdicts=(lost,), asked=1)] * failed
    scores += [Score(answer=0, format=0, process=0, total=0, verdicts=(fine,), asked=1)] * (asked - failed)
    return [[*scores, Score(answer=0, format=0, process=0, total=0, verdicts=(fine,))]]


def steps_until_stopped(window: Abstentions, asked: int, failed: int) -> int:
    for number in range(1, 200):
        try:
            window.add(step(asked, failed))
        except ConfigError:
            return number
    return 0


def test_the_share_is_taken_over_the_window() -> None:
    assert steps_until_stopped(Abstentions(CONFIG, STEPS), asked=10, failed=2) == 0, "20 % is allowed"
    assert steps_until_stopped(Abstentions(CONFIG, STEPS), asked=10, failed=3) == 34, "more than 100 of 500"
    assert steps_until_stopped(Abstentions(CONFIG, STEPS), asked=10, failed=10) == 11, (
        "and not after 50 steps"
    )
    assert steps_until_stopped(Abstentions(CONFIG, 5), asked=10, failed=10) == 2
    assert steps_until_stopped(Abstentions(replace(CONFIG, abstain_window=1), STEPS), asked=10, failed=3) == 1


def test_a_bad_time_is_forgotten_and_the_reason_is_told() -> None:
    window = Abstentions(CONFIG, STEPS)
    for failed in [8] * 10 + [0] * 40 + [8] * 12:
        window.add(step(10, failed))
    for number in range(14):
        assert window.add(step(10, 0)) == {"judge/asked": 10, "judge/abstained": 0}, number
    with pytest.raises(ConfigError, match=r"on 101 of 500 .* 50 steps.*0\.2 .*\(the server sleeps\)"):
        [window.add(step(10, failed, "the server sleeps")) for failed in (5, 0, 0)]
    assert Abstentions(CONFIG, STEPS).add([[]]) == {"judge/asked": 0, "judge/abstained": 0}, (
        "nothing to judge"
    )


def test_a_resumed_run_goes_on_with_the_window(tmp_path: Path) -> None:
    lines, window = [{"stage": "sft", "step": 9, "loss": 1.0}], Abstentions(CONFIG, STEPS)
    for number in range(1, 31):
        lines.append({"stage": "grpo", "step": number, **window.add(step(10, 3))})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert steps_until_stopped(Abstentions(CONFIG, STEPS, path, done=30), asked=10, failed=3) == 34 - 30
    assert steps_until_stopped(Abstentions(CONFIG, STEPS, path, done=20), asked=10, failed=3) == 34 - 20
    assert steps_until_stopped(Abstentions(CONFIG, STEPS, path, done=0), asked=10, failed=3) == 34
