"""Runs that leave stages out: the plan, what is measured, what is exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data_pipeline import decisions
from fundus_jax import data, sharding, training
from fundus_jax.data import open_pool
from fundus_jax.grpo import train as grpo
from fundus_jax.models import load_pretrained, save_pretrained
from fundus_jax.records import ConfigError
from fundus_jax.workdir import Workdir
from launch import evaluate, inherit, planning, programs, run, stages
from launch.config import EvaluateConfig, RunConfig, as_json, check_mesh
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


def test_a_start_reads_no_picture_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SFT has measured, GRPO does not measure again."""
    read, load = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda folder, key: read.append(key) or load(folder, key))
    trainer = small.open_run(tmp_path, source, small.config())
    assert len(trainer.rows.rows) > 0
    assert len(trainer.prompts.rows) > 0
    assert len(read) == len(set(read)) == len({example.image for example in trainer.pool.examples})
    trainer.work.close()


def test_epochs_of_grpo_are_over_the_prompts_that_it_draws_from(source: Path, tmp_path: Path) -> None:
    """Of its tasks, of the patients that SFT leaves to it, and not too long."""
    small_run = small.config()
    data = dataclasses.replace(small_run.data, sft_part=0.5)
    changes = {"data": data, "prompt": dataclasses.replace(small_run.prompt, style="options")}
    grpo = dataclasses.replace(small_run.grpo, steps=0, epochs=3.0, prompts_per_step=2, micro_batch=4)
    trainer = small.open_run(tmp_path / "all", source, small.config(grpo=grpo, max_prompt=512, **changes))
    count = len(trainer.prompts.rows)
    assert trainer.plan["grpo"] == count * 3 // 2
    assert 1 < count == len(trainer.grpo_pool().examples) < len(trainer.pool.examples)
    sizes = [
        trainer.processor.row_size(text, [trainer.pool.image(one)])[0] for one, text in trainer.prompts.rows
    ]
    trainer.work.close()
    config = small.config(grpo=grpo, max_prompt=max(sizes) - 1, **changes)
    trainer = small.open_run(tmp_path / "short", source, config)
    left = sum(size < max(sizes) for size in sizes)
    assert trainer.plan["grpo"] == left * 3 // 2 < count * 3 // 2
    trainer.work.close()


def test_programs_are_built_without_a_pool(source: Path) -> None:
    """`launch/compile.py` has no data: where epochs decide, it does not need the number of steps."""
    parts = (small.config().sft, small.config().grpo)
    sft, grpo = (dataclasses.replace(part, steps=0) for part in parts)
    config = small.config(model=str(source / "policy"), max_pixels=56 * 56, sft=sft, grpo=grpo)
    policy = programs.Abstract(config, small.one_device())
    for stage in ("sft", "grpo"):
        assert programs.STAGES[stage](policy).programs[-1].name == "update"


def test_every_program_of_a_step_of_grpo_is_built(source: Path) -> None:
    """With a reference its scores, and before several updates on the same rollouts the policy's own."""
    found = []
    for kl_coef, mu in ((0.0, 1), (0.1, 1), (0.0, 2), (0.1, 2)):
        grpo = dataclasses.replace(small.config().grpo, kl_coef=kl_coef, mu=mu)
        config = small.config(model=str(source / "policy"), max_pixels=56 * 56, grpo=grpo)
        built = programs.STAGES["grpo"](programs.Abstract(config, small.one_device()))
        found.append([one.name for one in built.programs if one.name.startswith("score")])
        assert built.programs[-1].times == mu
    assert found == [[], ["score"], ["score policy"], ["score", "score policy"]]


@pytest.mark.parametrize(
    ("program", "changes", "wanted", "absent"),
    [
        ("update", {"micro_batch": 8}, "more micro-batches, shorter", "slots"),
        ("update", {"micro_batch": 4}, "shorter sft.max_length", "more micro-batches"),  # one row a piece
        ("decode", {"slots": 0}, "fewer grpo.slots", "micro-batches"),
        ("decode", {"slots": 1}, "shorter sft.max_length", "grpo.slots"),
    ],
)
def test_what_is_too_large_is_told_what_can_be_changed(
    program: str, changes: dict, wanted: str, absent: str
) -> None:
    grpo = dataclasses.replace(small.config().grpo, prompts_per_step=4, group_size=4, **changes)
    config = small.config(grpo=grpo, remat="block")
    told = planning.smaller(config, small.one_device(), "grpo", program)
    assert told.startswith(wanted)
    assert absent not in told
    assert "remat" not in told
    config.remat = "none"
    assert "more recomputing (remat)" in planning.smaller(config, small.one_device(), "grpo", "update")


