"""Pure scores: accuracy, majority baseline, FunBench's score, findings' precision, recall and F1, the paper's
averages, sets of answers.

They take plain sequences of answers and give `Figure`s, so that each can be checked by hand. FunBench scores
a label by the harmonic mean of its sensitivity and specificity and averages label -> file -> task -> level ->
overall (FunBench's evaluate.py, as domain.md 1.2 describes it). Where that script meets 0/0 it prints NaN;
here

* sensitivity and specificity both 0 give 0, the limit of the harmonic mean;
* a label without positives or without negatives has no score and is left out of the average, and named.

Wherever the script gives a number, ours is the same. Neighbours: bootstrap.py (intervals), report.py (what is
shown).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fundus_jax.evaluation.bootstrap import Figure, figure, interval, resampled_totals, unit_totals
from fundus_jax.records import ConfigError

Hits = Sequence[bool] | np.ndarray
Texts = Sequence[Sequence[str]]  # of each answer, a set of option texts
Sets = Sequence[frozenset[str] | set[str]]
TP, FN, TN, FP = range(4)  # last axis of a label table


def mean(values: np.ndarray, *, units: Sequence[Hashable] | None = None, seed: int = 0) -> Figure:
    """Mean of values [N]. The interval resamples units (patients, images); None: every value is one."""
    values = np.asarray(values, dtype=np.float64)
    rows = np.stack([values, np.ones_like(values)], axis=1)
    return figure(rows, lambda sums: ratio(sums[..., 0], sums[..., 1]), units=units, seed=seed)


def accuracy(hits: Hits, *, units: Sequence[Hashable] | None = None, seed: int = 0) -> Figure:
    """Share of hits [N]."""
    return mean(np.asarray(hits, dtype=bool), units=units, seed=seed)


def paired_difference(
    first: Hits, second: Hits, *, units: Sequence[Hashable] | None = None, seed: int = 0
) -> Figure:
    """Share of hits of `first` [N] minus that of `second` [N]; the same units are drawn for both.

    Raises:
        ConfigError: different lengths.
    """
    if len(first) != len(second):
        raise ConfigError(
            f"{len(first)} and {len(second)} hits cannot be paired: score the same answers twice"
        )
    ones, twos = (np.asarray(hits, dtype=bool).astype(np.float64) for hits in (first, second))
    return mean(ones - twos, units=units, seed=seed)


def majority(answers: Sequence[str], strata: Sequence[Hashable]) -> tuple[dict[Hashable, str], np.ndarray]:
    """The most frequent answer of each stratum, and whether it is right for each item [N].

    Of equally frequent answers it is the first in sorted order. It is read off the test answers themselves:
    the most that a constant answer could reach.
    """
    counts: dict[Hashable, Counter[str]] = {}
    for answer, stratum in zip(answers, strata, strict=True):
        counts.setdefault(stratum, Counter())[answer] += 1
    best = {
        stratum: sorted(c.items(), key=lambda pair: (-pair[1], pair[0]))[0][0]
        for stratum, c in counts.items()
    }
    return best, np.array([best[s] == a for a, s in zip(answers, strata, strict=True)], dtype=bool)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; NaN where below is 0."""
    below = np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis [..., K] -> [...] with NaN left out; NaN where nothing is defined."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1))


# FunBench -------------------------------------------------------------------------------------------------


def label_table(gold: Texts, predicted: Texts, options: Texts) -> tuple[tuple[str, ...], np.ndarray]:
    """FunBench's label matrix of one question file: labels [K] and counts [N, K, 4] (TP, FN, TN, FP).

    The labels are all texts that are right somewhere in the file, sorted, with No/Yes turned to Yes/No. For a
    label only the samples that offer it count: elsewhere its four cells are 0. Predicted texts that are no
    label are dropped.
    """
    labels = sorted({text for texts in gold for text in texts})
    if labels == ["No", "Yes"]:
        labels = ["Yes", "No"]
    is_gold, is_predicted, offered = (_membership(texts, labels) for texts in (gold, predicted, options))
    cells = [
        is_gold & is_predicted,
        is_gold & ~is_predicted,
        ~is_gold & ~is_predicted,
        ~is_gold & is_predicted,
    ]
    return tuple(labels), (np.stack(cells, axis=-1) & offered[..., None]).astype(np.float64)


def _membership(sets: Texts | Sets, names: Sequence[str]) -> np.ndarray:
    """Bool [N, K]: is names[k] in sets[i]?"""
    column = {name: k for k, name in enumerate(names)}
    matrix = np.zeros((len(sets), len(names)), dtype=bool)
    for row, members in zip(matrix, sets, strict=True):
        row[[column[name] for name in members if name in column]] = True
    return matrix


