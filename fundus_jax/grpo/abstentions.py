"""Stops a run whose judge fails too often: a window over the steps, which a resumed run fills again.

An abstention costs its rollout, and a judge that abstains often leaves groups of nothing. One step with a
server that restarts says little, so the share is taken over `abstain_window` steps; but a judge that answers
nothing need not be waited for so long. Hence the bound: as many failures as a whole window at the present
rate of requests may have. A judge that never answers is seen after `max_abstain` of a window.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from fundus_jax import hosts
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import JudgeError
from fundus_jax.grpo.rewards import Score


class Abstentions:
    """What the judge was asked and could not answer, in each of the last `abstain_window` steps.

    Args:
        config: its `max_abstain` and `abstain_window` count. steps: of the stage.
        metrics: the metrics.jsonl of the run, in which a resumed run finds the steps up to `done`.
    """

    def __init__(self, config: GrpoConfig, steps: int, metrics: Path | None = None, done: int = 0) -> None:
        self.config = config
        self.size = min(config.abstain_window, steps)
        self._steps: deque[tuple[int, int]] = deque(maxlen=self.size)
        self._why: list[str] = []
        if done and metrics is not None:
            self._steps.extend(hosts.gather(_logged(metrics, done) if hosts.is_first() else [])[0])

    def add(self, scores: Sequence[Sequence[Score]]) -> dict[str, float]:
        """Count a step and return what metrics.jsonl records of it, from which a resumed run goes on.

        Raises JudgeError, with the reasons that the judge gave, when more than `max_abstain` of what a whole
        window asks has failed already.
        """
        flat = [score for group in scores for score in group]
        failed = [one for score in flat for one in score.verdicts if one.rating == "abstain"]
        self._steps.append((sum(score.asked for score in flat), len(failed)))
        self._why = sorted({reason for verdict in failed for reason in verdict.reasons})[:3] or self._why
        asked, lost = (sum(counts) for counts in zip(*self._steps, strict=True))
        window = asked * self.size / len(self._steps)
        if lost > self.config.max_abstain * window:
            raise JudgeError(
                f"the judge abstained on {lost} of {asked} requests in {len(self._steps)} steps, more than "
                f"the share {self.config.max_abstain} of grpo.max_abstain over {self.size} steps "
                f"({'; '.join(self._why) or 'no reason given'}); check the judge, or use the rules judge"
            )
        return {"judge/asked": self._steps[-1][0], "judge/abstained": self._steps[-1][1]}


def _logged(metrics: Path, done: int) -> list[tuple[int, int]]:
    """(asked, abstained) of the steps up to `done`, as logged."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    mine = [line for line in lines if line["stage"] == "grpo" and line["step"] <= done]
    return [
        (int(line["judge/asked"]), int(line["judge/abstained"])) for line in mine if "judge/asked" in line
    ]
