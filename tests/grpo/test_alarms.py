"""The rules on made-up series: what raises an alarm, what does not, and what a resumed run still knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fundus_jax.grpo import signs
from fundus_jax.grpo.alarms import RULES, AlarmConfig, Alarms, failing
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.records import ConfigError

CALM = {
    "length": 34.0, "signs/repetition": 0.02, "signs/empty_think": 0.0, "signs/outside": 0.01, "kl": 0.004,
    "entropy": 0.03, "reward/format": 0.99, "reward/answer": 0.86, "reward/total": 2.66,
}  # fmt: skip
NOISE = {name: 0.1 * abs(value) for name, value in CALM.items()} | {"kl": 0.05}
W = 10


def series(steps: int, seed: int = 0, **end: float) -> list[dict[str, Any]]:
    """Steps of a calm run with noise; metrics in `end` (with _ for /) go there from the first window on."""
    random, lines = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        values = {name: value + NOISE[name] * random.normal() for name, value in CALM.items()}
        share = min(max(step - W, 0) / (steps - 2 * W), 1.0)
        for name, value in end.items():
            key = name.replace("_", "/", 1) if name.startswith(("signs", "reward")) else name
            values[key] += share * (value - CALM[key])
        lines.append({"step": step} | values)
    return lines


def raised(lines: list[dict[str, Any]], config: AlarmConfig | None = None) -> list[tuple[str, int]]:
    """(name, step) of each alarm over a series."""
    alarms = Alarms(config or AlarmConfig())
    return [(one.name, one.step) for line in lines for one in alarms.check(line["step"], line)]


@pytest.mark.parametrize("seed", range(20))
def test_a_calm_run_raises_none(seed: int) -> None:
    assert raised(series(120, seed)) == []


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("length_growth", {"length": 100.0}),
        ("length_collapse", {"length": 8.0}),
        ("repetition", {"signs_repetition": 0.4}),
        ("empty_think", {"signs_empty_think": 0.5}),
        ("outside", {"signs_outside": 0.5}),
        ("malformed", {"reward_format": 0.5}),
        ("hollow_reward", {"reward_answer": 0.5, "reward_total": 3.5}),
        ("kl", {"kl": 1.0}),
        ("entropy", {"entropy": 0.001}),
    ],
)
def test_each_sign_raises_its_alarm_once(name: str, end: dict[str, float]) -> None:
    found = raised(series(120, **end))
    assert [one for one, _ in found] == [name]
    assert 2 * W < found[0][1] < 120


def test_every_rule_is_tried_above() -> None:
    (mark,) = test_each_sign_raises_its_alarm_once.pytestmark  # type: ignore[attr-defined]
    assert [name for name, _ in mark.args[1]] == [rule.name for rule in RULES]


def test_what_is_better_than_at_the_start_is_no_alarm() -> None:
    good = {"signs_outside": 0.0, "reward_format": 1.0, "reward_answer": 1.0, "reward_total": 3.0}
    assert raised(series(120, **good)) == []
    assert raised(series(120, reward_answer=0.5, reward_total=1.0)) == [], "the reward has fallen with it"


def test_one_odd_step_is_no_alarm() -> None:
    lines = series(60)
    lines[40]["kl"], lines[41]["length"] = 1e6, 1e6
    assert raised(lines) == []


def test_a_step_that_updates_nothing_says_nothing_of_tokens() -> None:
    """Where all groups are flat and dropped, entropy and KL are means over no token: 0."""
    lines = series(60)
    for line in lines[20:]:
        line.update(tokens=0, entropy=0.0, kl=0.0)
    assert raised(lines) == []


def test_missing_and_undefined_values_are_left_out() -> None:
    lines = series(80, kl=2.0)
    for line in lines[::2]:
        line["kl"] = None if line["step"] % 4 else float("nan")
    assert [name for name, _ in raised(lines)] == ["kl"]
    for line in lines:
        del line["kl"]
    assert raised(lines) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_zero_takes_a_rule_away(rule: Any) -> None:
    alarms = Alarms(AlarmConfig(**{rule.bound: 0}))
    assert rule.name not in {one.name for one in alarms.rules}
    assert f"alarm/{rule.name}" not in alarms.metrics()
    assert Alarms(AlarmConfig(window=0)).metrics() == {}


def test_an_alarm_is_told_once_until_it_has_been_quiet_for_a_window() -> None:
    config = AlarmConfig(window=3)

    def begun(kls: list[float]) -> list[int]:
        lines = [{"step": i, "kl": kl} for i, kl in enumerate(kls, 1)]
        return [step for _, step in raised(lines, config)]

    high, low = 1.0, 0.0
    assert begun([low] * 3 + [high] * 9) == [5]
    assert begun([low] * 3 + [high] * 3 + [low] * 2 + [high] * 3) == [5], "two quiet steps"
    assert begun([low] * 3 + [high] * 3 + [low] * 5 + [high] * 3) == [5, 13]


def test_a_resumed_run_knows_what_an_uninterrupted_one_knows() -> None:
    lines = series(120, kl=1.0, length=90.0)
    whole = Alarms(AlarmConfig())
    for line in lines:
        before = [*whole.check(line["step"], line), whole.met, whole.metrics()]
        if line["step"] in (5, 60, 61, 119):
            resumed = Alarms(AlarmConfig(), past=lines[: line["step"] - 1])
            after = [*resumed.check(line["step"], line), resumed.met, resumed.metrics()]
            assert after == before


def test_a_reward_that_fails_on_nearly_all_rollouts() -> None:
    def check(lost: float) -> dict[str, str]:
        alarms = Alarms(AlarmConfig(window=2), [failing("brief", 16)])
        for step in (1, 2, 3):
            alarms.check(step, {"reward/brief_abstained": lost})
        return alarms.met

    assert check(14) == {}
    assert check(16) == {
        "failing_brief": "the reward brief gives no number on 16.0 of 16 rollouts; the log has the reasons"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 2.5}, "whole number"),
        ({"window": -1}, "at least 0"),
        ({"kl": float("nan")}, "at least 0"),
        ({"length": 0.5}, "above 1"),
        ({"outside": 1.5}, "share"),
        ({"kl": True}, "number"),
        ({"stop": 1}, "true or false"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"grpo.alarms.{next(iter(changes))} is .*{message}"):
        GrpoConfig(alarms=AlarmConfig(**changes)).validate()


def measured(texts: list[str], tokens: list[list[int]], **more: bool) -> dict[str, float]:
    """The signs of one group."""
    width = max(map(len, tokens))
    padded = np.asarray([[row + [0] * (width - len(row)) for row in tokens]])
    mask = np.asarray([[[True] * len(row) + [False] * (width - len(row)) for row in tokens]])
    return signs.measure([texts], Rollout(padded, mask, mask), **more)


def test_the_signs_of_a_step() -> None:
    good = "<think>The image shows drusen.</think> <answer>AMD</answer>"
    empty = "<think>...</think> <answer>AMD</answer>"
    outside = "So: <think>The image shows drusen.</think> <answer>AMD</answer>"
    found = measured([good, empty, outside, "AMD"], [[1, 2, 3, 4, 5, 6]] * 3 + [[7] * 8])
    assert found == {"signs/repetition": 0.8 / 4, "signs/outside": 0.5, "signs/empty_think": 0.25}
    assert "signs/empty_think" not in measured([empty], [[1]], think=False)


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        ("<answer>AMD</answer>", True),
        ("<think></think> <answer>AMD</answer>", True),
        ("<think>\n. AMD it...</think> <answer>AMD</answer>", True),
        ("<think>Drusen are seen.</think> <answer>AMD</answer>", False),
        ("<think>The image shows drus", False),  # cut off: no answer
    ],
)
def test_an_answer_without_a_trace(text: str, empty: bool) -> None:
    assert signs.empty_think(text) is empty


def test_repetition_is_the_share_of_phrases_said_before() -> None:
    assert signs.repetition(np.arange(50)) == 0
    assert signs.repetition(np.asarray([1, 2, 3])) == 0
    assert signs.repetition(np.asarray([5] * 12)) == pytest.approx(8 / 9)
    loop = np.tile(np.arange(6), 10)
    assert signs.repetition(loop) == pytest.approx(1 - 6 / 57)
    assert signs.repetition(np.asarray([1, 2, 3, 4, 9, 4, 3, 2, 1])) == 0, "another order is another phrase"