def sensitivity_specificity(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity and specificity [..., K] of summed label tables [..., K, 4]."""
    tp, fn, tn, fp = (sums[..., cell] for cell in (TP, FN, TN, FP))
    return ratio(tp, tp + fn), ratio(tn, tn + fp)


def label_scores(sums: np.ndarray) -> np.ndarray:
    """Harmonic mean of sensitivity and specificity [..., K] of summed tables [..., K, 4]; NaN: undefined."""
    sensitivity, specificity = sensitivity_specificity(sums)
    total = sensitivity + specificity
    return np.where(total == 0, 0.0, 2 * ratio(sensitivity * specificity, total))


def file_score(sums: np.ndarray) -> np.ndarray:
    """FunBench score [...] of one file from its summed label table [..., K, 4].

    One label: its sensitivity. Two: the score of the first, as the other mirrors it. More: their mean.
    """
    labels = sums.shape[-2]
    if labels == 1:
        return sensitivity_specificity(sums)[0][..., 0]
    scores = label_scores(sums)
    return scores[..., 0] if labels == 2 else mean_defined(scores)


@dataclass(frozen=True, slots=True)
class FunBenchScores:
    """Scores of a tree of question files.

    Attributes:
        figures: keyed by (level, task, file), (level, task), (level,), and () for the overall score.
        labels: sensitivity, specificity and score of every label of a file; None where undefined.
        undefined: the labels left out for want of a score, as "level/task/file: label".
    """

    figures: dict[tuple[str, ...], Figure]
    labels: dict[tuple[str, ...], dict[str, tuple[float | None, ...]]]
    undefined: tuple[str, ...]


def funbench(
    files: Sequence[tuple[str, str, str]],
    gold: Texts,
    predicted: Texts,
    options: Texts,
    *,
    units: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> FunBenchScores:
    """FunBench's scores of N answers; `files[i]` is (level, task, file) of answer i.

    All files are resampled together, because one image is asked about in several of them.
    """
    if not files:
        return FunBenchScores({}, {}, ())
    tables = resampled_tables(files, gold, predicted, options, units, seed)
    scores, counts = with_means(tables), counted(files)
    figures = {key: interval(score[0], score[1:], counts[key]) for key, score in sorted(scores.items())}
    labels = {}
    for key, (names, table) in tables.items():
        columns = (*sensitivity_specificity(table[0]), label_scores(table[0]))
        labels[key] = {
            name: tuple(None if np.isnan(column[k]) else float(column[k]) for column in columns)
            for k, name in enumerate(names)
        }
    undefined = tuple(
        f"{'/'.join(key)}: {name}"
        for key, row in labels.items()
        for name, values in row.items()
        if values[2] is None and len(row) > 1  # a file of one label is scored by its sensitivity
    )
    return FunBenchScores(figures, labels, undefined)


def resampled_tables(
    files: Sequence[tuple[str, ...]],
    gold: Texts,
    predicted: Texts,
    options: Texts,
    units: Sequence[Hashable] | None,
    seed: int,
) -> dict[tuple[str, ...], tuple[tuple[str, ...], np.ndarray]]:
    """Each file's labels and its summed label tables [1 + R, K, 4]: row 0 is the sample itself. All files are
    drawn together."""
    of_file: dict[tuple[str, ...], list[int]] = {}
    for i, key in enumerate(files):
        of_file.setdefault(key, []).append(i)
    drawn: Sequence[Hashable] = range(len(files)) if units is None else units
    number = {unit: u for u, unit in enumerate(dict.fromkeys(drawn))}
    unit_of = np.array([number[unit] for unit in drawn], np.intp)
    names: dict[tuple[str, ...], tuple[str, ...]] = {}
    columns: list[np.ndarray] = []
    for key in sorted(of_file):
        index = of_file[key]
        names[key], table = label_table(*([texts[i] for i in index] for texts in (gold, predicted, options)))
        columns.append(np.zeros((len(number), table[0].size)))
        np.add.at(columns[-1], unit_of[index], table.reshape(len(index), -1))
    totals = np.concatenate(columns, axis=1)
    sums = np.concatenate([totals.sum(axis=0, keepdims=True), resampled_totals(totals, seed=seed)])
    ends = np.cumsum([4 * len(labels) for labels in names.values()])[:-1]
    parts = np.split(sums, ends, axis=1)
    return {
        key: (labels, part.reshape(len(sums), len(labels), 4))
        for (key, labels), part in zip(names.items(), parts, strict=True)
    }


def with_means(
    tables: Mapping[tuple[str, ...], tuple[tuple[str, ...], np.ndarray]],
) -> dict[tuple[str, ...], np.ndarray]:
    """Scores [1 + R] of the files, and of all that is above them: the mean of what is one step below."""
    scores = {key: file_score(table) for key, (_, table) in tables.items()}
    for depth in range(len(next(iter(scores))) - 1, -1, -1):
        below = [key for key in scores if len(key) == depth + 1]
        for parent in sorted({key[:depth] for key in below}):
            scores[parent] = mean_defined(
                np.stack([scores[k] for k in below if k[:depth] == parent], axis=-1)
            )
    return scores


def counted(files: Sequence[tuple[str, ...]]) -> Counter[tuple[str, ...]]:
    """How many answers there are in each file, and in all that is above it."""
    return Counter(file[:depth] for file in files for depth in range(len(file) + 1))


# Findings -------------------------------------------------------------------------------------------------


def finding_table(gold: Sets, claimed: Sets) -> tuple[tuple[str, ...], np.ndarray]:
    """Names [F] of all findings present or claimed anywhere, sorted, and counts [N, F, 3] (TP, FP, FN)."""
    names = tuple(sorted(set().union(*gold, *claimed)))
    is_gold, is_claimed = _membership(gold, names), _membership(claimed, names)
    cells = [is_gold & is_claimed, ~is_gold & is_claimed, is_gold & ~is_claimed]
    return names, np.stack(cells, axis=-1).astype(np.float64)


def finding_figures(
    table: np.ndarray, *, units: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Figure]:
    """Precision, recall and F1 of counts [N, F, 3], pooled over answers and findings (micro).

    n is the count behind each: claimed for precision, present for recall, claimed or present for F1.
    """
    rows = table.sum(axis=1)
    tp, fp, fn = (int(total) for total in rows.sum(axis=0))
    shares = {
        "precision": (tp + fp, lambda s: ratio(s[..., 0], s[..., 0] + s[..., 1])),
        "recall": (tp + fn, lambda s: ratio(s[..., 0], s[..., 0] + s[..., 2])),
        "f1": (tp + fp + fn, lambda s: ratio(2 * s[..., 0], 2 * s[..., 0] + s[..., 1] + s[..., 2])),
    }
    return {name: figure(rows, share, n=n, units=units, seed=seed) for name, (n, share) in shares.items()}


# The paper's averages -------------------------------------------------------------------------------------

PAPER_GROUPS = {
    "FunBench": ("L1", "L2", "L3", "L4"),
    "Omni-Fundus": ("MR", "AI", "LG", "DD"),
    "GMAI-Fundus": ("AR", "NT", "BVR", "DD", "SG"),
}


def paper_average(benchmark: str, parts: Mapping[str, float]) -> float:
    """A benchmark's score as in the paper's table 5: the plain mean of its groups, whatever their sizes.

    With benchmark "overall", `parts` are the scores of the three benchmarks (domain.md, section 0).

    Raises:
        ConfigError: unknown benchmark; a group is missing or unknown.
    """
    groups = tuple(PAPER_GROUPS) if benchmark == "overall" else PAPER_GROUPS.get(benchmark)
    if groups is None:
        raise ConfigError(f"benchmark {benchmark!r} is unknown: use overall, {', '.join(PAPER_GROUPS)}")
    if set(parts) != set(groups):
        raise ConfigError(
            f"{benchmark} averages {', '.join(groups)}, but got {', '.join(parts) or 'nothing'}"
        )
    return sum(parts[group] for group in groups) / len(groups)


def group_figures(
    benchmark: str,
    groups: Sequence[str],
    hits: Hits,
    *,
    units: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Figure]:
    """Accuracy of each group that a benchmark's published score averages, and "" the score, their plain mean.

    `groups[i]` is that of answer i. A group without an answer has no value, and then the score has none. All
    groups are resampled together, because one image is asked about in several of them.

    Raises:
        ConfigError: unknown benchmark, or a group that it does not average.
    """
    names = PAPER_GROUPS.get(benchmark)
    strange = sorted(set(groups) - set(names or ()))
    if names is None or strange:
        raise ConfigError(f"{benchmark!r} does not average {strange}: {PAPER_GROUPS}")
    place = {name: k for k, name in enumerate(names)}
    rows = np.zeros((len(groups), len(names), 2))
    index = np.arange(len(groups)), np.array([place[group] for group in groups], np.intp)
    rows[(*index, 0)] = np.asarray(hits, dtype=bool)
    rows[(*index, 1)] = 1
    totals = unit_totals(rows.reshape(len(groups), -1), units)
    sums = np.concatenate([totals.sum(axis=0, keepdims=True), resampled_totals(totals, seed=seed)])
    sums = sums.reshape(len(sums), len(names), 2)
    shares = ratio(sums[..., 0], sums[..., 1])
    found = {name: interval(shares[0, k], shares[1:, k], int(sums[0, k, 1])) for name, k in place.items()}
    return found | {"": interval(shares[0].mean(), shares[1:].mean(axis=-1), len(groups))}


# Sets of answers ------------------------------------------------------------------------------------------


def set_figures(
    gold: Sequence[Collection[str]],
    predicted: Sequence[Collection[str]],
    *,
    units: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Figure]:
    """How well sets of answers agree with the right ones: means over the answers of

    exact (1 if the sets are equal), precision (share of the chosen that are right; 0 where nothing is
    chosen), recall (share of the right that are chosen) and f1 (2 * common / (chosen + right)).

    Raises:
        ConfigError: no right answer to some question.
    """
    rows = []
    for right, given in zip(map(set, gold), map(set, predicted), strict=True):
        if not right:
            raise ConfigError("a question without a right answer has no recall")
        common = len(right & given)
        f1 = 2 * common / (len(right) + len(given))
        rows.append((float(right == given), common / max(1, len(given)), common / len(right), f1))
    table = np.array(rows, float).reshape(-1, 4)
    return {
        name: mean(table[:, k], units=units, seed=seed)
        for k, name in enumerate(("exact", "precision", "recall", "f1"))
    }