def test_a_warmup_longer_than_the_epochs_is_refused_before_anything_is_trained(
    source: Path, tmp_path: Path
) -> None:
    grpo = dataclasses.replace(small.config().grpo, steps=0, epochs=0.1, optim=small.optim(warmup=500))
    with pytest.raises(ConfigError, match=r"grpo\.optim\.warmup is 500 of [0-9]+ updates"):
        small.open_run(tmp_path, source, small.config(grpo=grpo))


def test_a_model_without_end_ids_ends_as_its_tokenizer_does_after_training_too(
    source: Path, tmp_path: Path
) -> None:
    maker = small.open_run(tmp_path / "maker", source, small.config())
    model = save_pretrained(maker.start(), maker.processor, tmp_path / "model")
    maker.work.close()
    (model / "generation_config.json").unlink()
    told = json.loads((model / "config.json").read_text())
    told.pop("eos_token_id")
    (model / "config.json").write_text(json.dumps(told))
    sft = dataclasses.replace(small.config().sft, steps=1, epochs=0)
    trainer = small.open_run(tmp_path / "run", source, small.config(model=str(model), sft=sft, stages="sft"))
    trainer.run("sft")
    assert trainer.after("sft").config.eos_ids == trainer.processor.eos_ids != ()
    trainer.work.close()


def test_a_given_model_is_measured_and_exported_as_it_is(source: Path, tmp_path: Path) -> None:
    maker = small.open_run(tmp_path / "maker", source, small.config())
    model = save_pretrained(small.stir(maker.start()), maker.processor, tmp_path / "model")
    maker.work.close()
    data = dataclasses.replace(small.config().data, probe_tasks="disease", grpo_tasks="disease")
    config = small.config(model=str(model), stages="", evaluate=FEW, data=data)
    trainer = small.open_run(tmp_path / "run", source, config)
    found = evaluate.measure(config, trainer.work, trainer, *evaluate.questions(config, trainer.work))
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base.batch": 4}, r"base\.batch 4: 4 rows"),
        ({"sft.micro_batches": 2}, r"sft\.batch 8 in 2 pieces: 4 rows"),
        ({"grpo.micro_batch": 8}, r"grpo\.prompts_per_step 16 in 4 pieces: 4 rows"),
        ({"grpo.slots": 4}, r"grpo\.slots 4: 4 rows"),
    ],
)
def test_a_mesh_that_does_not_divide_what_a_stage_cuts_is_refused_before_anything_runs(
    source: Path, tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    """Each device would compute all of the rows. What plans a stage refuses them likewise."""
    config = small.config()
    fields = {"base.batch": 8, "sft.batch": 8, "grpo.prompts_per_step": 16, "grpo.micro_batch": 32} | changes
    for name, value in fields.items():
        stage, _, field = name.partition(".")
        setattr(getattr(config, stage), field, value)
    with pytest.raises(ConfigError, match=words):
        run.run(config, tmp_path / "run", "fsdp:8")
    assert not (tmp_path / "run").exists()
    stage = next(iter(changes)).partition(".")[0]
    if stage in programs.STAGES:
        config.model = str(source / "policy")
        with pytest.raises(ConfigError, match=words):
            programs.STAGES[stage](programs.Abstract(config, sharding.parse_mesh("fsdp:8")))
    others = [name for name in ("base", "sft", "grpo") if name != stage]
    check_mesh(config, sharding.parse_mesh("fsdp:8"), others)  # what is not run is not in the way


def test_questions_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    config = small.config(data=dataclasses.replace(small.config().data, probe_tasks="disease,colour"))
    with pytest.raises(ConfigError, match="no item has task colour: there are disease, modality"):
        run.run(config, tmp_path, "tensor:8")
    assert (tmp_path / "data" / "clean").is_dir()
    assert not (tmp_path / "checkpoints").exists()
    config.evaluate.batch = 0
    with pytest.raises(ConfigError, match=r"evaluate\.batch is 0; it must be at least 1"):
        config.validate()


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
