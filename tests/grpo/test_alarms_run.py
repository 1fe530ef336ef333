"""GRPO runs with rewards that ask to be gamed: each alarm is provoked, seen in every place, and survives.

The policy is a script: at each place of a reply it says one token of a good reply nearly always, and now and
then another. So it starts well, and every way to game a reward is open to it; what it learns is GRPO's doing.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax.grpo import own_rewards
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.alarms import RULES, AlarmConfig
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.show import Diary
from fundus_jax.models import read_config
from fundus_jax.models.batch import Batch
from fundus_jax.models.layers import Options
from fundus_jax.models.qwen2_5_vl.model import Prompt
from fundus_jax.records import ConfigError
from fundus_jax.report import write_report
from tests import small

GOOD = "<think>The image shows drusen.</think> <answer>Normal</answer>"
STRAY = (" the", ".", "rusen")  # what it says now and then instead, a token each
TOKENS = 48
REWARDS = '''"""What one should not reward."""


def long(facts):
    return facts.text.count(" the")


def short(facts):
    return -facts.tokens


def silent(facts):
    return -sum(letter.isalpha() for letter in facts.think or "") if facts.answer else -30


def broken(facts):
    return facts.findings.colour
'''


class Script(nnx.Module):
    """A policy of which only the interface is Qwen2.5-VL's: the next token depends on its place alone."""

    def __init__(self, config: Any, says: np.ndarray) -> None:
        self.config, self.options = config, Options()
        self.output = nnx.Param(jnp.asarray(says, jnp.float32))  # [V,N], logits by place

    @property
    def head(self) -> jax.Array:
        return self.output.get_value()

    def at(self, place: Any) -> jax.Array:
        return jax.nn.one_hot(place, self.head.shape[1])

    def prefill(self, batch: Batch) -> Prompt:
        rows = batch.tokens.shape[0]
        begun = jnp.zeros(rows, jnp.int32)
        return Prompt(jnp.zeros((rows, 1)), self.at(begun), begun)  # type: ignore[arg-type]

    def extend(self, prompt: Prompt, tokens: jax.Array) -> jax.Array:
        return jnp.broadcast_to(
            self.at(jnp.arange(1, tokens.shape[2] + 1)), (*tokens.shape, self.head.shape[1])
        )

    def stepper(self) -> ScriptStepper:
        return ScriptStepper(config=self.config, output=self.head)

    def stepper_of(self) -> ScriptStepper:
        return self.stepper()

    def decoding_layer(self, index: jax.Array) -> jax.Array:
        return index


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ScriptStepper:
    """What `Script` decodes with."""

    config: Any = field(metadata={"static": True})
    output: jax.Array
    layers: tuple[jax.Array, ...] = ()

    def remember(self, prefix: Any) -> Any:
        return prefix

    def empty_cache(self, memory: jax.Array, group: int, columns: int) -> jax.Array:
        del memory, group, columns
        return jnp.zeros(())

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.output.T

    def __call__(
        self, memory: jax.Array, cache: Any, tokens: jax.Array, where: jax.Array, *more: jax.Array
    ) -> tuple[jax.Array, Any]:
        hidden = jax.nn.one_hot(where + 1, self.output.shape[1])[:, None]
        return jnp.broadcast_to(hidden, (*tokens.shape, hidden.shape[-1])), cache


def script(trainer: Any) -> Script:
    """A policy that says GOOD, and STRAY now and then."""
    tokenizer, (end,) = trainer.processor.tokenizer, trainer.processor.eos_ids
    config = read_config(trainer.hf_dir)
    says = np.full((config.vocab_size, TOKENS), -4.0)
    stray = [token for word in STRAY for token in tokenizer.encode(word, add_special_tokens=False)]
    assert len(stray) == len(STRAY), tokenizer.convert_ids_to_tokens(stray)
    says[[*stray, end]] = 1.0
    says[stray[0]] = 2.0
    good = [*tokenizer.encode(GOOD, add_special_tokens=False), end]
    says[good, range(len(good))] = 6.0
    says[stray, len(good) - 1] = 4.0  # more often where it should end,
    says[stray[1], 2 : good.index(stray[1])] = 3.0  # and a full stop within the trace
    return Script(config, says)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "bad_ideas.py"
    path.write_text(REWARDS)
    return path


