"""The GRPO loop on drawn retinas: what it logs and writes, which prompts it takes, and what stops it."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fundus_jax import dialog, stop, training
from fundus_jax.data import round_up
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.show import SHOWN
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, Verdict
from fundus_jax.sft import LENGTH_STEP, PromptConfig
from launch.stages import Trainer
from tests import small

SMALL = small.config().grpo
METRICS = {
    "loss",
    "grad_norm",
    "notfinite",
    "kl",
    "old_kl",
    "entropy",
    "clip_low",
    "clip_high",
    "ratio_mean",
    "ratio_max",
    "tokens",
    "sampler_gap",
    "zero_variance",
    "too_few",
    "abstain",
    "reward",
    "reward_std",
    "length",
    "length_max",
    "sampler/occupancy",
    "sampler/steps",
    "sampler/fills",
    "reward/answer",
    "reward/format",
    "reward/total",
    "reward/not_applicable",
    "judge/asked",
    "judge/abstained",
    "signs/repetition",
    "signs/empty_think",
    "signs/outside",
    "alarm/kl",
    "alarm/length_growth",
    "compiles",
    "time/data",
    "time/rollout",
    "time/score",
    "time/judge",
    "time/update",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


def run(
    path: Path, source: Path, config: GrpoConfig, judge: Any = None, **changes: Any
) -> tuple[Trainer, training.Params, list[dict]]:
    """The stage from a stirred policy; (trainer, parameters, metrics)."""
    trainer = small.open_run(path, source, small.config(grpo=config, **changes))
    prompts, model = trainer.prompts, small.bigram(trainer)
    trainer.plan = trainer.work.stages = {"grpo": config.total_steps(len(prompts.rows))}
    try:
        params = grpo.train(trainer.work, model, prompts, judge or RulesJudge(), config, trainer.mesh)
    finally:
        trainer.work.close()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return trainer, params, lines


def test_a_few_steps(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "score_all", whims)  # an untrained policy earns nothing, so nothing would move
    trainer, params, lines = run(tmp_path, source, replace(SMALL, steps=3, save_every=2))
    assert [(line["stage"], line["step"]) for line in lines] == [("grpo", 1), ("grpo", 2), ("grpo", 3)]
    for line in lines:
        assert line.keys() >= METRICS, METRICS - line.keys()
        assert line["sampler_gap"] < 1e-4
        assert line["ratio_max"] == 1.0
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6), "the policy starts as its reference"
    assert lines[2]["kl"] > lines[0]["kl"]
    assert trainer.work.checkpoints.steps() == [2, 3]
    before = training.split(small.bigram(trainer))[1]
    assert not np.array_equal(params["output"], before["output"])
    saved = trainer.work.params("grpo", params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, saved, params)))


def test_groups_are_written_for_people(source: Path, tmp_path: Path) -> None:
    config = replace(SMALL, steps=3, save_every=2, prompts_per_step=6, micro_batch=12)
    trainer, _, _ = run(tmp_path, source, config)
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == ["000002.html", "000002.jsonl", "000003.html", "000003.jsonl"]
    groups = [json.loads(line) for line in (tmp_path / "rollouts" / "000002.jsonl").read_text().splitlines()]
    assert len(groups) == SHOWN
    ids = {example.id for example in trainer.pool.examples}
    for group in groups:
        assert group["step"] == 2
        assert group["example"] in ids
        assert group["weights"] == {"answer": 1.0, "format": 1.0, "process": 1.0}
        assert group["findings"] == list(trainer.pool.findings[group["example"]].present)
        assert len(group["rollouts"]) == config.group_size
        for one in group["rollouts"]:
            parts = {"answer", "format", "process", "localisation", "own", "why", "total"}
            assert parts | {"text", "verdicts", "advantage"} == one.keys()
            assert all({"rating", "reference", "reasons"} == verdict.keys() for verdict in one["verdicts"])
        assert sum(one["advantage"] for one in group["rollouts"]) == pytest.approx(0, abs=1e-5)


def test_epochs_end_the_stage_where_no_steps_are_given(source: Path, tmp_path: Path) -> None:
    trainer, _, lines = run(tmp_path, source, replace(SMALL, steps=0, epochs=0.2, extra_draws=1))
    count = int(0.2 * len(trainer.prompts.rows) / SMALL.prompts_per_step)
    assert [line["step"] for line in lines] == list(range(1, count + 1))
    assert count > 1
    assert lines[0]["redraw/batches"] == 1, (
        "an untrained policy earns nothing; what is drawn besides is no step"
    )
    assert trainer.work.checkpoints.steps() == [count]
    assert [path.stem for path in sorted((tmp_path / "rollouts").glob("*.html"))] == [f"{count:06d}"]


@pytest.mark.parametrize("growing", [False, True])
def test_each_bucket_compiles_once(
    growing: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build, calls = grpo.Prompts.build, itertools.count()

    def longer(prompts: grpo.Prompts, *args: Any, **more: Any) -> Any:
        index, batch = build(prompts, *args, **more)
        return index, padded(batch, 8 * next(calls)) if growing else batch

    monkeypatch.setattr(grpo.Prompts, "build", longer)
    config, asked = replace(SMALL, steps=8, buckets=2, save_every=2), PromptConfig(style="options")
    with caplog.at_level(logging.WARNING, logger="absl"):
        trainer, _, lines = run(tmp_path, source, config, prompt=asked)
    shapes = len(set(trainer.prompts.shapes.values()))
    assert shapes == 2
    compiled = sum(line["compiles"] > 0 for line in lines)
    assert compiled > shapes + 2 if growing else compiled == shapes
    assert sum("its shapes were known" in one for one in caplog.messages) == growing


def padded(batch: Any, more: int) -> Any:
    """A batch of prompts with so many more places to their right."""
    wide = {
        name: np.pad(getattr(batch, name), [(0, 0)] * (getattr(batch, name).ndim - 1) + [(0, more)])
        for name in ("tokens", "mask", "segments", "positions", "image_index")
    }
    return replace(batch, **wide)


def test_two_passes_over_the_same_rollouts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "score_all", whims)
    once = run(tmp_path / "one", source, replace(SMALL, steps=2))[2]
    twice = run(tmp_path / "two", source, replace(SMALL, steps=2, mu=2))[2]
    assert [line["ratio_max"] for line in once] == [1.0, 1.0]
    assert all(line["ratio_max"] > 1.001 for line in twice), "the second pass is off the policy that sampled"
    assert all(line["old_kl"] > 0 for line in twice)
    assert [line["reward"] for line in once[:1]] == [line["reward"] for line in twice[:1]], "sampled alike"
    assert len(twice) == 2, "a step is one line, however many passes"


def whims(prompts: Any, index: Any, rollout: Any, judge: Any, config: GrpoConfig) -> tuple[list, list]:
    """Scores that reward every other rollout of a group."""
    good = grpo.Score(answer=1.0, format=0.0, process=0.0, total=1.0)
    group = [replace(good, answer=float(g % 2), total=float(g % 2)) for g in range(config.group_size)]
    return [["text"] * config.group_size for _ in index], [group for _ in index]


def test_what_is_rewarded_becomes_likelier(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reward for a token that any policy can learn to say first."""

    def likes(prompts: Any, index: Any, rollout: Any, judge: Any, config: GrpoConfig) -> tuple[list, list]:
        said = np.asarray(rollout.tokens)[:, :, 0] % 2 == 0
        scores = [
            [grpo.Score(answer=float(one), format=0.0, process=0.0, total=float(one)) for one in group]
            for group in said
        ]
        return [["text"] * config.group_size for _ in index], scores

    monkeypatch.setattr(grpo, "score_all", likes)
    stage = replace(SMALL, steps=40, max_new_tokens=1, kl_coef=0.0, optim=small.optim(lr=0.02))
    config = replace(stage, prompts_per_step=8, group_size=4, micro_batch=32)
    lines = run(tmp_path, source, config)[2]
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[:3]) < 0.65, "chance is a half"
    assert np.mean(rewards[-5:]) > 0.7, "of 160 rollouts; chance would give it once in a million runs"


