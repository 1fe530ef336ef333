"""Answers in, report out: scores every answer and sums them up by modality, level and task.

Pure Python and numpy: no model, no file. The report is a plain dict of JSON values, in which every number
is a `Figure` (value, n, low, high); table.py prints it. A model is compared with the best constant answer
of each question file and modality, because fundus data sets are so unbalanced that accuracy alone says
little.
Neighbours: extract.py (answers), scores.py (numbers), run.py (asks the model and writes the files).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fundus_jax import dialog, localisation
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.extract import VLMEVALKIT, Mode, extract_option, match_answer, match_answers
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.places import evaluate_places
from fundus_jax.evaluation.published import evaluate_published, evaluate_sets
from fundus_jax.evaluation.slices import evaluate_more
from fundus_jax.findings import observations, parse_mentions
from fundus_jax.records import ConfigError, Findings

FINDING_LEVEL = "L4"  # only a diagnosis obliges the trace to name what is there

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One response to an item.

    Attributes:
        sample: its number in the item's group.
        tokens: its length.
        finished: whether it ended by itself; False where max_new_tokens cut it off.
        logprob: sum of its tokens' log-probabilities, where the engine tells them.
    """

    item: Item
    response: str
    sample: int = 0
    tokens: int = 0
    finished: bool = True
    logprob: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a response comes to.

    Attributes:
        extracted: the option texts that it chooses; None where it names none.
        correct: whether they are the right ones, all and only.
        well_formed: whether it is one think block and one answer block; or one answer block, where no trace
            was asked for.
        claimed: the findings that its trace says are there, without those that nobody looked for; None where
            no trace or not these are asked for, or where they are not known.
    """

    extracted: tuple[str, ...] | None
    correct: bool
    well_formed: bool
    claimed: tuple[str, ...] | None


def outcome_of(prediction: Prediction, mode: Mode = "tail") -> Outcome:
    """Extracts the answer of one response and compares it with the right one."""
    item, parsed = prediction.item, dialog.parse(prediction.response, think=prediction.item.think)
    options = item.options or item.answers
    if item.multiple:
        extracted = match_answers(prediction.response, options)
    else:
        option = match_answer(prediction.response, options, lettered=item.lettered, mode=mode)
        extracted = None if option is None else (option,)
    claimed = None
    if item.findings is not None and item.think and item.level == FINDING_LEVEL:
        said = parse_mentions(observations(parsed.think or "")).present
        claimed = tuple(sorted(said - item.unknown))
    correct = extracted is not None and set(extracted) == set(item.answers)
    return Outcome(extracted=extracted, correct=correct, well_formed=parsed.well_formed, claimed=claimed)


def evaluate(
    answers: Sequence[Prediction],
    *,
    mode: Mode = "tail",
    seed: int = 0,
    published: str = "",
    partial: Sequence[str] = (),
    votes: Mapping[str, Findings] | None = None,
) -> Report:
    """Scores answers; the report is a plain dict of JSON values, whose every number has n and a 95% interval.

    `published` and `partial` are the benchmark's (`items.Benchmark`); `votes` are for `evaluate_more`.

    Keys:
        n, items, units, extraction: what was scored, and by which rules.
        partial: why these are not scores of the whole benchmark; [] where they are.
        published: the benchmark's score by the rules of `mode` alone (`evaluate_published`); None where it
            has none.
        accuracy, well_formed, finished, tokens: over all answers (tokens: mean length).
        unparsed: share, and the ids "ITEM#SAMPLE" of the answers that name no option; they count as wrong.
        vlmevalkit: accuracy by VLMEvalKit's rules alone, of each period, over the answers to lettered
            questions with one right option; None where there are none.
        by_modality, by_level, by_task: accuracy; majority (of the best constant answers: majority_answers);
            difference of the two; and funbench for a level or task.
        funbench: overall, files with sensitivity, specificity and score of each label, undefined labels; None
            where no item has a level.
        sets: scores of several answers and of open ones, by task (`evaluate_sets`); None where there
            are none.
        findings: answers, precision, recall, f1, by_finding; None where no answer's findings are known.
        localisation: of the boxes in the traces, see `evaluate_places`; None where no item asks for boxes.
        more: faithfulness, agreement of samples, length, and all by data set, modality and disease
            (`evaluate_more`).

    Intervals resample units, so that several answers about one patient or image do not count as independent.

    Raises:
        ConfigError: no answers.
    """
    if not answers:
        raise ConfigError("there is no answer to score: check the benchmark's selection")
    outcomes = [outcome_of(answer, mode) for answer in answers]
    items = [answer.item for answer in answers]
    units = [item.unit for item in items]

    def share(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
        return _share(values, units=units, seed=seed)

    upstream = [answer for answer in answers if answer.item.lettered and not answer.item.multiple]
    unparsed = [outcome.extracted is None for outcome in outcomes]
    hits = np.array([outcome.correct for outcome in outcomes])
    fun = _levels(items, outcomes, seed)
    texts, extracted = [answer.response for answer in answers], [outcome.extracted for outcome in outcomes]
    best, baseline = scores.majority([i.answer for i in items], [(i.modality, i.part) for i in items])
    groups = _Groups(items, hits, baseline, best, fun, units, seed)
    return {
        "n": len(answers),
        "items": len({item.id for item in items}),
        "units": len(set(units)),
        "extraction": mode,
        "partial": list(partial),
        "published": evaluate_published(published, items, texts, mode=mode, seed=seed) if published else None,
        "accuracy": share(hits),
        "well_formed": share([outcome.well_formed for outcome in outcomes]),
        "finished": share([answer.finished for answer in answers]),
        "tokens": share([answer.tokens for answer in answers]),
        "unparsed": {
            "share": share(unparsed),
            "ids": [f"{a.item.id}#{a.sample}" for a, bad in zip(answers, unparsed, strict=True) if bad],
        },
        "vlmevalkit": {rules: _by_letter(upstream, rules, seed) for rules in VLMEVALKIT}
        if upstream
        else None,
        "by_modality": groups.by(lambda item: item.modality),
        "by_level": groups.by(lambda item: item.level, lambda item: (item.level,)),
        "by_task": groups.by(lambda item: item.task, lambda item: (item.level, item.task)),
        "funbench": _funbench(fun) if fun.figures else None,
        "sets": evaluate_sets(items, extracted, texts, seed=seed),
        "findings": _findings(items, outcomes, seed),
        "localisation": evaluate_places(items, [_think(answer) for answer in answers], seed=seed),
        "more": evaluate_more(items, texts, extracted, [a.tokens for a in answers], votes=votes, seed=seed),
    }


def _levels(items: Sequence[Item], outcomes: Sequence[Outcome], seed: int) -> scores.FunBenchScores:
    """FunBench's scores of the answers to items that have a level."""
    index = [i for i, item in enumerate(items) if item.level]
    return scores.funbench(
        [(items[i].level, items[i].task, items[i].part) for i in index],
        [items[i].answers for i in index],
        [outcomes[i].extracted or () for i in index],
        [items[i].options or items[i].answers for i in index],
        units=[items[i].unit for i in index],
        seed=seed,
    )