def config(rewards: Path, name: str, **changes: Any) -> GrpoConfig:
    """A stage under one bad reward."""
    values: dict[str, Any] = {
        "steps": 80, "prompts_per_step": 4, "group_size": 8, "micro_batch": 32, "max_new_tokens": TOKENS,
        "process_weight": 0.0, "kl_coef": 0.001, "optim": small.optim(name="adamw", lr=0.3),
        "rewards": f"{rewards}:{name}*0.5", "alarms": AlarmConfig(window=4),
    }  # fmt: skip
    return GrpoConfig(**{**values, **changes})


def run(path: Path, source: Path, config: GrpoConfig) -> list[dict[str, Any]]:
    """The stage, as `launch` would run it; what alarms.jsonl says."""
    config.validate()
    trainer = small.open_run(path, source, small.config(grpo=config))
    trainer.plan = trainer.work.stages = {"grpo": config.steps}
    pool = trainer.grpo_pool()
    pool = replace(pool, examples=[one for one in pool.examples if one.answer == "Normal"])
    prompts = grpo.Prompts(pool, trainer.processor, trainer.config.prompt, 512)
    try:
        grpo.train(trainer.work, script(trainer), prompts, RulesJudge(), config, trainer.mesh)
    finally:
        trainer.work.close()
    return told(path)


def told(path: Path) -> list[dict[str, Any]]:
    file = path / "alarms.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


PROVOKED = {
    "long": {"length_growth", "repetition", "outside", "kl"},
    "short": {"length_collapse", "malformed", "hollow_reward", "entropy"},
    "silent": {"empty_think"},
    "broken": {"failing_broken"},
}


def test_every_alarm_is_provoked_here() -> None:
    assert set().union(*PROVOKED.values()) == {*(rule.name for rule in RULES), "failing_broken"}


@pytest.mark.parametrize("name", PROVOKED)
def test_a_bad_reward_raises_its_alarms(
    name: str, source: Path, tmp_path: Path, rewards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "run"
    with caplog.at_level(logging.WARNING, logger="absl"):
        alarms = run(work, source, config(rewards, name, steps=8 if name == "broken" else 80))
    assert {one["name"] for one in alarms} >= PROVOKED[name]
    lines = steps(work)
    report = write_report(work).read_text()
    for one in alarms:
        assert f"ALARM {one['name']} at step {one['step']}: " in caplog.text
        assert lines[one["step"] - 1][f"alarm/{one['name']}"] == 1
        page = (work / "rollouts" / f"{one['step']:06d}.html").read_text()
        for text in (report, page):
            assert f"<b>{one['name']}</b>" in text
    assert all(line[f"reward/{name}_abstained"] == (32 if name == "broken" else 0) for line in lines)
    if name == "broken":
        assert "abstained on 32 of 32 rollouts: AttributeError: 'Findings' object has no" in caplog.text
        assert "broken abstained – AttributeError" in report
        assert all("reward/total" not in line and line["abstain"] == 1 for line in lines)


def test_an_alarm_may_stop_the_run_and_the_same_command_goes_on(
    source: Path, tmp_path: Path, rewards: Path
) -> None:
    stage = config(rewards, "broken", steps=7, save_every=3, alarms=AlarmConfig(window=4, stop=True))
    with pytest.raises(ConfigError, match=r"stopped after step 4 \(failing_broken: .* 32\.0 of 32 rollouts"):
        run(tmp_path / "run", source, stage)
    assert [line["step"] for line in steps(tmp_path / "run")] == [1, 2, 3, 4]
    first = told(tmp_path / "run")
    assert run(tmp_path / "run", source, stage) == first, "an alarm that goes on is no new one"
    lines = steps(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["alarm/failing_broken"] for line in lines] == [0, 0, 0, 1, 1, 1, 1]


def test_what_a_resumed_run_will_see_again_is_taken_back(source: Path, tmp_path: Path, rewards: Path) -> None:
    stage = config(rewards, "broken", steps=5, save_every=3, show_every=2)
    trainer = small.open_run(tmp_path / "run", source, small.config(grpo=stage))
    with (tmp_path / "run" / "alarms.jsonl").open("w") as file:
        for step in (2, 9):
            file.write(json.dumps({"name": "kl", "step": step, "reason": "far away"}) + "\n")
        file.write('{"name": "kl", "st')  # the power went
    for step in range(1, 4):
        trainer.work.metrics.log("grpo", step, {"reward/broken_abstained": 32.0})
    alarms = Diary(trainer.work, stage, None, own_rewards.load(stage.rewards), 3).alarms
    trainer.work.close()
    assert [one["step"] for one in told(tmp_path / "run")] == [2]
    (begun,) = alarms.check(4, {"reward/broken_abstained": 32.0})
    assert (begun.name, begun.step) == ("failing_broken", 4), "steps 1 to 3 were read in"