def test_without_kl_there_is_no_reference(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> Any:
        raise AssertionError("nothing is to be scored: no KL, and one pass")

    monkeypatch.setattr(grpo, "make_score", lambda *_: forbidden)
    lines = run(tmp_path, source, replace(SMALL, steps=1, kl_coef=0.0))[2]
    assert "kl" not in lines[0]
    with pytest.raises(AssertionError, match="nothing is to be scored"):
        run(tmp_path / "with", source, replace(SMALL, steps=1))


def test_the_seed_fixes_prompts_and_samples(source: Path, tmp_path: Path) -> None:
    def story(name: str, seed: int) -> str:
        run(tmp_path / name, source, replace(SMALL, steps=1, seed=seed))
        return (tmp_path / name / "rollouts" / "000001.jsonl").read_text()

    assert story("a", 0) == story("b", 0) != story("c", 1)


def test_slots_change_no_rollout(source: Path, tmp_path: Path) -> None:
    def story(name: str, slots: int) -> tuple[str, dict]:
        lines = run(tmp_path / name, source, replace(SMALL, steps=1, slots=slots))[2]
        return (tmp_path / name / "rollouts" / "000001.jsonl").read_text(), lines[0]

    (whole, at_once), (refilled, by_twos) = story("all", 0), story("two", 2)
    assert refilled == whole
    assert (at_once["sampler/fills"], by_twos["sampler/fills"]) == (1, SMALL.prompts_per_step)
    assert at_once["sampler/steps"] < by_twos["sampler/steps"]
    assert by_twos["sampler_gap"] < 1e-4


def test_the_judge_is_asked_while_the_log_probabilities_are_under_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passes have been given to the devices, and nobody waits for them, when the judge is called."""
    order: list[str] = []

    def noted(name: str, action: Any) -> Any:
        def noting(*args: Any) -> Any:
            order.append(name)
            return action(*args)

        return noting

    class Judge:
        def __call__(self, requests: Any) -> list[Verdict]:
            order.append("judge")
            return RulesJudge()(requests)

        def metrics(self) -> dict[str, float]:
            return {}

    make_score, traced = grpo.make_score, "<think>Drusen are seen.</think> <answer>AMD</answer>"
    monkeypatch.setattr(grpo, "make_score", lambda *args: noted("score", make_score(*args)))
    monkeypatch.setattr(stop, "settle", noted("wait", stop.settle))
    monkeypatch.setattr(jax, "block_until_ready", noted("wait", jax.block_until_ready))
    monkeypatch.setattr(Processor, "decode", lambda self, tokens, **_: traced)
    lines = run(tmp_path, source, replace(SMALL, mu=2), Judge())[2]
    assert all(line["judge/asked"] for line in lines)
    phases = [name for name, _ in itertools.groupby(order)]  # decoding may wait more than once
    assert phases == ["wait", "score", "judge"] * SMALL.steps, "rollouts; reference and policy; traces"
    assert order.count("score") == 2 * SMALL.steps


def test_a_judge_that_fails_stops_the_stage(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> tuple[list, list]:
        texts, scores = whims(*args)
        verdict = Verdict(rating="abstain", reference="findings", reasons=("the server is down",))
        lost = grpo.Score(answer=0.0, format=0.0, process=None, total=None, verdicts=(verdict,), asked=1)
        return texts, [[lost] * len(group) for group in scores]

    monkeypatch.setattr(grpo, "score_all", failing)
    with pytest.raises(ConfigError, match=r"abstained on 8 of 8 requests.*the server is down"):
        run(tmp_path, source, replace(SMALL, abstain_window=1))


def test_prompts_that_are_too_long_are_left_out_and_counted(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = small.open_run(tmp_path, source, small.config())
    arguments = (trainer.grpo_pool(), trainer.processor, trainer.config.prompt)
    whole = grpo.Prompts(*arguments, 512)
    lengths = [
        trainer.processor.row_size(text, [whole.pool.image(example)])[0] for example, text in whole.rows
    ]
    bound = max(lengths) - 1
    with caplog.at_level(logging.INFO, logger="absl"):
        cut = grpo.Prompts(*arguments, bound)
    assert len(cut.rows) == sum(length <= bound for length in lengths) < len(whole.rows)
    lost, longest = len(whole.rows) - len(cut.rows), max(set(lengths) - {bound + 1})
    padded = round_up(longest, LENGTH_STEP)
    assert f"{len(cut.rows)} kept, {lost} too long; shapes to compile: 1" in caplog.text
    assert f"{len(cut.rows)} padded to {padded} tokens" in caplog.text
    index, batch = cut.build(np.asarray([2, 0]))
    assert index.tolist() == [2, 0]
    assert batch.tokens.shape == (2, padded)
    assert trainer.processor.decode(batch.tokens[0][batch.mask[0]], skip_special_tokens=False).endswith(
        "assistant\n"
    )
    with pytest.raises(ConfigError, match=r"all [0-9]+ prompts are longer than 5 tokens"):
        grpo.Prompts(*arguments, 5)


def test_prompts_of_a_step_are_of_one_shape(source: Path, tmp_path: Path) -> None:
    trainer = small.open_run(tmp_path, source, small.config())
    asked = PromptConfig(style="options")  # whose number depends on the task
    arguments = (trainer.pool.choose(), trainer.processor, asked, 512)
    prompts = grpo.Prompts(*arguments, buckets=3, batch=4)
    assert sorted(i for group in prompts.groups for i in group) == list(range(len(prompts.rows)))
    assert min(len(group) for group in prompts.groups) >= len(prompts.rows) // 3 >= 4
    lengths = []
    for group in prompts.groups:
        _, batch = prompts.build(np.asarray(group))
        assert {prompts.shapes[i] for i in group} == {(batch.tokens.shape[1], batch.patches.shape[1])}
        lengths.append(round_up(int(batch.mask.sum(axis=1).max()), LENGTH_STEP))
        assert batch.tokens.shape[1] == lengths[-1]
    assert len(lengths) > 1
    assert sorted(set(lengths)) == lengths, "no two groups have one length"
    _, mixed = prompts.build(np.asarray([group[0] for group in prompts.groups]))
    assert mixed.tokens.shape[1] == lengths[-1], "whoever mixes them gets room for all"
    whole = grpo.Prompts(*arguments, buckets=3, batch=len(prompts.rows))
    assert len(whole.groups) == 1, "a group has a step's prompts at least"


def test_a_reply_with_control_tokens_is_not_in_the_format(source: Path, tmp_path: Path) -> None:
    """A decoder that hides them would make a right reply of this."""
    trainer = small.open_run(tmp_path, source, small.config())
    processor, prompts = trainer.processor, trainer.prompts
    example = prompts.rows[0][0]
    said = dialog.right_reply(example, prompts.form["style"])
    good = f"<think>No lesion is seen.</think> <answer>{said}</answer>"
    tokens = [processor.tokenizer.encode(good, add_special_tokens=False)]
    tokens.append([*processor.tokenizer.encode("<|im_start|>"), *tokens[0]])
    (end,) = processor.eos_ids
    ids = np.zeros((1, 2, len(tokens[1]) + 1), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, one in enumerate(tokens):
        ids[0, row, : len(one) + 1], mask[0, row, : len(one) + 1] = [*one, end], True
    rollout = Rollout(ids, np.zeros(ids.shape, np.float32), mask)
    ((plain, hidden),), ((first, second),) = grpo.score_all(
        prompts, np.asarray([0]), rollout, RulesJudge(), SMALL
    )
    assert plain == good, "without the token that ended it"
    assert (first.answer, first.format) == (1, 1)
    assert hidden == "<|im_start|>" + good
    assert (second.answer, second.format) == (1, 0)
