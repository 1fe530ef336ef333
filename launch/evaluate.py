"""Measures the policy after every stage on the same held-out questions, greedy and sampled, and compares the
stages in pairs.

Greedy answers say what the policy would tell a user; sampled ones what GRPO optimises, so these are scored
with its reward too. Both use fixed questions and seeds: differences between stages are paired, question by
question.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from fundus_jax.data import load_image, open_pool
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.run import Prediction, compare, evaluate, predict, table, write
from fundus_jax.files import write_atomic
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.rewards import score_rollout
from fundus_jax.workdir import Workdir
from launch.config import RunConfig, names
from launch.stages import Trainer

PARTS = ("total", "answer", "format", "process")


def measure(config: RunConfig, work: Workdir, trainer: Trainer) -> dict[str, Any]:
    """Write evaluation/STAGE-{greedy,sampled}/ for every finished stage and evaluation/summary.json; return
    the summary.

    A measurement that is there already is read, not repeated.
    """
    folder = work.path / "evaluation"
    examples = work.path / "data" / "examples"
    prompt = dataclasses.asdict(config.prompt)
    common = {"split": "test", **prompt}
    greedy = PhantomBenchmark(
        examples, Selection(tasks=names(config.data.probe_tasks), limit=config.evaluate.questions, **common)
    )
    sampled = PhantomBenchmark(
        examples, Selection(tasks=names(config.data.grpo_tasks), limit=config.evaluate.sampled, **common)
    )
    pool = open_pool(work.path / "data", "test")
    summary: dict[str, Any] = {"stages": {}, "differences": {}}
    predictions: dict[str, list[Prediction]] = {}
    rewards: dict[str, np.ndarray] = {}
    for stage in trainer.plan:
        if not work.finished(stage):
            logging.info("evaluate: stage %s has not finished, it is left out", stage)
            continue
        before_sft = stage == "base"
        items = greedy.items[: config.evaluate.before] if before_sft else greedy.items
        model = trainer.after(stage)
        ask = {
            "load_image": lambda key: load_image(examples, key),
            "max_new_tokens": config.grpo.max_new_tokens,
            "batch_size": config.evaluate.batch,
        }
        answers = predict(model, trainer.processor, items, **ask)
        entry = {"greedy": _report(folder / f"{stage}-greedy", answers)}
        predictions[stage] = answers
        if not before_sft:
            drawn = predict(
                model,
                trainer.processor,
                sampled.items,
                temperature=1.0,
                group_size=config.evaluate.samples,
                seed=1,
                **ask,
            )
            entry["sampled"] = _report(folder / f"{stage}-sampled", drawn)
            parts = _rewards(drawn, pool, config)
            units = [one.item.unit for one in drawn]
            entry["reward"] = {
                name: scores.mean(parts[:, i], units=units).as_dict() for i, name in enumerate(PARTS)
            }
            predictions[f"{stage}-sampled"], rewards[stage] = drawn, parts
        summary["stages"][stage] = entry
    _differences(summary, predictions, rewards)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _report(folder: Any, answers: Sequence[Prediction]) -> dict[str, Any]:
    report = evaluate(answers)
    write(folder, answers, report)
    logging.info("%s\n%s", folder.name, table(report))
    return report


def _rewards(answers: Sequence[Prediction], pool: Any, config: RunConfig) -> np.ndarray:
    """[answers, 4] reward parts of sampled answers; an abstention counts nowhere (NaN)."""
    examples = {example.id: example for example in pool.examples}
    judge, rows = RulesJudge(), []
    for one in answers:
        score = score_rollout(
            one.response,
            examples[one.item.id],
            pool.findings.get(one.item.id),
            pool.knowledge,
            judge,
            config.grpo,
            finished=one.finished,
        )
        rows.append(
            [
                np.nan if part is None else part
                for part in (score.total, score.answer, score.format, score.process)
            ]
        )
    return np.asarray(rows, float)


def _differences(
    summary: dict[str, Any], predictions: dict[str, list[Prediction]], rewards: dict[str, np.ndarray]
) -> None:
    """Paired differences GRPO - SFT: greedy accuracy, sampled accuracy, sampled reward and its parts."""
    if not {"sft", "grpo"} <= set(rewards):
        return
    found = summary["differences"]
    found["greedy_accuracy"] = compare(predictions["sft"], predictions["grpo"])
    found["sampled_accuracy"] = compare(predictions["sft-sampled"], predictions["grpo-sampled"])
    units = [one.item.unit for one in predictions["sft-sampled"]]
    gains = rewards["grpo"] - rewards["sft"]
    for i, name in enumerate(PARTS):
        found[f"reward_{name}"] = scores.mean(gains[:, i], units=units).as_dict()
