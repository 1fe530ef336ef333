"""Scores rollouts: reward = answer + format + process (paper, section 3.3), each part weighted by the config;
where its weight is not 0, + localisation: how well the trace's boxes agree with those of the masks; and what
functions of the user's own add to it (`own_rewards.py`).

Answer and format are binary. The process part depends on the answer: a trace that led to the right one is
judged against the findings of the image, a trace that led to a wrong one against the knowledge of the label
it predicted; one or the other, not the sum, which the paper found to be hacked. `config.process` also offers
what the paper compares this with: always the one, always the other, and the sum. Three things look alike and
are kept apart:

* a score of 0: the judge looked and found the trace bad.
* abstention: the judge failed, of two verdicts on one at least. The rollout has no total and leaves the
  statistics of its group.
* not applicable: the image has no findings to compare with (or, where the knowledge is asked in any case, the
  right answer is no label with knowledge), so there is nothing to judge for any rollout of the prompt. The
  part is 0 for all of them and the group stays; were it an abstention, the whole group would be lost with its
  answer and format rewards.

The loop calls `assess` for each rollout, which says what a judge has to decide, then `score_rollouts`, which
asks the judge about all of them at once and puts the parts together; `reward_metrics` for the step, and
`reward_arrays` for `advantages.group_advantages`. A judge that fails too often is `abstentions.py`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fundus_jax import dialog, localisation
from fundus_jax.findings import parse_mentions, unknown
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import Judge, Request, RulesJudge
from fundus_jax.grpo.own_rewards import Part
from fundus_jax.records import RATINGS, DataError, Example, Findings, Knowledge, Verdict

KnowledgeBase = Mapping[tuple[str, str], Knowledge]  # (label, modality) -> what the label looks like there


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """What is known of a rollout before a judge is asked.

    `localisation` is None where it does not apply. `due` decides the process part: requests to the judge, and
    verdicts where none has to be asked; () where the part is not applicable. More than one is summed.
    """

    answer: float
    format: float
    localisation: float | None
    due: tuple[Request | Verdict, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The score of one rollout.

    `verdicts` has none where none was due, and two where both references were (findings, then knowledge).
    `process` is None where the judge abstained on one of them, `total` where it or a function of the user's
    did. `localisation` is None where it does not apply. `own`: what the user's functions say. `asked`: how
    many of the verdicts a judge gave. `agreed`: for each of those, unless it is an abstention, whether the
    rules say the same; () where the rules themselves are the judge.
    """

    answer: float
    format: float
    process: float | None
    total: float | None
    verdicts: tuple[Verdict, ...] = ()
    localisation: float | None = None
    own: tuple[Part, ...] = ()
    asked: int = 0
    agreed: tuple[bool, ...] = ()

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
    verdicts = tuple(Verdict(**{**one, "reasons": tuple(one["reasons"])}) for one in facts["verdicts"])
    own, agreed = tuple(Part(**part) for part in facts["own"]), tuple(facts["agreed"])
    return Score(**{**facts, "verdicts": verdicts, "own": own, "agreed": agreed})


def assess(
    text: str,
    example: Example,
    findings: Findings | None,
    knowledge: KnowledgeBase,
    config: GrpoConfig,
    *,
    finished: bool,
    think: bool = True,
    style: str = "options",
) -> Assessment:
    """Returns answer and format of one rollout, and what is to be judged.

    text: the generated reply. findings: those of the example's image, None when there are none. finished:
    whether the rollout ended by itself; one that was cut off at `max_new_tokens` gets format 0 even when what
    is there happens to parse. think: whether the prompt asked for a trace; where it did not, the format is
    the answer block alone. style: how the prompt asked (`dialog.messages`).

    The answer counts as right when it is the example's answer up to case, white space and a trailing full
    stop. The judge is not asked when nothing is due (`references`), when there is no trace (flawed or
    implausible), and when the answer is nothing the knowledge base knows (implausible): a non-answer, or an
    answer that is not a label, such as the wrong eye. Localisation compares with the example's boxes,
    so the caller passes those that a trace says (`dialog.positioned`).

    Raises DataError when the findings are another example's.
    """
    if findings is not None and findings.example != example.id:
        raise DataError(f"findings of {findings.example!r} were passed for {example.id!r}")
    parsed = dialog.parse(text, think=think)
    answer = dialog.meant(parsed.answer, example, style)
    right = answer is not None and dialog.same_answer(answer, example.answer)
    trace, due = parsed.think or "", ()
    for reference in references(example, right, findings, knowledge, config):
        if reference == "findings" and findings is not None:
            due += (_against_findings(trace, example, findings),)
        else:
            due += (_against_knowledge(trace, answer, example.modality, knowledge),)
    unseen = unknown(example.modality, example.searched)
    where = localisation.score(trace, example.boxes, unseen) if config.localisation_weight else None
    form = float(parsed.well_formed and finished)
    return Assessment(answer=float(right), format=form, localisation=where, due=due)


