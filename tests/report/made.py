"""Made-up runs: data by the real jobs, files by the real writers, invented replies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from configs.demo import get_config
from data_pipeline import findings as findings_job
from data_pipeline import ingest, knowledge_base, traces
from data_pipeline.composing import Rules
from data_pipeline.datasets.phantom_source import PhantomConfig
from fundus_jax import dialog
from fundus_jax.base import policy
from fundus_jax.data import Pool, open_pool
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.report import Prediction, compare, evaluate
from fundus_jax.evaluation.results import write
from fundus_jax.findings import vocabulary
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.rewards import Score, assess, score_rollouts
from fundus_jax.records import Example, Trace
from fundus_jax.report import write_rollouts
from fundus_jax.workdir import Workdir
from launch.config import as_json

HOSTILE = (
    '<think>The image shows drusen.<script>alert("x")</script>'
    "<img src=https://evil.example/a.png onerror=alert(1)>"
    "\x00\u202eevil</think> <answer></article>PDR</answer>"
)


def make_data(folder: Path, train: int, test: int, boxes: int = 0) -> None:
    """data/ of a workdir, by the jobs that a run uses."""
    phantom = PhantomConfig(seed=0, size=112, train=train, val=0, test=test)
    examples, knowledge, found = (folder / name for name in ("examples", "knowledge", "findings"))
    ingest.run(
        "phantom",
        None,
        examples,
        tasks={"disease": 1.0, "modality": 0.3, "lesion_presence": 0.3},
        phantom=phantom,
    )
    knowledge_base.run(knowledge, examples=examples)
    findings_job.run(examples, found)
    traces.run(examples, found, knowledge, folder / "traces", writer=Rules(boxes))


def invent(rng: np.random.Generator, example: Example, trace: Trace, skill: float) -> str:
    """The reference with probability `skill`, else a reply with another answer and one more finding."""
    if rng.random() < skill:
        return dialog.render(trace.think, example.answer)
    wrong = [option for option in example.options if option != example.answer]
    seen = sorted({*(example.findings or ()), str(rng.choice(vocabulary(example.modality)))})
    return dialog.render(f"The image shows {' and '.join(seen)}.", str(rng.choice(wrong)))


def moved(think: str, rng: np.random.Generator, skill: float) -> str:
    """A positioned trace with its boxes moved, the less the higher `skill`, and now and then lost."""
    said, shift = dialog.parse_boxes(think).boxes, 250 * (1 - skill)
    for box in said:
        group = dialog.render_boxes([one for one in said if one.finding == box.finding])
        corners = [int(np.clip(c + rng.normal(0, shift), 0, 999)) for c in (box.x1, box.y1, box.x2, box.y2)]
        think = think.replace(group, f"<ref>{box.finding}</ref><box>[{corners}]</box>")
    return think


def predict(
    pool: Pool,
    work: Path,
    skill: float,
    samples: int,
    seed: int,
    tasks: tuple[str, ...] = (),
    boxes: int = 0,
) -> list[Prediction]:
    """Made-up predictions of every held-out question."""
    rng, by_id = np.random.default_rng(seed), {example.id: example for example in pool.examples}
    selection = Selection(style="open", tasks=tasks, boxes=boxes)
    items = PhantomBenchmark(work / "data" / "examples", selection).items
    return [
        Prediction(
            item=item,
            response=moved(invent(rng, by_id[item.id], pool.traces[item.id], skill), rng, skill),
            sample=k,
            tokens=30,
        )
        for item in items
        for k in range(samples)
    ]


def judged(text: str, example: Example, pool: Pool) -> Score:
    """The score that training would give."""
    config = GrpoConfig()
    found = assess(text, example, pool.findings.get(example.id), pool.knowledge, config, finished=True)
    return score_rollouts([found], RulesJudge(), config)[0]


def make_evaluation(work: Path, hostile: bool, boxes: int = 0) -> None:
    """evaluation/ as launch/evaluate.py lays it out."""
    pool = open_pool(work / "data", "test")
    by_id = {example.id: example for example in pool.examples}
    greedy = {
        stage: predict(pool, work, skill, 1, 7, boxes=boxes)
        for stage, skill in (("base", 0.0), ("sft", 0.8), ("grpo", 0.86))
    }
    sampled = {
        stage: predict(pool, work, skill, 2, 8, ("disease",), boxes)
        for stage, skill in (("sft", 0.6), ("grpo", 0.8))
    }
    if hostile:
        greedy["grpo"] = [Prediction(item=one.item, response=HOSTILE, tokens=9) for one in greedy["grpo"]]
    summary: dict[str, Any] = {
        "stages": {},
        "differences": {"greedy_accuracy": compare(greedy["sft"], greedy["grpo"])},
    }
    rewards: dict[str, list[float]] = {}
    for stage, answers in greedy.items():
        entry = summary["stages"][stage] = {"greedy": evaluate(answers)}
        write(work / "evaluation" / f"{stage}-greedy", answers, entry["greedy"])
        if stage in sampled:
            entry["sampled"] = evaluate(sampled[stage])
            rewards[stage] = [
                judged(one.response, by_id[one.item.id], pool).total or 0.0 for one in sampled[stage]
            ]
            units = [one.item.unit for one in sampled[stage]]
            entry["reward"] = {"total": scores.mean(np.asarray(rewards[stage]), units=units).as_dict()}
    gain = np.asarray(rewards["grpo"]) - np.asarray(rewards["sft"])
    summary["differences"]["sampled_accuracy"] = compare(sampled["sft"], sampled["grpo"])
    summary["differences"]["reward_total"] = scores.mean(gain).as_dict()
    (work / "evaluation" / "summary.json").write_text(json.dumps(summary))


def make_rollouts(work: Path, step: int, skill: float, hostile: bool) -> None:
    """rollouts/<step>.jsonl as grpo/train.py writes it."""
    pool, rng, lines = open_pool(work / "data", "train"), np.random.default_rng(step), []
    for example in [one for one in pool.examples if one.task == "disease"][:3]:
        texts = [
            HOSTILE if hostile and k == 0 else invent(rng, example, pool.traces[example.id], skill)
            for k in range(4)
        ]
        found = [judged(text, example, pool) for text in texts]
        mean = np.mean([one.total or 0.0 for one in found])
        rollouts = [
            {
                "text": text, "answer": one.answer, "format": one.format, "process": one.process,
                "total": one.total, "verdicts": [dataclasses.asdict(verdict) for verdict in one.verdicts],
                "advantage": float((one.total or 0) - mean),
            }
            for text, one in zip(texts, found, strict=True)
        ]  # fmt: skip
        found = pool.findings[example.id].present
        weights = {"answer": 1.0, "format": 1.0, "process": 1.0}
        group = {"example": example.id, "findings": list(found), "weights": weights, "rollouts": rollouts}
        lines.append(json.dumps({"step": step, **group}))
    (work / "rollouts").mkdir(exist_ok=True)
    (work / "rollouts" / f"{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    write_rollouts(work, step, {example.id: example for example in pool.examples})


def make_metrics(work: Workdir, steps: dict[str, int]) -> None:
    """metrics.jsonl through the writer of the loops; one value is NaN, which becomes null."""
    rng = np.random.default_rng(0)
    for stage, total in steps.items():
        for step in range(1, total + 1):
            t, noise = step / total, float(rng.normal())
            values = {
                "loss": 2.5 * np.exp(-4 * t) + 0.08 * noise * (1 - t) + 0.2,
                "grad_norm": 0.5 + 0.1 * noise,
                "exact": t,
            }
            if stage == "grpo":
                parts = {
                    "answer": 0.6 + 0.2 * t + 0.04 * noise,
                    "format": 1.0,
                    "process": 0.7 + 0.1 * t + 0.03 * noise,
                }
                values |= {f"reward/{name}": value for name, value in parts.items()} | {
                    "reward/total": sum(parts.values())
                }
                values |= {
                    "kl": 0.02 * t,
                    "entropy": 0.4 - 0.2 * t,
                    "clip_low": 0.0,
                    "clip_high": 0.0,
                    "length": 33 + noise,
                }
                values |= {"zero_variance": 0.3 + 0.2 * t, "sampler_gap": 2.3e-7 + 1e-9 * noise}
                values |= {f"signs/{name}": 0.01 for name in ("repetition", "empty_think", "outside")}
                values |= {"alarm/kl": 0.0, "time/rollout": 0.7}
            work.metrics.log(
                stage,
                step,
                values
                | {"entropy": float("nan") if step == 2 else 0.4, "time/update": 20.0 if step == 1 else 1.1},
            )


def make_run(
    folder: Path, *, train: int = 24, test: int = 40, steps: int = 30, hostile: bool = False, boxes: int = 0
) -> Path:
    """A finished workdir with made-up numbers; with `boxes`, one of positioned traces."""
    config = get_config()
    config.prompt.boxes, config.grpo.localisation_weight = boxes, float(boxes > 0)
    work = Workdir(folder, as_json(config))
    make_data(folder / "data", train, test, boxes)
    make_metrics(work, dict.fromkeys(("base", "sft", "grpo"), steps))
    work.close()
    spans = {"data": 90.0, "base": 130.5, "sft": 200.0, "grpo": 280.0, "evaluate": 60.0, "export": 1.2}
    lines = [
        {"stage": stage, "started": 1.79e9 + i, "seconds": spans[stage]} for i, stage in enumerate(spans)
    ]
    (folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    policy.write_policy(folder / "policy", policy.PolicyConfig(vocab=320), ["The image shows drusen."])
    make_answers(folder, steps, hostile, boxes)
    return folder


def make_answers(folder: Path, steps: int, hostile: bool, boxes: int = 0) -> None:
    """rollouts/ and evaluation/."""
    make_rollouts(folder, 10, 0.4, hostile)
    make_rollouts(folder, steps, 0.8, hostile)
    make_evaluation(folder, hostile, boxes)
