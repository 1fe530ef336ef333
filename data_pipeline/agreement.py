"""How well votes agree with masks: the paper's Table 6, by any model on any data set with masks.

For each finding: sensitivity, specificity and their harmonic mean S2, over images (not questions); the last
line averages the columns, as the paper's does. A finding is compared in a data set where at least one mask
shows it, since without a positive image there is no sensitivity, and over the images in which it was looked
for. What has no negative image, or was not voted on, has no S2; it is named and left out of the average.

Intervals are of 95 %: Wilson's for sensitivity and specificity, and for S2 and the averages a bootstrap over
patients. Neighbours: `votes.py` asks the model, `findings.py` has the command.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import files, jobs
from fundus_jax import findings
from fundus_jax.records import DataError, Example, Findings

REPORT = "quality.json"
RESAMPLES = 2000
Z = 1.959964  # of the normal distribution, for 95 %

# The paper's Table 6, in per cent: sensitivity, specificity, S2 of five votes of Qwen2.5-VL-32B; and the same
# of findings read off free-form traces of Qwen3-VL-Plus. Both on Retinal-Lesions.
PAPER = {
    "microaneurysm": ((78.3, 49.5, 60.7), (58.4, 23.3, 33.3)),
    "haemorrhage": ((73.7, 44.4, 55.4), (45.5, 51.0, 48.1)),
    "hard exudate": ((78.7, 58.1, 66.9), (49.9, 65.8, 56.7)),
    "cotton-wool spot": ((48.2, 94.4, 63.8), (31.9, 85.3, 46.4)),
    "vitreous haemorrhage": ((62.5, 75.4, 68.3), (37.5, 81.0, 51.3)),
    "neovascularisation": ((55.8, 66.3, 60.6), (32.6, 72.2, 44.9)),
    "average": ((66.2, 64.7, 62.6), (42.6, 63.1, 46.8)),
}


@dataclass(frozen=True, slots=True)
class Rate:
    """A number in per cent with its interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True, slots=True)
class Row:
    """One finding (or the average): its rates, and how many images show it and do not."""

    finding: str
    sensitivity: Rate
    specificity: Rate
    s2: Rate
    positives: int
    negatives: int


@dataclass(frozen=True, slots=True)
class Table:
    """Table 6 of one data set and modality. `unanswered`: images with masks and without votes.
    `left_out`: findings of the masks that are not in the average, with the reason."""

    dataset: str
    modality: str
    images: int
    patients: int
    unanswered: int
    rows: tuple[Row, ...]
    average: Row
    left_out: dict[str, str]


def measure(examples: Path, out: Path, way: Mapping[str, Any]) -> str:
    """Compare a finished directory of Findings with the masks of its Examples: writes out/quality.json, and
    returns the tables as text. `way` is how the votes were come by (`VoteSource.ways`). Raises DataError
    where no image has both masks and votes."""
    found = {one.example: one for one in jobs.read(out, Findings)}
    made = tables(jobs.read(examples, Example), found)
    if not any(table.images for table in made):
        raise DataError(f"{out}: no image of {examples} has masks and votes; take a data set with masks")
    about = {"model": way["model"], "n": way["n"], "prompts": way["prompts"]}
    report = {**about, "tables": [asdict(table) for table in made], "paper": PAPER}
    files.write_atomic(out / REPORT, json.dumps(report, indent=1) + "\n")
    return "\n\n".join([*(_shown(table, about["model"], about["n"]) for table in made), _paper()])


def tables(examples: Iterable[Example], found: Mapping[str, Findings]) -> list[Table]:
    """One table for each data set and modality among some Examples; `found` goes by the Examples' ids. Only
    images with masks count, each once; findings that masks gave are no votes."""
    groups: dict[tuple[str, str], dict[str, Example]] = {}
    for one in examples:
        if one.findings is not None:
            groups.setdefault((one.dataset, one.modality), {}).setdefault(one.image, one)
    return [_table(*name, list(group.values()), found) for name, group in sorted(groups.items())]


def _table(dataset: str, modality: str, masked: Sequence[Example], found: Mapping[str, Findings]) -> Table:
    voted = {name: one for name, one in found.items() if one.origin == "votes"}
    seen = [one for one in masked if one.id in voted]
    names = findings.ordered(name for one in seen for name in one.findings or ())
    asked = {name for one in seen for name in voted[one.id].votes}
    gold = np.array([[name in (one.findings or ()) for name in names] for one in seen], bool)
    said = np.array([[name in voted[one.id].present for name in names] for one in seen], bool)
    gold, said = gold.reshape(len(seen), len(names)), said.reshape(len(seen), len(names))
    known = np.array([[name not in unseen for name in names] for unseen in map(_unseen, seen)], bool)
    known = known.reshape(gold.shape)
    cells = np.stack([gold & said, gold & ~said, ~gold & ~said, ~gold & said], axis=-1)
    cells = (cells & known[..., None]).astype(float)
    left_out = {name: "not voted on" for name in names if name not in asked}
    left_out |= {
        name: "every image shows it"
        for k, name in enumerate(names)
        if name in asked and gold[known[:, k], k].all()
    }
    kept = [k for k, name in enumerate(names) if name not in left_out]
    patients = [one.patient for one in seen]
    drawn = _resampled(cells, patients)
    rows = tuple(_row(names[k], cells[:, k], drawn[:, k]) for k in range(len(names)) if names[k] in asked)
    return Table(
        dataset, modality, len(seen), len(set(patients)), len(masked) - len(seen), rows,
        _average(cells[:, kept], drawn[:, kept]), left_out,
    )  # fmt: skip


