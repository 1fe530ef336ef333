"""Measures the policy after every stage on the same held-out questions, greedy and sampled, and compares the
stages in pairs.

Greedy answers say what the policy would tell a user; sampled ones what GRPO optimises, so these are scored
with its reward too. Both use fixed questions and seeds: differences between stages are paired, question by
question.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from fundus_jax import hosts, stop
from fundus_jax.data import load_image, open_pool
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.items import Item, Selection
from fundus_jax.evaluation.run import Prediction, compare, evaluate, predict, table, write
from fundus_jax.files import write_atomic
from fundus_jax.grpo import own_rewards
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
        ask = functools.partial(
            _answers,
            functools.cache(functools.partial(trainer.after, stage)),
            trainer.processor,
            mesh=trainer.mesh,
            load_image=functools.partial(load_image, examples),
            max_new_tokens=config.grpo.max_new_tokens,
            batch_size=config.evaluate.batch,
        )
        predictions[stage], report = ask(items, folder / f"{stage}-greedy")
        asked = [one for one in predictions[stage] if one.item.task in set(names(config.data.grpo_tasks))]
        entry = {"greedy": report} | ({"diagnosis": evaluate(asked)} if asked else {})
        if not before_sft:
            samples = {"temperature": 1.0, "group_size": config.evaluate.samples, "seed": 1}
            drawn, entry["sampled"] = ask(sampled.items, folder / f"{stage}-sampled", **samples)
            parts = _rewards(drawn, pool, config)
            units = [one.item.unit for one in drawn]
            entry["reward"] = {
                name: scores.mean(parts[:, i], units=units).as_dict() for i, name in enumerate(PARTS)
            }
            predictions[f"{stage}-sampled"], rewards[stage] = drawn, parts
        summary["stages"][stage] = entry
    _differences(summary, predictions, rewards)
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    hosts.on_first(lambda: write_atomic(folder / "summary.json", text))
    return summary


def _answers(
    model: Callable[[], Any], processor: Any, items: Sequence[Item], folder: Path, **ask: Any
) -> tuple[list[Prediction], dict[str, Any]]:
    """The responses to `items` and their report: from `folder`, or where it has none yet, asked and written.

    `model` gives the policy and is only called to ask.
    """
    done = folder / "report.json"  # written last
    if hosts.of_first(done.is_file()):
        logging.info("%s is there already", folder)
        asked = {item.id: item for item in items}
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        facts = [json.loads(line) for line in lines if line]
        kept = ("response", "sample", "tokens", "finished")
        answers = [Prediction(item=asked[one["id"]], **{name: one[name] for name in kept}) for one in facts]
        return answers, json.loads(done.read_text(encoding="utf-8"))
    with jax.set_mesh(ask["mesh"]), stop.deferred():
        answers = predict(model(), processor, items, **ask)
    report = evaluate(answers)
    hosts.on_first(lambda: write(folder, answers, report))
    logging.info("%s\n%s", folder.name, table(report))
    return answers, report


def _rewards(answers: Sequence[Prediction], pool: Any, config: RunConfig) -> np.ndarray:
    """[answers, 4] reward parts of sampled answers; an abstention counts nowhere (NaN)."""
    examples = {example.id: example for example in pool.examples}
    judge, own, rows = RulesJudge(), own_rewards.load(config.grpo.rewards), []
    for one in answers:
        known = examples[one.item.id], pool.findings.get(one.item.id), pool.knowledge
        score = score_rollout(one.response, *known, judge, config.grpo, finished=one.finished)
        facts = own_rewards.facts_of(one.response, *known, finished=one.finished, tokens=one.tokens)
        score = score.plus([function(facts) for function in own])
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