def compare(
    before: Sequence[Prediction], after: Sequence[Prediction], *, mode: Mode = "tail", seed: int = 0
) -> dict[str, Any]:
    """Accuracy of `after` minus that of `before` on the same items, paired: value, n (items), low, high.

    Several samples of an item count with their mean, so that greedy and sampled answers can be compared.

    Raises:
        ConfigError: answers to different items.
    """
    paired = _paired(before, after, lambda one: float(outcome_of(one, mode).correct), seed)
    if paired is None:
        raise ConfigError("there is no answer to compare: check the benchmark's selection")
    return paired


def _paired(
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    value: Callable[[Prediction], float | None],
    seed: int,
) -> dict[str, Any] | None:
    """The difference of the means of a value, item by item; None where no item has the value."""
    means: list[dict[str, float]] = []
    for answers in (before, after):
        values: dict[str, list[float]] = {}
        for answer in answers:
            one = value(answer)
            if one is not None:
                values.setdefault(answer.item.id, []).append(one)
        means.append({name: float(np.mean(found)) for name, found in values.items()})
    if means[0].keys() != means[1].keys():
        one_sided = sorted(means[0].keys() ^ means[1].keys())
        raise ConfigError(f"{len(one_sided)} items were asked on one side only, such as {one_sided[0]}")
    units = {answer.item.id: answer.item.unit for answer in before if answer.item.id in means[0]}
    if not units:
        return None
    differences = [means[1][name] - means[0][name] for name in units]
    return _share(differences, units=list(units.values()), seed=seed)