def _unseen(example: Example) -> frozenset[str]:
    """The findings that an example's masks are not about."""
    return findings.unknown(example.modality, example.searched)


def _resampled(cells: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Sums [R, K, 4] of the cells [N, K, 4] (TP, FN, TN, FP) over patients drawn with replacement."""
    number = {name: place for place, name in enumerate(dict.fromkeys(patients))}
    totals = np.zeros((len(number), *cells.shape[1:]))
    np.add.at(totals, [number[name] for name in patients], cells)
    share = np.full(len(number), 1 / max(1, len(number)))
    draws = np.random.default_rng(0).multinomial(len(number), share, size=RESAMPLES)
    return np.einsum("ru,ukc->rkc", draws.astype(float), totals)


def _rates(sums: np.ndarray) -> np.ndarray:
    """Sensitivity, specificity and S2 [..., 3] of summed cells [..., 4]; NaN where one is not defined, and S2
    0 where both are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity = sums[..., 0] / (sums[..., 0] + sums[..., 1])
        specificity = sums[..., 2] / (sums[..., 2] + sums[..., 3])
        both = sensitivity + specificity
        s2 = np.where(both == 0, 0.0, 2 * sensitivity * specificity / both)
    return np.stack([sensitivity, specificity, s2], axis=-1)


def _row(name: str, cells: np.ndarray, drawn: np.ndarray) -> Row:
    """A finding's row, from its cells [N, 4] and their resampled sums [R, 4]."""
    tp, fn, tn, fp = cells.sum(axis=0)
    s2 = _interval(_rates(cells.sum(axis=0))[2], _rates(drawn)[:, 2])
    return Row(name, wilson(tp, tp + fn), wilson(tn, tn + fp), s2, int(tp + fn), int(tn + fp))


def _average(cells: np.ndarray, drawn: np.ndarray) -> Row:
    """The columns' means over the findings, from cells [N, K, 4] and their resampled sums [R, K, 4]. A
    resample that lacks a finding altogether averages the others."""
    sums = cells.sum(axis=0)
    if not sums.size:
        none = Rate(None, None, None)
        return Row("average", none, none, none, 0, 0)
    values, resampled = _rates(sums).mean(axis=0), _mean(_rates(drawn))
    sensitivity, specificity, s2 = map(_interval, values, resampled.T)
    return Row("average", sensitivity, specificity, s2, int(sums[:, :2].sum()), int(sums[:, 2:].sum()))


def _mean(rates: np.ndarray) -> np.ndarray:
    """Mean [R, 3] of rates [R, K, 3] over the findings for which each is defined; NaN where for none."""
    count = (~np.isnan(rates)).sum(axis=1)
    return np.where(count > 0, np.nansum(rates, axis=1) / np.maximum(count, 1), np.nan)


def _interval(value: float, resampled: np.ndarray) -> Rate:
    defined = resampled[~np.isnan(resampled)]
    if np.isnan(value) or not len(defined):
        return Rate(None, None, None)
    low, high = np.percentile(defined, (2.5, 97.5))
    return Rate(100 * float(value), 100 * float(low), 100 * float(high))


def wilson(hits: float, n: float) -> Rate:
    """The share of hits among n in per cent, with Wilson's interval (1927) of 95 %; undefined for n = 0."""
    if not n:
        return Rate(None, None, None)
    share, scale = hits / n, 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / scale
    half = Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / scale
    return Rate(100 * share, 100 * max(0.0, float(middle - half)), 100 * min(1.0, float(middle + half)))


def _shown(table: Table, model: str, n: int) -> str:
    """A table as lines of text."""
    lines = [
        f"Votes against masks: {table.dataset}, {table.modality}; {n} votes an image by the model {model!r}.",
        f"{table.images} images of {table.patients} patients; {table.unanswered} without an answer.",
        "In per cent, with intervals of 95 % (Wilson; S2 and averages: bootstrap over patients).",
        f"{'finding':32}{'sensitivity':>20}{'specificity':>20}{'S2':>20}{'positive':>10}{'negative':>10}",
    ]
    for row in (*table.rows, table.average):
        counts = ("", "") if row is table.average else (row.positives, row.negatives)
        rates = "".join(f"{rate!s:>20}" for rate in (row.sensitivity, row.specificity, row.s2))
        lines.append(f"{row.finding:32}{rates}{counts[0]:>10}{counts[1]:>10}")
    lines += [f"not in the average: {name} ({why})" for name, why in table.left_out.items()]
    return "\n".join(lines)


def _paper() -> str:
    """The paper's own numbers, apart."""
    lines = [
        "For comparison, the paper's Table 6, which is of Retinal-Lesions: five votes of Qwen2.5-VL-32B | "
        "what traces of Qwen3-VL-Plus say.",
        f"{'finding':32}{'sen.':>8}{'spe.':>8}{'S2':>8} |{'sen.':>8}{'spe.':>8}{'S2':>8}",
    ]
    for name, (ours, theirs) in PAPER.items():
        left, right = ("".join(f"{value:>8.1f}" for value in one) for one in (ours, theirs))
        lines.append(f"{name:32}{left} |{right}")
    return "\n".join(lines)
