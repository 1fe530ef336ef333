"""Answers in, report out: scores every answer and sums them up by modality, level and task.

Pure Python and numpy: no model, no file. The report is a plain dict of JSON values, in which every number is
a `Figure` (value, n, low, high); `table` prints it. A model is compared with the best constant answer of each
question file and modality, because fundus data sets are so unbalanced that accuracy alone says little.
Neighbours: extract.py (answers), scores.py (numbers), run.py (asks the model and writes the files).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fundus_jax import dialog, localisation
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.extract import MODES, Mode, extract_option, match_answer, match_answers
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.places import evaluate_places
from fundus_jax.findings import parse_mentions
from fundus_jax.records import ConfigError

FINDING_LEVEL = "L4"  # only a diagnosis obliges the trace to name what is there

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One response to an item.

    Attributes:
        sample: its number in the item's group.
        tokens: its length.
        finished: whether it ended by itself; False where max_new_tokens cut it off.
    """

    item: Item
    response: str
    sample: int = 0
    tokens: int = 0
    finished: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a response comes to.

    Attributes:
        extracted: the option texts that it chooses; None where it names none.
        correct: whether they are the right ones, all and only.
        well_formed: whether it is one think block and one answer block; or one answer block, where no trace
            was asked for.
        claimed: the findings that its trace says are there; None where no trace or not these are asked for,
            or where they are not known.
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
        claimed = tuple(sorted(parse_mentions(parsed.think or "").present))
    correct = extracted is not None and set(extracted) == set(item.answers)
    return Outcome(extracted=extracted, correct=correct, well_formed=parsed.well_formed, claimed=claimed)


def evaluate(answers: Sequence[Prediction], *, mode: Mode = "tail", seed: int = 0) -> Report:
    """Scores answers; the report is a plain dict of JSON values, whose every number has n and a 95% interval.

    Keys:
        n, items, units, extraction: what was scored, and by which rules.
        accuracy, well_formed, finished, tokens: over all answers (tokens: mean length).
        unparsed: share, and the ids "ITEM#SAMPLE" of the answers that name no option; they count as wrong.
        vlmevalkit: accuracy by VLMEvalKit's rules alone, of each period, over the answers to lettered
            questions with one right option; None where there are none.
        by_modality, by_level, by_task: accuracy; majority (of the best constant answers: majority_answers);
            difference of the two; and funbench for a level or task.
        funbench: overall, files with sensitivity, specificity and score of each label, undefined labels.
        findings: answers, precision, recall, f1, by_finding; None where no answer's findings are known.
        localisation: of the boxes in the traces, see `evaluate_places`; None where no item asks for boxes.

    Intervals resample units, so that several answers about one patient or image do not count as independent.

    Raises:
        ConfigError: no answers.
    """
    if not answers:
        raise ConfigError("there is no answer to score: check the benchmark's selection")
    outcomes = [outcome_of(answer, mode) for answer in answers]
    items = [answer.item for answer in answers]
    units = [item.unit for item in items]
    share = partial(_share, units=units, seed=seed)
    upstream = [answer for answer in answers if answer.item.lettered and not answer.item.multiple]
    unparsed = [outcome.extracted is None for outcome in outcomes]
    hits = np.array([outcome.correct for outcome in outcomes])
    fun = scores.funbench(
        [(item.level, item.task, item.part) for item in items],
        [item.answers for item in items],
        [outcome.extracted or () for outcome in outcomes],
        [item.options or item.answers for item in items],
        units=units,
        seed=seed,
    )
    best, baseline = scores.majority([i.answer for i in items], [(i.modality, i.part) for i in items])
    groups = _Groups(items, hits, baseline, best, fun, units, seed)
    return {
        "n": len(answers),
        "items": len({item.id for item in items}),
        "units": len(set(units)),
        "extraction": mode,
        "accuracy": share(hits),
        "well_formed": share([outcome.well_formed for outcome in outcomes]),
        "finished": share([answer.finished for answer in answers]),
        "tokens": share([answer.tokens for answer in answers]),
        "unparsed": {
            "share": share(unparsed),
            "ids": [f"{a.item.id}#{a.sample}" for a, bad in zip(answers, unparsed, strict=True) if bad],
        },
        "vlmevalkit": {rules: _by_letter(upstream, rules, seed) for rules in MODES} if upstream else None,
        "by_modality": groups.by(lambda item: item.modality),
        "by_level": groups.by(lambda item: item.level, lambda item: (item.level,)),
        "by_task": groups.by(lambda item: item.task, lambda item: (item.level, item.task)),
        "funbench": _funbench(fun),
        "findings": _findings(items, outcomes, seed),
        "localisation": evaluate_places(items, [_think(answer) for answer in answers], seed=seed),
    }


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
    return _paired(before, after, lambda one: localisation.score(_think(one), one.item.boxes or ()), seed)


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
        """One entry for each key, in sorted order; `node` is where FunBench's score of the group stands."""
        members: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
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
        if node is not None:
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


def table(report: Report) -> str:
    """The report as a plain text table: a line a number, in per cent, with its interval and its n."""
    lines = [_line("accuracy", report["accuracy"])]
    for group in ("by_modality", "by_level", "by_task"):
        for name, entry in report[group].items():
            lines.append(_line(f"{group.removeprefix('by_')} {name}", entry["accuracy"]))
            lines.append(_line("    best constant answer", entry["majority"]))
            lines.append(_line("    difference", entry["difference"]))
            if "funbench" in entry:
                lines.append(_line("    FunBench score", entry["funbench"]))
    lines.append(_line("FunBench score, mean of levels", report["funbench"]["overall"]))
    if report["findings"] is not None:
        for name in ("precision", "recall", "f1"):
            lines.append(_line(f"findings {name}", report["findings"][name]))
        for name, figures in report["findings"]["by_finding"].items():
            lines.append(_line(f"    {name} f1", figures["f1"]))
    if report["localisation"] is not None:
        for name, shown in (("iou", "boxes, matched IoU"), ("f1", "boxes, F1 at IoU 0.5")):
            lines.append(_line(shown, report["localisation"][name]))
            for group in ("by_modality", "by_finding"):
                for member, figures in report["localisation"][group].items():
                    lines.append(_line(f"    {member} {name}", figures[name]))
        lines.append(_line("boxes malformed", report["localisation"]["malformed"]))
    lines += [_line(name.replace("_", "-"), report[name]) for name in ("well_formed", "finished")]
    for rules, figure in (report["vlmevalkit"] or {}).items():
        lines.append(_line(f"accuracy by VLMEvalKit, {rules}", figure))
    lines.append(_line("unparsed", report["unparsed"]["share"]))
    head = f"{'':<44}{'%':>7}  {'95% interval':>15}{'n':>9}"
    scope = f"{report['n']} answers to {report['items']} items of {report['units']} patients or images"
    undefined = report["funbench"]["undefined"]
    notes = [f"without a FunBench score: {', '.join(undefined)}"] if undefined else []
    return "\n".join([f"{scope}; extraction: {report['extraction']}", head, *lines, *notes]) + "\n"


def _line(name: str, figure: dict[str, Any]) -> str:
    value, n = figure["value"], figure["n"]
    if value is None:
        return f"{name:<44}{'-':>7}  {'-':>15}{n:>9}"
    interval = f"[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
    return f"{name:<44}{100 * value:>7.1f}  {interval:>15}{n:>9}"
