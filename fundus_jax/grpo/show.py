"""What GRPO leaves for people to read while it runs: pages of rollouts, and the alarms.

`rollouts/<step>.jsonl` holds a few groups of a step, and the page beside it shows them; `alarms.jsonl` has a
line for each alarm when it began. The first process writes. Neighbours: `report/` draws, `train` calls.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from fundus_jax import hosts
from fundus_jax.files import write_atomic
from fundus_jax.grpo.alarms import RULES, Alarm, Alarms, failing
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.own_rewards import OwnReward
from fundus_jax.grpo.rewards import Score
from fundus_jax.report import write_rollouts
from fundus_jax.workdir import Workdir

SHOWN = 4  # groups of a step that are written


def open_alarms(work: Workdir, config: GrpoConfig, own: Sequence[OwnReward], done: int) -> Alarms:
    """The alarms of a stage that goes on after step `done`: they know the steps before it, and alarms.jsonl
    holds no later ones."""
    rollouts = config.prompts_per_step * config.group_size
    rules = (*RULES, *(failing(one.name, rollouts) for one in own))
    path = work.path / "alarms.jsonl"
    if hosts.is_first() and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if json.loads(line)["step"] <= done))
    return Alarms(config.alarms, rules, work.metrics.past("grpo") if done else ())


def tell(work: Workdir, begun: Sequence[Alarm]) -> None:
    """Log the alarms that a step has begun, and note them in alarms.jsonl."""
    for alarm in begun:
        logging.warning("grpo: ALARM %s at step %d: %s", alarm.name, alarm.step, alarm.reason)
    if begun and hosts.is_first():
        lines = [json.dumps(dataclasses.asdict(alarm), ensure_ascii=False) + "\n" for alarm in begun]
        with (work.path / "alarms.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def note(values: Mapping[str, float], alarms: Alarms) -> str:
    """A step in a few words, for the progress."""
    reward = values.get("reward/total")
    text = "no reward" if reward is None else f"reward {reward:.3f}"
    return f"{text}, ALARM {' '.join(alarms.met)}" if alarms.met else text


def show(
    work: Workdir,
    step: int,
    prompts: Any,
    index: np.ndarray,
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[Score]],
    advantages: np.ndarray,
    config: GrpoConfig,
) -> None:
    """Write a few groups of a step to rollouts/<step>.jsonl (example, its findings, weights of the
    reward's parts, texts, parts, verdicts, advantages) and rollouts/<step>.html."""
    if not hosts.is_first():
        return
    examples = [prompts.rows[i][0] for i in index[:SHOWN]]
    groups = [
        {
            "step": step,
            "example": example.id,
            "findings": _present(prompts, example.id),
            "weights": _weights(scores[row], config),
            "rollouts": [
                _facts(text, score, float(advantage))
                for text, score, advantage in zip(texts[row], scores[row], advantages[row], strict=True)
            ],
        }
        for row, example in enumerate(examples)
    ]
    folder = work.path / "rollouts"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(group, ensure_ascii=False) + "\n" for group in groups]
    write_atomic(folder / f"{step:06d}.jsonl", "".join(lines).encode("utf-8", errors="replace"))
    write_rollouts(work.path, step, {example.id: example for example in examples})


def _present(prompts: Any, example: str) -> list[str] | None:
    """The findings that the judge compares with, None where there are none to compare with."""
    found = prompts.pool.findings.get(example)
    return None if found is None else list(found.present)


def _weights(scores: Sequence[Score], config: GrpoConfig) -> dict[str, float]:
    built_in = {name: getattr(config, f"{name}_weight") for name in ("answer", "format", "process")}
    return built_in | {part.name: part.weight for score in scores for part in score.own}


def _facts(text: str, score: Score, advantage: float) -> dict[str, Any]:
    """A rollout as rollouts/ has it: `own` are the parts of the user's functions, `why` their abstentions."""
    return {
        "text": text,
        "answer": score.answer,
        "format": score.format,
        "process": score.process,
        "own": {part.name: part.value for part in score.own},
        "why": {part.name: part.why for part in score.own if part.value is None},
        "total": score.total,
        "rating": score.verdict.rating if score.verdict else None,
        "reasons": list(score.verdict.reasons) if score.verdict else [],
        "advantage": advantage,
    }
