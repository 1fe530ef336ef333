"""Runs that leave stages out: the plan, what is measured, what is exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

from data_pipeline import decisions
from fundus_jax import sft, sharding, training
from fundus_jax.data import open_pool
from fundus_jax.grpo import train as grpo
from fundus_jax.models import load_pretrained, save_pretrained
from fundus_jax.records import ConfigError
from fundus_jax.workdir import Workdir
from launch import evaluate, inherit, programs, run, stages
from launch.config import EvaluateConfig, RunConfig, as_json
from tests import small

FEW = EvaluateConfig(questions=6, before=2, sampled=2, samples=2, batch=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("wanted", ["sft,grpo", "sft", "grpo", ""])
def test_the_plan_follows_from_the_stages(source: Path, tmp_path: Path, wanted: str, given: bool) -> None:
    model = str(source / "policy") if given else ""
    trainer = small.open_run(tmp_path, source, small.config(stages=wanted, model=model))
    plan = [*([] if given else ["base"]), *wanted.split(",")] if wanted else ([] if given else ["base"])
    assert list(trainer.plan) == plan
    assert trainer.work.stages == trainer.plan
    assert trainer.last == (plan[-1] if plan else "base")
    assert trainer.reached == ([] if plan else ["base"])  # nothing has been trained yet
    trainer.work.close()


def test_epochs_are_counted_where_no_steps_are_given(source: Path, tmp_path: Path) -> None:
    sft = dataclasses.replace(small.config().sft, steps=0, epochs=2.0, batch=4)
    trainer = small.open_run(tmp_path, source, small.config(sft=sft))
    assert trainer.plan["sft"] == len(trainer.rows.packs) * 2 // 4 > 1
    trainer.work.close()


def test_a_given_model_is_measured_and_exported_as_it_is(source: Path, tmp_path: Path) -> None:
    maker = small.open_run(tmp_path / "maker", source, small.config())
    model = save_pretrained(small.stir(maker.start()), maker.processor, tmp_path / "model")
    maker.work.close()
    data = dataclasses.replace(small.config().data, probe_tasks="disease", grpo_tasks="disease")
    config = small.config(model=str(model), stages="", evaluate=FEW, data=data)
    trainer = small.open_run(tmp_path / "run", source, config)
    found = evaluate.measure(config, trainer.work, trainer)
    assert list(found["stages"]) == ["base"]
    assert (
        found["stages"]["base"]["greedy"]["items"] == FEW.questions
    )  # all that are asked, as it is what the run is for
    assert found["stages"]["base"]["sampled"]["n"] == FEW.sampled * FEW.samples
    exported = load_pretrained(stages.export(trainer.work, trainer))[0]
    a, b = (training.split(one)[1] for one in (exported, load_pretrained(model)[0]))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
    assert not (trainer.work.path / "adapter").exists()
    trainer.work.close()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_what_is_measured_has_the_dtype_it_was_trained_in(source: Path, tmp_path: Path, compute: str) -> None:
    maker = small.open_run(tmp_path / "maker", source, small.config())
    model = save_pretrained(small.stir(maker.start()), maker.processor, tmp_path / "model")
    maker.work.close()
    config = small.config(model=str(model), stages="", compute=compute)
    trainer = small.open_run(tmp_path / "run", source, config)
    engine: Any = evaluate._engine(config, trainer, "base")
    trainer.work.close()
    found, masters = (training.split(one)[1] for one in (engine.model, trainer.after("base")))
    wanted = training.cast(masters, compute)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {compute}
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, wanted)))


def test_a_mesh_that_does_not_divide_a_micro_batch_is_refused(source: Path, tmp_path: Path) -> None:
    """By the loops and by what plans them: each device would compute all of its rows."""
    mesh = sharding.parse_mesh("fsdp:8")
    config = small.config(
        model=str(source / "policy"),
        sft=dataclasses.replace(small.config().sft, batch=8, micro_batches=2),
        grpo=dataclasses.replace(small.config().grpo, prompts_per_step=16, micro_batch=8),
    )
    trainer = small.open_run(tmp_path, source, config, mesh)
    work, none = trainer.work, cast(Any, None)  # what is not come to
    pieces = r"sft\.batch 8 in 2 pieces: 4 rows", r"grpo\.prompts_per_step 16 in 4 pieces: 4 rows"
    for stage, words in zip(("sft", "grpo"), pieces, strict=True):
        with pytest.raises(ConfigError, match=words):
            programs.STAGES[stage](programs.Abstract(config, mesh))
    with pytest.raises(ConfigError, match=pieces[0]):
        sft.train(work, none, trainer.rows, trainer.processor, config.sft, mesh)
    with pytest.raises(ConfigError, match=pieces[1]):
        grpo.train(work, none, none, trainer.judge, config.grpo, mesh)
    slots = dataclasses.replace(config.grpo, micro_batch=32, slots=4)
    with pytest.raises(ConfigError, match=r"grpo\.slots 4: 4 rows"):
        grpo.train(work, none, none, trainer.judge, slots, mesh)
    work.close()


def test_a_stage_that_the_run_leaves_out_is_refused_by_name(tmp_path: Path) -> None:
    config: RunConfig = small.config(stages="grpo")
    with pytest.raises(ConfigError, match=r"--stage=sft, but --config.stages is 'grpo', which leaves it out"):
        run.run(config, tmp_path / "run", "data:1", "sft")
    assert not (tmp_path / "run").exists()


def test_prompts_without_a_trace_are_scored_without_one(source: Path, tmp_path: Path) -> None:
    """Through the loop's own function: the format reward follows `prompt.think`."""
    from fundus_jax.grpo.judge import RulesJudge
    from fundus_jax.grpo.rollout import Rollout

    for think in (True, False):
        prompt = dataclasses.replace(small.config().prompt, think=think)
        config = small.config(
            prompt=prompt, grpo=dataclasses.replace(small.config().grpo, process_weight=0.0)
        )
        trainer = small.open_run(tmp_path / str(think), source, config)
        prompts = grpo.Prompts(trainer.pool, trainer.processor, prompt, 512)
        example, tokenizer = prompts.rows[0][0], trainer.processor.tokenizer
        ids = tokenizer.encode(f"<answer>{example.answer}</answer><|im_end|>")
        tokens = np.asarray(getattr(ids, "ids", ids))[None, None]
        rollout = Rollout(tokens, np.zeros(tokens.shape, np.float32), np.ones(tokens.shape, bool))
        texts, scores = grpo.score_all(prompts, np.array([0]), rollout, RulesJudge(), config.grpo)
        assert texts[0][0].startswith("<answer>")
        assert (scores[0][0].answer, scores[0][0].format) == (1, float(not think))
        assert json.dumps(dataclasses.asdict(scores[0][0]))
        trainer.work.close()


def test_decisions_reach_what_is_trained_on(source: Path, tmp_path: Path) -> None:
    """A trace that a reviewer rejects is gone from SFT's rows, also in a run that takes the data over; and
    the workdir refuses to go on once others hold."""
    before = open_pool(source / "data", "train")
    name, trace = next((name, one) for name, one in before.traces.items() if one.kept)
    ledger = decisions.Ledger.open(tmp_path / "decisions", "anna")
    ledger.add(name, decisions.trace_sha256(trace), "reject", "wrong place")
    config = small.config()
    config.data.decisions = str(tmp_path / "decisions")
    work = Workdir(tmp_path / "run", as_json(config))
    assert inherit.Heir(work, as_json(config), source).take_data()
    stages.prepare_data(config, work)
    after = open_pool(work.path / "data", "train")
    assert before.traces.keys() - after.traces.keys() == {name}
    assert len(after.examples) == len(before.examples), "the question and its answer stay"
    work.close()
    ledger.add(name, decisions.trace_sha256(trace), "accept")
    ledger.close()
    with pytest.raises(ConfigError, match="decided: "):
        Workdir(tmp_path / "run", as_json(config))
