"""A run of positioned traces from data to rollouts: traces, prompts, reward and items have the same boxes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fundus_jax import dialog, localisation
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.items import Selection
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.sft import PromptConfig
from fundus_jax.workdir import Workdir
from launch import stages
from launch.config import as_json
from launch.stages import Trainer
from tests import small

MOST = 2


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with data of its own."""
    prompt = PromptConfig(style="open", think=True, instruct=False, boxes=MOST)
    objective = replace(small.config().grpo, steps=1, localisation_weight=1.0)
    config = small.config(prompt=prompt, grpo=objective)
    config.validate()
    path = tmp_path_factory.mktemp("positioning")
    work = Workdir(path, as_json(config))
    stages.prepare_data(config, work)
    return Trainer(config, work, small.one_device())


def test_every_trace_says_the_boxes_that_the_reward_looks_for(trainer: Trainer) -> None:
    prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, trainer.config.prompt, 512)
    asked = {example.id: example for example, _ in prompts.rows}
    assert {trace.kept for trace in trainer.pool.traces.values()} == {True}
    placed = 0
    for example, reply in trainer.rows.rows:
        think = dialog.parse(reply).think or ""
        there = asked[example.id].boxes
        assert all([box.finding for box in there].count(box.finding) <= MOST for box in there)
        assert bool(there) == ("<box>" in think)
        if there:
            assert localisation.score(think, there) == 1
            placed += 1
    assert placed > 10


def test_the_items_ask_for_the_same_boxes(trainer: Trainer) -> None:
    source = trainer.work.path / "data" / "examples"
    selection = Selection(split="train", style="open", instruct=False, boxes=MOST)
    prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, trainer.config.prompt, 512)
    items = {item.id: item for item in PhantomBenchmark(source, selection).items}
    for example, _ in prompts.rows:
        boxes = items[example.id].boxes
        assert boxes == (None if example.task == "modality" else example.boxes)


def test_a_step_of_grpo_logs_and_shows_the_part(trainer: Trainer) -> None:
    trainer.plan = trainer.work.stages = {"grpo": 1}
    prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, trainer.config.prompt, 512)
    objective: GrpoConfig = trainer.config.grpo
    grpo.train(trainer.work, small.bigram(trainer), prompts, RulesJudge(), objective, trainer.mesh)
    trainer.work.close()
    folder: Path = trainer.work.path
    (line,) = (json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines())
    assert line["reward/localisation"] == 0, "a policy of no skill says no box"
    (shown,) = (folder / "rollouts").glob("*.jsonl")
    rollouts = [one for text in shown.read_text().splitlines() for one in json.loads(text)["rollouts"]]
    assert {one["localisation"] for one in rollouts} <= {0.0, None}