def references(
    example: Example, right: bool, findings: Findings | None, knowledge: KnowledgeBase, config: GrpoConfig
) -> tuple[str, ...]:
    """Returns what a rollout is judged against: "findings", "knowledge", both or nothing.

    What is not applicable is so for every rollout of the prompt, whatever it answered: the findings where the
    image has none, the knowledge, in the modes that ask for it whatever was answered, where the right answer
    is not a label that the knowledge base knows.
    """
    if not config.process_weight:
        return ()
    if config.process == "selective":
        return () if findings is None else ("findings" if right else "knowledge",)
    known = _find(knowledge, example.answer, example.modality)
    there = {"findings": findings is not None, "knowledge": known is not None}
    return tuple(name for name, is_there in there.items() if is_there and config.process in (name, "sum"))


def score_rollouts(rollouts: Sequence[Assessment], judge: Judge, config: GrpoConfig) -> list[Score]:
    """Returns the scores of the rollouts, in their order, after one call of the judge.

    Where it is not the rules judge, that one is asked too, and whether they agree is noted.

    Raises DataError when the judge's rating does not belong to the reference it was given.
    """
    requests = [part for rollout in rollouts for part in rollout.due if isinstance(part, Request)]
    verdicts = judge(requests) if requests else []
    for request, verdict in zip(requests, verdicts, strict=True):
        if verdict.reference != request.kind:
            raise DataError(
                f"the judge was given {request.kind} and returned a verdict against {verdict.reference}"
            )
    rules = verdicts if isinstance(judge, RulesJudge) else RulesJudge()(requests)
    answers = iter(zip(verdicts, rules, strict=True))
    scores = []
    for rollout in rollouts:
        asked = [next(answers) for part in rollout.due if isinstance(part, Request)]
        own = iter(verdict for verdict, _ in asked)
        given = tuple(next(own) if isinstance(part, Request) else part for part in rollout.due)
        agreed = tuple(one.rating == other.rating for one, other in asked if one.rating != "abstain")
        score = _compose(rollout, given, config)
        compared = () if isinstance(judge, RulesJudge) else agreed
        scores.append(replace(score, asked=len(asked), agreed=compared))
    return scores


def _compose(rollout: Assessment, verdicts: tuple[Verdict, ...], config: GrpoConfig) -> Score:
    """The weighted sum; without a total where a judge abstained."""
    process, total = process_sum(verdicts, config), None
    if process is not None:
        total = config.answer_weight * rollout.answer + config.format_weight * rollout.format
        total += config.process_weight * process
        total += config.localisation_weight * (rollout.localisation or 0.0)
    return Score(
        answer=rollout.answer,
        format=rollout.format,
        process=process,
        total=total,
        verdicts=verdicts,
        localisation=rollout.localisation,
    )


def process_sum(verdicts: Sequence[Verdict], config: GrpoConfig) -> float | None:
    """Returns what the verdicts on a rollout are worth together: 0 without any, None when one abstains."""
    values = [process_value(verdict, config) for verdict in verdicts]
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


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

    Means: `answer` and `format` over all rollouts, `process` over those with a rating, `localisation` over
    those it applies to, `total` over the valid ones. Shares of all rollouts: `not_applicable`, and `rated_X`
    for each rating X, abstain among them (in the mode "sum" a rollout may have two). `agreement`: share of
    the ratings of another judge that the rules give too. For each function F of the user's, `F` over the
    rollouts on which it gave a number, and `F_abstained`, the number of the others. Means over nothing are
    left out.
    """
    flat = [score for group in scores for score in group]
    columns = {
        "answer": [score.answer for score in flat],
        "format": [score.format for score in flat],
        "process": [score.process for score in flat if score.verdicts and score.process is not None],
        "localisation": [score.localisation for score in flat if score.localisation is not None],
        "total": [score.total for score in flat if score.total is not None],
        "not_applicable": [not score.verdicts for score in flat],
        "agreement": [same for score in flat for same in score.agreed],
    }
    for rating in RATINGS:
        columns[f"rated_{rating}"] = [
            any(verdict.rating == rating for verdict in score.verdicts) for score in flat
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


def _against_findings(trace: str, example: Example, findings: Findings) -> Request | Verdict:
    if not trace.strip():
        return Verdict(rating="flawed", reference="findings", reasons=("there is no trace",))
    return Request(trace=trace, reference=findings, modality=example.modality, about=_asked(example))


def _against_knowledge(
    trace: str, predicted: str | None, modality: str, knowledge: KnowledgeBase
) -> Request | Verdict:
    known = _find(knowledge, predicted, modality) if predicted is not None else None
    if known is not None and trace.strip():
        return Request(trace=trace, reference=known, modality=modality)
    reason = "there is no trace"
    if known is None:
        reason = (
            "there is no answer" if predicted is None else f"no knowledge of {predicted[:80]!r} in {modality}"
        )
    return Verdict(rating="implausible", reference="knowledge", reasons=(reason,))


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
