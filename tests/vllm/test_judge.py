"""GRPO with a real vLLM as the judge: five steps, and three in which the server is killed and comes back."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.chat import ChatConfig
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.judge import Request
from fundus_jax.grpo.judge_server import JudgeConfig, ServerJudge, make_judge
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import Verdict
from tests import small
from tests.grpo.test_judge_server import SAYS
from tests.vllm.conftest import NAME, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def make(vllm: Vllm) -> ServerJudge:
    server = ChatConfig(address=vllm.address, model=NAME, concurrency=4, timeout=120, deadline=240)
    config = JudgeConfig(kind="server", server=server, answer_tokens=1024)
    config.validate()
    judge = make_judge(config)
    assert isinstance(judge, ServerJudge)
    return judge


def run(path: Path, source: Path, judge: Any, steps: int) -> list[dict[str, Any]]:
    """Metrics of so many steps of a policy that says one of SAYS, by its first token."""
    config = dataclasses.replace(small.config().grpo, steps=steps, save_every=1)
    trainer = small.open_run(path, source, small.config(grpo=config))
    trainer.plan = trainer.work.stages = {"grpo": config.steps}
    prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, trainer.config.prompt, 512)
    try:
        grpo.train(trainer.work, small.bigram(trainer), prompts, judge, config, trainer.mesh)
    finally:
        trainer.work.close()
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processor, "decode", lambda self, tokens, **_: SAYS[int(tokens[0]) % len(SAYS)])


def check(path: Path, lines: list[dict[str, Any]]) -> None:
    """Every trace that had to be rated was, by the model."""
    assert sum(line["judge/asked"] for line in lines) >= len(lines)
    assert [line["judge/abstained"] for line in lines] == [0] * len(lines)
    assert [line["abstain"] for line in lines] == [0] * len(lines)
    assert all(0 <= line["reward/agreement"] <= 1 for line in lines if line["judge/asked"])
    for file in sorted((path / "rollouts").glob("*.jsonl")):
        for group in map(json.loads, file.read_text().splitlines()):
            assert all(one["total"] is not None for one in group["rollouts"])
            verdicts = [verdict for one in group["rollouts"] for verdict in one["verdicts"]]
            assert not [verdict for verdict in verdicts if verdict["rating"] == "abstain"]


def test_five_steps(vllm: Vllm, data: Path, tmp_path: Path) -> None:
    lines = run(tmp_path, data, make(vllm), 5)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["judge/answer_tokens"] > 0 for line in lines if line["judge/asked"])
    check(tmp_path, lines)


class Killing:
    """The judge, with something that happens right after the first requests of one step are sent."""

    def __init__(self, judge: ServerJudge, step: int, action: Callable[[], None]) -> None:
        self.judge, self.step, self.action, self.calls = judge, step, action, 0

    def __call__(self, requests: list[Request]) -> list[Verdict]:
        self.calls += 1
        if self.calls == self.step:
            threading.Timer(0.2, self.action).start()
        return self.judge(requests)

    def metrics(self) -> dict[str, float]:
        return self.judge.metrics()


def test_the_server_is_killed_and_comes_back(vllm: Vllm, data: Path, tmp_path: Path) -> None:
    def kill_and_restart() -> None:
        vllm.kill()
        threading.Timer(5.0, vllm.start).start()

    judge = Killing(make(vllm), 2, kill_and_restart)
    lines = run(tmp_path, data, judge, 3)
    assert [line["step"] for line in lines] == [1, 2, 3]
    retries = sum(line["judge/retries"] for line in lines)
    assert retries >= judge.judge.chat.config.breaker, "the server was lost, and looked for"
    assert not judge.judge.chat.endpoints.lost
    check(tmp_path, lines)
