"""Measures the policy after every stage on the same held-out questions, greedy and sampled, and compares the
stages in pairs.

Greedy answers say what the policy would tell a user; sampled ones what GRPO optimises, so these are scored
with its reward too. The judge is then the one by rules, whichever rated in training: it needs no server,
gives the same again, and compares runs with different judges. Both use fixed questions and seeds: differences
between stages are paired, question by question.
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
from jax.sharding import Mesh

from fundus_jax import dialog, hosts, stop
from fundus_jax.data import open_pool
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.engines import Asking, Engine, without_failures
from fundus_jax.evaluation.items import Item, Selection
from fundus_jax.evaluation.journal import Journal
from fundus_jax.evaluation.pictures import Images
from fundus_jax.evaluation.predict import Sampler
from fundus_jax.evaluation.report import Prediction, compare, compare_places, evaluate
from fundus_jax.evaluation.results import write
from fundus_jax.evaluation.table import table
from fundus_jax.files import write_atomic
from fundus_jax.grpo import own_rewards
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.rewards import assess, score_rollouts
from fundus_jax.models.freeze import freeze_all, narrow
from fundus_jax.workdir import Workdir
from launch.config import RunConfig, names
from launch.stages import Trainer

PARTS = ("total", "answer", "format", "process", "localisation")


def questions(config: RunConfig, work: Workdir) -> tuple[PhantomBenchmark, PhantomBenchmark]:
    """The held-out questions, for greedy answers and for sampled ones. Raises ConfigError where there are
    none of a task."""
    examples, common = work.path / "data" / "examples", {"split": "test", **dataclasses.asdict(config.prompt)}
    greedy = Selection(tasks=names(config.data.probe_tasks), limit=config.evaluate.questions, **common)
    sampled = Selection(tasks=names(config.data.grpo_tasks), limit=config.evaluate.sampled, **common)
    return PhantomBenchmark(examples, greedy), PhantomBenchmark(examples, sampled)


def measure(
    config: RunConfig,
    work: Workdir,
    trainer: Trainer,
    greedy: PhantomBenchmark,
    sampled: PhantomBenchmark,
) -> dict[str, Any]:
    """Write evaluation/STAGE-{greedy,sampled}/ for every finished stage and evaluation/summary.json; return
    the summary. greedy, sampled: of `questions`.

    A measurement that is there already is read, not repeated.
    """
    folder = work.path / "evaluation"
    pool = open_pool(work.path / "data", "test")
    summary: dict[str, Any] = {"stages": {}, "differences": {}}
    predictions: dict[str, list[Prediction]] = {}
    rewards: dict[str, np.ndarray] = {}
    reached = trainer.reached
    for stage in trainer.plan.keys() - set(reached):
        logging.info("evaluate: stage %s has not finished, it is left out", stage)
    for stage in reached:
        untrained = stage == "base" != trainer.last
        items = greedy.items[: config.evaluate.before] if untrained else greedy.items
        engine = functools.cache(functools.partial(_engine, config, trainer, stage))
        about = {"stage": stage}, greedy, trainer.mesh, config.grpo.max_new_tokens
        ask = functools.partial(_answers, engine, *about)
        predictions[stage], report = ask(items, folder / f"{stage}-greedy")
        asked = [one for one in predictions[stage] if one.item.task in set(names(config.data.grpo_tasks))]
        entry = {"greedy": report} | ({"diagnosis": evaluate(asked)} if asked else {})
        if not untrained:
            samples = {"temperature": 1.0, "samples": config.evaluate.samples, "seed": 1}
            drawn, entry["sampled"] = ask(sampled.items, folder / f"{stage}-sampled", **samples)
            parts = _rewards(drawn, pool, config)
            units = [one.item.unit for one in drawn]
            entry["reward"] = _means(parts, units)
            predictions[f"{stage}-sampled"], rewards[stage] = drawn, parts
        summary["stages"][stage] = entry
    _differences(summary, predictions, rewards)
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    hosts.on_first(lambda: write_atomic(folder / "summary.json", text))
    return summary


def _engine(config: RunConfig, trainer: Trainer, stage: str) -> Engine:
    """The policy after `stage`, in the dtype in which it computed while it was trained: in that of its
    masters, weights, keys and values would need twice the room."""
    model = trainer.after(stage)
    freeze_all(model)
    narrow(model, config.compute)
    return Sampler(model, trainer.processor, mesh=trainer.mesh, slots=config.evaluate.batch)


def _answers(
    engine: Callable[[], Engine],
    facts: dict[str, Any],
    images: Images,
    mesh: Mesh,
    max_new_tokens: int,
    items: Sequence[Item],
    folder: Path,
    **how: Any,
) -> tuple[list[Prediction], dict[str, Any]]:
    """The answers to `items`, and their report: from `folder`, or asked for as far as it has none yet, and
    written. `engine` makes what answers, and is only called where that is needed."""
    journal = Journal(folder, items, facts, Asking(max_new_tokens=max_new_tokens, **how))
    known = journal.known()
    if len(known) < len(items):
        with jax.set_mesh(mesh), stop.deferred():
            known = journal.ask(engine(), images)
            without_failures(items, engine().failures)
    answers = [one for index in range(len(items)) for one in known[index]]
    done = folder / "report.json"  # written last
    if hosts.of_first(done.is_file()):
        logging.info("%s is there already", folder)
        return answers, json.loads(done.read_text(encoding="utf-8"))
    report = evaluate(answers)
    hosts.on_first(lambda: write(folder, answers, report))
    logging.info("%s\n%s", folder.name, table(report))
    return answers, report


def _rewards(answers: Sequence[Prediction], pool: Any, config: RunConfig) -> np.ndarray:
    """[answers, 5] reward parts of sampled answers; an abstention, and what does not apply, is NaN."""
    examples = {one.id: dialog.positioned(one, config.prompt.boxes) for one in pool.examples}
    own = own_rewards.load(config.grpo.rewards)
    found, facts = [], []
    for one in answers:
        known = examples[one.item.id], pool.findings.get(one.item.id), pool.knowledge
        found.append(assess(one.response, *known, config.grpo, finished=one.finished, **config.prompt.form))
        told = {"finished": one.finished, "tokens": one.tokens} | config.prompt.form
        facts.append(own_rewards.facts_of(one.response, *known, **told))
    scored = score_rollouts(found, RulesJudge(), config.grpo)
    whole = [
        score.plus([function(fact) for function in own]) for score, fact in zip(scored, facts, strict=True)
    ]
    rows = [[np.nan if (part := getattr(score, name)) is None else part for name in PARTS] for score in whole]
    return np.asarray(rows, float)


def _means(parts: np.ndarray, units: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Name -> mean of each of the `PARTS` [answers, 5], over the answers that have it; none, no entry."""
    found = {}
    for column, name in zip(parts.T, PARTS, strict=True):
        known = ~np.isnan(column)
        if known.any():
            mine = [unit for unit, is_known in zip(units, known, strict=True) if is_known]
            found[prefix + name] = scores.mean(column[known], units=mine).as_dict()
    return found


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
    found |= _means(rewards["grpo"] - rewards["sft"], units, "reward_")
    places = compare_places(predictions["sft"], predictions["grpo"])
    if places is not None:
        found["box_iou"] = places
