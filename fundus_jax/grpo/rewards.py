"""Scores rollouts: reward = answer + format + process (paper, section 3.3), each part weighted by the config,
and what functions of the user's own add to it (`own_rewards.py`).

Answer and format are binary. The process part depends on the answer: a trace that led to the right one is
judged against the findings of the image, a trace that led to a wrong one against the knowledge of the label
it predicted; one or the other, never a sum (which the paper found to be hacked). Three things look alike and
are kept apart:

* a score of 0: the judge looked and found the trace bad.
* abstention: the judge failed. The rollout has no total and leaves the statistics of its group.
* not applicable: the image has no findings to compare with, so there is nothing to judge for any rollout of
  the prompt. The part is 0 for all of them and the group stays; were it an abstention, the whole group would
  be lost with its answer and format rewards.

The loop calls `score_rollout` for each rollout, `check_abstentions` and `reward_metrics` for the step and
`reward_arrays` for `advantages.group_advantages`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fundus_jax import dialog
from fundus_jax.findings import parse_mentions
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import Judge
from fundus_jax.grpo.own_rewards import Part
from fundus_jax.records import RATINGS, ConfigError, DataError, Example, Findings, Knowledge, Verdict

KnowledgeBase = Mapping[tuple[str, str], Knowledge]  # (label, modality) -> what the label looks like there


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The score of one rollout.

    `process` is None where the judge abstained, `total` where it or a function of the user's did; `verdict`
    is None where none was due. `own`: what the user's functions say (`own_rewards.py`).
    """

    answer: float
    format: float
    process: float | None
    total: float | None
    verdict: Verdict | None
    own: tuple[Part, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the rollout takes part in the statistics of its group."""
        return self.total is not None

    def plus(self, own: Sequence[Part]) -> "Score":
        """The score with what the user's functions say in its total; where one abstains there is none."""
        values = [None if part.value is None else part.weight * part.value for part in own]
        known = [value for value in (self.total, *values) if value is not None]
        return replace(self, own=tuple(own), total=sum(known) if len(known) == 1 + len(values) else None)


def from_dict(facts: Mapping[str, Any]) -> Score:
    """The score whose `dataclasses.asdict` went through JSON, as from another process."""
    verdict = facts["verdict"]
    if verdict is not None:
        verdict = Verdict(**{**verdict, "reasons": tuple(verdict["reasons"])})
    return Score(**{**facts, "verdict": verdict, "own": tuple(Part(**part) for part in facts["own"])})


def score_rollout(
    text: str,
    example: Example,
    findings: Findings | None,
    knowledge: KnowledgeBase,
    judge: Judge,
    config: GrpoConfig,
    *,
    finished: bool,
) -> Score:
    """Returns the score of one rollout.

    text: the generated reply. findings: those of the example's image, None when there are none. finished:
    whether the rollout ended by itself; one that was cut off at `max_new_tokens` gets format 0 even when what
    is there happens to parse.

    The answer counts as right when it is the example's answer up to case, white space and a trailing full
    stop. The judge is not asked when `process_weight` is 0 or there are no findings (not applicable), when
    there is no trace (flawed or implausible), and when a wrong answer is nothing the knowledge base knows
    (implausible): a non-answer, or an answer that is not a label, such as the wrong eye.

    Raises DataError when the findings are another example's or the judge's rating does not belong to the
    reference it was given.
    """
    if findings is not None and findings.example != example.id:
        raise DataError(f"findings of {findings.example!r} were passed for {example.id!r}")
    parsed = dialog.parse(text)
    right = parsed.answer is not None and dialog.same_answer(parsed.answer, example.answer)
    answer, form = float(right), float(parsed.well_formed and finished)
    verdict = None
    if findings is not None and config.process_weight:
        trace = parsed.think or ""
        if right:
            verdict = _judge_findings(trace, example, findings, judge)
        else:
            verdict = _judge_knowledge(trace, parsed.answer, example.modality, knowledge, judge)
    process = 0.0 if verdict is None else process_value(verdict, config)
    total = None
    if process is not None:
        total = config.answer_weight * answer + config.format_weight * form + config.process_weight * process
    return Score(answer=answer, format=form, process=process, total=total, verdict=verdict)


def process_value(verdict: Verdict, config: GrpoConfig) -> float | None:
    """Returns what a verdict is worth, None for an abstention.

    Raises DataError when rating and reference do not go together.
    """
    if verdict.rating == "abstain":
        return None
    if verdict.reference == "findings":
        worth = {"flawed": config.flawed, "tenuous": config.tenuous, "plausible": config.plausible}
    else:
        worth = {"implausible": config.knowledge_implausible, "plausible": config.knowledge_plausible}
    if verdict.rating not in worth:
        raise DataError(
            f"the judge rated {verdict.rating!r} against {verdict.reference}; "
            f"known there are {', '.join(worth)}"
        )
    return worth[verdict.rating]


def reward_arrays(scores: Sequence[Sequence[Score]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rewards, valid), [B,G] float32 and bool, from B groups of G scores.

    The reward of a rollout that is not valid is NaN, so that a use that forgets `valid` can not take it for a
    low score.
    """
    rewards = [[float("nan") if score.total is None else score.total for score in group] for group in scores]
    rewards = np.asarray(rewards, dtype=np.float32)
    return rewards, ~np.isnan(rewards)


def reward_metrics(scores: Sequence[Sequence[Score]]) -> dict[str, float]:
    """Returns what `metrics.jsonl` records of the scores of a step.

    Means: `answer` and `format` over all rollouts, `process` over those with a rating, `total` over the valid
    ones. Shares of all rollouts: `not_applicable`, and `rated_X` for each rating X, abstain among them. For
    each function F of the user's, `F` over the rollouts on which it gave a number, and `F_abstained`, the
    number of the others. Means over nothing are left out.
    """
    flat = [score for group in scores for score in group]
    columns = {
        "answer": [score.answer for score in flat],
        "format": [score.format for score in flat],
        "process": [
            score.process for score in flat if score.verdict is not None and score.process is not None
        ],
        "total": [score.total for score in flat if score.total is not None],
        "not_applicable": [score.verdict is None for score in flat],
    }
    for rating in RATINGS:
        columns[f"rated_{rating}"] = [
            score.verdict is not None and score.verdict.rating == rating for score in flat
        ]
    own = [part for score in flat for part in score.own]
    names = dict.fromkeys(part.name for part in own)
    columns |= {
        name: [part.value for part in own if part.name == name and part.value is not None] for name in names
    }
    lost = {
        f"{name}_abstained": sum(part.name == name and part.value is None for part in own) for name in names
    }
    return {name: float(np.mean(values)) for name, values in columns.items() if values} | lost


def check_abstentions(scores: Sequence[Sequence[Score]], config: GrpoConfig) -> None:
    """Raises ConfigError when the judge failed on a larger share of what it was asked than `max_abstain`."""
    verdicts = [score.verdict for group in scores for score in group if score.verdict is not None]
    failed = [verdict for verdict in verdicts if verdict.rating == "abstain"]
    if verdicts and len(failed) / len(verdicts) > config.max_abstain:
        why = "; ".join(sorted({reason for verdict in failed for reason in verdict.reasons})[:3])
        raise ConfigError(
            f"the judge abstained on {len(failed)} of {len(verdicts)} rollouts, more than the share "
            f"{config.max_abstain} of grpo.max_abstain ({why or 'no reason given'}); "
            "check the judge, or use the rules judge"
        )


def _judge_findings(trace: str, example: Example, findings: Findings, judge: Judge) -> Verdict:
    if not trace.strip():
        return Verdict(rating="flawed", reference="findings", reasons=("there is no trace",))
    verdict = judge(trace, findings, example.modality, about=_asked(example))
    return _expect(verdict, "findings")


def _judge_knowledge(
    trace: str, predicted: str | None, modality: str, knowledge: KnowledgeBase, judge: Judge
) -> Verdict:
    known = _find(knowledge, predicted, modality) if predicted is not None else None
    if known is None:
        reason = (
            "there is no answer" if predicted is None else f"no knowledge of {predicted[:80]!r} in {modality}"
        )
        return Verdict(rating="implausible", reference="knowledge", reasons=(reason,))
    if not trace.strip():
        return Verdict(rating="implausible", reference="knowledge", reasons=("there is no trace",))
    return _expect(judge(trace, known, modality), "knowledge")


def _expect(verdict: Verdict, reference: str) -> Verdict:
    if verdict.reference != reference:
        raise DataError(f"the judge was given {reference} and returned a verdict against {verdict.reference}")
    return verdict


def _find(knowledge: KnowledgeBase, label: str, modality: str) -> Knowledge | None:
    """Returns the knowledge of a label as a model wrote it, or None."""
    for (known, where), entry in knowledge.items():
        if where == modality and dialog.same_answer(known, label):
            return entry
    return None


def _asked(example: Example) -> tuple[str, ...] | None:
    """Returns the findings that the question is about, None when it is a diagnosis of the whole image."""
    if example.task in ("modality", "laterality"):
        return ()
    if example.task in ("lesion_presence", "lesion_location"):
        asked = parse_mentions(example.question)
        return tuple(sorted(asked.present | asked.absent))
    return None