def compare_places(
    before: Sequence[Prediction], after: Sequence[Prediction], *, seed: int = 0
) -> dict[str, Any] | None:
    """`localisation.score` of `after` minus that of `before` on the same items, paired as by `compare`.

    None where no item has boxes. Raises ConfigError for answers to different items.
    """
    return _paired(
        before,
        after,
        lambda one: localisation.score(_think(one), one.item.boxes or (), one.item.unknown),
        seed,
    )


def _think(prediction: Prediction) -> str:
    return dialog.parse(prediction.response).think or ""


def _by_letter(answers: Sequence[Prediction], mode: Mode, seed: int) -> dict[str, Any]:
    """Accuracy when VLMEvalKit's rules alone find the letter, as other people's numbers were made."""
    hits = []
    for answer in answers:
        options = dialog.lettered(answer.item.options)
        letter = extract_option(answer.response, options, mode)
        hits.append(letter is not None and options[letter] == answer.item.answers[0])
    return _share(hits, units=[answer.item.unit for answer in answers], seed=seed)


def _share(values: Sequence[float] | np.ndarray, *, units: Sequence[Hashable], seed: int) -> dict[str, Any]:
    return scores.mean(np.asarray(values, dtype=np.float64), units=units, seed=seed).as_dict()


@dataclass(frozen=True, slots=True)
class _Groups:
    """The answers, ready to be summed up by any key of their items."""

    items: Sequence[Item]
    hits: np.ndarray
    baseline: np.ndarray
    best: dict[Hashable, str]
    fun: scores.FunBenchScores
    units: Sequence[str]
    seed: int

    def by(
        self, key: Callable[[Item], str], node: Callable[[Item], tuple[str, ...]] | None = None
    ) -> dict[str, Any]:
        """One entry for each key but "", in sorted order; `node` is where FunBench's score of one stands."""
        members: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            if key(item):
                members.setdefault(key(item), []).append(i)
        return {name: self._entry(members[name], node) for name in sorted(members)}

    def _entry(self, index: list[int], node: Callable[[Item], tuple[str, ...]] | None) -> dict[str, Any]:
        units = [self.units[i] for i in index]
        hits, baseline = self.hits[index], self.baseline[index]
        strata = sorted({(self.items[i].modality, self.items[i].part) for i in index})
        entry = {
            "accuracy": _share(hits, units=units, seed=self.seed),
            "majority": _share(baseline, units=units, seed=self.seed),
            "difference": scores.paired_difference(hits, baseline, units=units, seed=self.seed).as_dict(),
            "majority_answers": {
                f"{modality} {part}": self.best[modality, part] for modality, part in strata
            },
        }
        if node is not None and self.items[index[0]].level:
            entry["funbench"] = self.fun.figures[node(self.items[index[0]])].as_dict()
        return entry


def _funbench(fun: scores.FunBenchScores) -> dict[str, Any]:
    names = ("sensitivity", "specificity", "score")
    return {
        "overall": fun.figures[()].as_dict(),
        "files": {
            "/".join(key): {
                "score": fun.figures[key].as_dict(),
                "labels": {label: dict(zip(names, values, strict=True)) for label, values in row.items()},
            }
            for key, row in fun.labels.items()
        },
        "undefined": list(fun.undefined),
    }


def _findings(items: Sequence[Item], outcomes: Sequence[Outcome], seed: int) -> dict[str, Any] | None:
    """Findings of the traces against those of the masks, pooled and one by one."""
    known = [i for i, outcome in enumerate(outcomes) if outcome.claimed is not None]
    if not known:
        return None
    units = [items[i].unit for i in known]
    names, counts = scores.finding_table(
        [set(items[i].findings or ()) for i in known], [set(outcomes[i].claimed or ()) for i in known]
    )

    def figures(table: np.ndarray) -> dict[str, Any]:
        found = scores.finding_figures(table, units=units, seed=seed)
        return {name: one.as_dict() for name, one in found.items()}

    by_finding = {name: figures(counts[:, [k]]) for k, name in enumerate(names)}
    return {"answers": len(known), **figures(counts), "by_finding": by_finding}
