"""What GRPO writes down while it runs: metrics, alarms, and pages of rollouts for people to read.

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
from fundus_jax.records import ConfigError
from fundus_jax.report import write_rollouts
from fundus_jax.workdir import Workdir

SHOWN = 4  # groups of a step that are written


class Diary:
    """What a stage writes down of each of its steps: metrics, alarms, pages, and how far it is.

    Args:
        work: where. config: when. prompts: a `train.Prompts`. own: the user's rewards.
        done: the step that a resumed stage goes on from. The alarms know what was logged up to there, and
            alarms.jsonl forgets what came later.
    """

    def __init__(
        self, work: Workdir, config: GrpoConfig, prompts: Any, own: Sequence[OwnReward], done: int
    ) -> None:
        self.work, self.config, self.prompts = work, config, prompts
        self.progress = work.progress("grpo", done)
        rollouts = config.prompts_per_step * config.group_size
        rules = (*RULES, *(failing(one.name, rollouts) for one in own))
        self.alarms = Alarms(config.alarms, rules, work.metrics.past("grpo") if done else ())
        self.begun: list[Alarm] = []
        path = work.path / "alarms.jsonl"
        if hosts.is_first() and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [
                line for line in lines if line.endswith("\n")
            ]  # a kill or a full disk tears the last one
            write_atomic(path, "".join(line for line in whole if json.loads(line)["step"] <= done))

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        index: np.ndarray,
        texts: Sequence[Sequence[str]],
        scores: Sequence[Sequence[Score]],
        advantages: np.ndarray,
    ) -> bool:
        """Write a step down, with a page where one is due, and return whether a bundle is to be saved.

        values: its metrics. index: of its prompts [B]. texts, scores: B groups of G. advantages: [B,G].
        """
        config, last = self.config, self.work.stages["grpo"]
        self.begun = self.alarms.check(step, values)
        self.work.metrics.log("grpo", step, {**values, **self.alarms.metrics()})
        self.progress.update(note=self._note(values))
        self._tell()
        if step == last:
            self.progress.close()
        due = step == last or bool(config.save_every and step % config.save_every == 0)
        if due or self.begun or (config.show_every and step % config.show_every == 0):
            show(self.work, step, self.prompts, index, texts, scores, advantages, config)
        return due or self._stops

    def halt(self) -> None:
        """Raise ConfigError if the step has begun an alarm and the config says to stop there."""
        if self._stops:
            reasons = "; ".join(f"{alarm.name}: {alarm.reason}" for alarm in self.begun)
            raise ConfigError(
                f"grpo.alarms.stop: stopped after step {self.begun[0].step} ({reasons}); look at its page in "
                "rollouts/. The same command goes on from here"
            )

    @property
    def _stops(self) -> bool:
        return bool(self.begun) and self.config.alarms.stop

    def _note(self, values: Mapping[str, float]) -> str:
        """A step in a few words."""
        reward = values.get("reward/total")
        text = "no reward" if reward is None else f"reward {reward:.3f}"
        return f"{text}, ALARM {' '.join(self.alarms.met)}" if self.alarms.met else text

    def _tell(self) -> None:
        """Log the alarms that begin, and note them in alarms.jsonl."""
        for alarm in self.begun:
            logging.warning("grpo: ALARM %s at step %d: %s", alarm.name, alarm.step, alarm.reason)
        if self.begun and hosts.is_first():
            lines = [json.dumps(dataclasses.asdict(alarm), ensure_ascii=False) + "\n" for alarm in self.begun]
            with (self.work.path / "alarms.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(lines))


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
    """Write a few groups of a step to rollouts/<step>.jsonl (example, its findings and what was looked for,
    weights of the reward's parts, texts, parts, verdicts, advantages) and rollouts/<step>.html."""
    if not hosts.is_first():
        return
    examples = [prompts.rows[i][0] for i in index[:SHOWN]]
    groups = [
        {
            "step": step,
            "example": example.id,
            **_found(prompts, example.id),
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


def _found(prompts: Any, example: str) -> dict[str, Any]:
    """The findings that the judge compares with, and what was looked for; None where there are none."""
    found = prompts.pool.findings.get(example)
    return {"findings": found and found.present, "searched": found and found.searched}


def _weights(scores: Sequence[Score], config: GrpoConfig) -> dict[str, float]:
    built_in = {name: getattr(config, f"{name}_weight") for name in ("answer", "format", "process")}
    built_in |= {"localisation": config.localisation_weight} if config.localisation_weight else {}
    return built_in | {part.name: part.weight for score in scores for part in score.own}


def _facts(text: str, score: Score, advantage: float) -> dict[str, Any]:
    """A rollout as rollouts/ has it: `own` are the parts of the user's functions, `why` their abstentions."""
    return {
        "text": text,
        "answer": score.answer,
        "format": score.format,
        "process": score.process,
        "localisation": score.localisation,
        "own": {part.name: part.value for part in score.own},
        "why": {part.name: part.why for part in score.own if part.value is None},
        "total": score.total,
        "verdicts": [dataclasses.asdict(verdict) for verdict in score.verdicts],
        "advantage": advantage,
    }
