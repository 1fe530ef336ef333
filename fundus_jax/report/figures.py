"""Numbers as people read them: values with intervals and n, headline cards, and the tables of the evaluation.

Every number comes from evaluation/summary.json; all that is decided here is whether an interval contains 0.
Neighbours: `collect` has read the summary, `charts` draws the intervals, the template lays them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from fundus_jax.report.charts import Interval, nice_ticks, strip

STAGE_NAMES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
JUDGED = ", process by rules"  # whichever judge trained (launch/evaluate.py)
LEVEL_NAMES = {"L1": "L1 · modality", "L2": "L2 · anatomy", "L3": "L3 · lesions", "L4": "L4 · disease"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number with the count behind it and its 95 % interval; it is shown `scale` times as large."""

    value: float
    low: float | None
    high: float | None
    n: int
    scale: float
    digits: int

    @property
    def text(self) -> str:
        """The value."""
        return number(self.value * self.scale, self.digits)

    @property
    def signed(self) -> str:
        """The value with its sign."""
        return signed(self.value * self.scale, self.digits)

    @property
    def interval(self) -> str:
        """The interval in brackets, or that there is none."""
        if self.low is None or self.high is None:
            return "no interval"
        ends = (number(end * self.scale, self.digits) for end in (self.low, self.high))
        return f"[{', '.join(ends)}]"

    @property
    def verdict(self) -> str:
        """Of a difference: "up", "down", or "noise" where the interval contains 0 or is missing."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "noise"
        return "up" if self.low > 0 else "down"


def number(value: float, digits: int) -> str:
    """A number with so many decimals and a true minus sign."""
    text = f"{value:,.{digits}f}"
    return ("0" + text[2:] if float(text.replace(",", "")) == 0 and text.startswith("-") else text).replace(
        "-", "−"
    )


def signed(value: float, digits: int) -> str:
    """A number with its sign; plain where it rounds to 0."""
    text = number(value, digits)
    return text if text.startswith("−") or float(text.replace(",", "")) == 0 else f"+{text}"


def figure(report: Any, *path: str, scale: float = 100.0, digits: int = 1) -> Figure | None:
    """The figure at `path` of nested dictionaries; None where it is missing or undefined."""
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    if not isinstance(report, dict) or report.get("value") is None:
        return None
    low, high, n = report.get("low"), report.get("high"), int(report.get("n") or 0)
    return Figure(value=report["value"], low=low, high=high, n=n, scale=scale, digits=digits)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A headline number: each stage's figure, the paired difference GRPO - SFT, the intervals drawn."""

    title: str
    what: str
    unit: str
    difference_unit: str
    figures: list[tuple[str, Figure]]
    difference: Figure | None
    picture: Markup
    ends: tuple[str, str]


def cards(
    summary: dict[str, Any], shown: Iterable[str], weights: Mapping[str, float], most_reward: float
) -> list[Card]:
    """The headline cards that have a figure, for the stages `shown`; `weights` are those of the reward's
    parts, and `most_reward` is what a perfect rollout gets."""
    rows = (
        (
            "Greedy accuracy",
            "likeliest answer to every held-out question",
            ("greedy", "accuracy"),
            "greedy_accuracy",
        ),
        (
            "Sampled accuracy",
            "answers drawn at temperature 1, as GRPO trains them",
            ("sampled", "accuracy"),
            "sampled_accuracy",
        ),
        (
            "Finding F1",
            "findings named in greedy traces, against the masks",
            ("greedy", "findings", "f1"),
            "finding_f1",
        ),
        (
            "Box IoU",
            "matched boxes of greedy traces, against the masks",
            ("greedy", "localisation", "iou"),
            "box_iou",
        ),
        (
            "Sampled reward",
            f"{' + '.join(weights)}, at most {most_reward:g}{JUDGED if 'process' in weights else ''}",
            ("reward", "total"),
            "reward_total",
        ),
    )
    found = []
    for title, what, path, difference in rows:
        reward = path[0] == "reward"
        look: dict[str, Any] = {"scale": 1.0, "digits": 3} if reward else {}
        stages = summary.get("stages", {})
        figures = [(name, figure(stages[name], *path, **look)) for name in shown]
        known = [(name, one) for name, one in figures if one is not None]
        if known:
            gain = figure(summary, "differences", difference, **look)
            units = ("", "") if reward else ("%", "points")
            low, high = _axis(_intervals(known), most_reward if reward else 1.0)
            scale = known[0][1].scale
            found.append(
                Card(
                    title=title, what=what, unit=units[0], difference_unit=units[1], figures=known,
                    difference=gain, picture=strip(_intervals(known), low=low, high=high),
                    ends=(f"{low * scale:g}", f"{high * scale:g} {units[0]}"),
                )
            )  # fmt: skip
    return found


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one stage got in one row: a figure, and under it (word, figure, whether it is signed)."""

    main: Figure | None
    below: list[tuple[str, Figure, bool]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: what it is, its baseline where it has one, a cell a stage, and the intervals drawn."""

    name: str
    note: str
    n: int
    baseline: Figure | None
    cells: list[Cell]
    picture: Markup | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the evaluation; `stages` are the columns."""

    title: str
    note: str
    stages: list[str]
    rows: list[Row]
    baseline: bool = False


def tables(summary: dict[str, Any], mode: str) -> list[Table]:
    """The tables of the `mode` ("greedy" or "sampled") answers: overall, then by each grouping."""
    reports = {stage: entry[mode] for stage, entry in summary.get("stages", {}).items() if entry.get(mode)}
    if not reports:
        return []
    found = [_overall(reports, summary if mode == "sampled" else {})]
    majority = (
        "The baseline is the best constant answer of each group of questions, read off the test answers "
        "themselves."
    )
    diagnoses = {
        stage: entry["diagnosis"] for stage, entry in summary["stages"].items() if "diagnosis" in entry
    }
    if diagnoses and mode == "greedy":
        found.append(_grouped(diagnoses, "by_modality", "Diagnosis by modality", majority))
    found += [
        _grouped(reports, "by_modality", "All questions by modality", majority),
        _grouped(
            reports,
            "by_level",
            "By level",
            "FunBench's score averages, over labels, the harmonic mean of sensitivity and specificity.",
        ),
        _grouped(reports, "by_task", "By task", ""),
        _by_finding(reports),
        _by_place(reports),
    ]
    return [table for table in found if table.rows]


def _overall(reports: dict[str, Any], rewards: dict[str, Any]) -> Table:
    lines: list[tuple[str, str, tuple[str, ...]]] = [
        ("Accuracy", "", ("accuracy",)),
        ("Well-formed", "in the format that was asked for", ("well_formed",)),
        ("Finished", "ended by itself within the token budget", ("finished",)),
        ("Unreadable", "names none of the options; counts as wrong", ("unparsed", "share")),
        ("FunBench score", "mean of the levels", ("funbench", "overall")),
        ("Finding precision", "n: findings claimed", ("findings", "precision")),
        ("Finding recall", "n: findings there", ("findings", "recall")),
        ("Finding F1", "n: findings claimed or there", ("findings", "f1")),
        ("Box IoU", "matched boxes of a finding; n: findings boxed or there", ("localisation", "iou")),
        ("Box F1", "at IoU 0.5; n: boxes said or there", ("localisation", "f1")),
        ("Malformed boxes", "traces with boxes that can not be read", ("localisation", "malformed")),
    ]
    rows = [
        _row(name, note, [Cell(main=figure(report, *path)) for report in reports.values()], reports)
        for name, note, path in lines
    ]
    lengths = [Cell(main=figure(report, "tokens", scale=1.0)) for report in reports.values()]
    rows.append(_row("Length", "tokens a response, not per cent", lengths, reports, picture=False))
    for part in ("total", "answer", "format", "process", "localisation"):
        entries = [rewards.get("stages", {}).get(stage, {}) for stage in reports]
        cells = [Cell(main=figure(entry, "reward", part, scale=1.0, digits=3)) for entry in entries]
        note = f"not per cent{JUDGED}" if part in ("total", "process") else "not per cent"
        rows.append(_row(f"Reward: {part}", note, cells, reports, picture=False))
    return Table(
        title="Overall",
        note="",
        stages=list(reports),
        rows=[row for row in rows if any(cell.main for cell in row.cells)],
    )


def _grouped(reports: dict[str, Any], key: str, title: str, note: str) -> Table:
    names = sorted(set().union(*(report.get(key, {}) for report in reports.values())))
    rows = []
    for name in names:
        cells = []
        for report in reports.values():
            entry = report.get(key, {}).get(name, {})
            below = [
                ("to baseline", figure(entry, "difference"), True),
                ("FunBench", figure(entry, "funbench"), False),
            ]
            cells.append(
                Cell(
                    main=figure(entry, "accuracy"),
                    below=[(word, one, sign) for word, one, sign in below if one],
                )
            )
        last = next((r[key][name] for r in reversed(list(reports.values())) if name in r.get(key, {})), {})
        answers = sorted(set(last.get("majority_answers", {}).values()))
        about = f"constant answer: {', '.join(answers)}" if key == "by_modality" and len(answers) == 1 else ""
        shown = LEVEL_NAMES.get(str(name), str(name).replace("_", " "))
        rows.append(_row(shown, about, cells, reports, baseline=figure(last, "majority")))
    return Table(title=title, note=note, stages=list(reports), rows=rows, baseline=True)


def _by_finding(reports: dict[str, Any]) -> Table:
    by_stage = [(report.get("findings") or {}).get("by_finding", {}) for report in reports.values()]
    rows = []
    for name in sorted(set().union(*by_stage)):
        cells = []
        for found in by_stage:
            entry = found.get(name, {})
            below = [("P", figure(entry, "precision"), False), ("R", figure(entry, "recall"), False)]
            cells.append(
                Cell(main=figure(entry, "f1"), below=[(word, one, sign) for word, one, sign in below if one])
            )
        rows.append(_row(name, "", cells, reports))
    note = (
        "F1 of each finding in the traces of diagnoses, with precision (P) and recall (R); n counts answers "
        "in which it is claimed or missed."
    )
    return Table(title="By finding", note=note, stages=list(reports), rows=rows)


def _by_place(reports: dict[str, Any]) -> Table:
    rows = []
    for group in ("by_modality", "by_finding"):
        by_stage = [(report.get("localisation") or {}).get(group, {}) for report in reports.values()]
        for name in sorted(set().union(*by_stage)):
            cells = []
            for found in by_stage:
                entry = found.get(name, {})
                hit = figure(entry, "f1")
                cells.append(Cell(main=figure(entry, "iou"), below=[("F1", hit, False)] if hit else []))
            rows.append(_row(name, "", cells, reports))
    note = (
        "Matched IoU of boxes in the traces with those of the masks, by modality and by finding. A finding "
        "missing or made up counts as 0, and so does a box without partner. Below: F1 of boxes at IoU 0.5."
    )
    return Table(title="Where findings lie", note=note, stages=list(reports), rows=rows)


def _row(
    name: str,
    note: str,
    cells: list[Cell],
    stages: Iterable[str],
    *,
    baseline: Figure | None = None,
    picture: bool = True,
) -> Row:
    known = [(stage, cell.main) for stage, cell in zip(stages, cells, strict=True) if cell.main is not None]
    drawn = strip(_intervals(known), tick=baseline.value if baseline else None) if picture and known else None
    return Row(
        name=name, note=note, n=known[-1][1].n if known else 0, baseline=baseline, cells=cells, picture=drawn
    )


def _intervals(figures: Iterable[tuple[str, Figure]]) -> list[Interval]:
    return [
        Interval(
            kind=stage if stage in STAGE_NAMES else "other", value=one.value,
            low=one.value if one.low is None else one.low, high=one.value if one.high is None else one.high,
        )
        for stage, one in figures
    ]  # fmt: skip


def _axis(intervals: list[Interval], most: float) -> tuple[float, float]:
    """Round ends that hold all intervals with a little room, within [0, most]."""
    low, high = min(one.low for one in intervals), max(one.high for one in intervals)
    room = max(0.04 * most, (high - low) / 4)
    ticks = nice_ticks(max(0.0, low - room), min(most, high + room))
    return max(0.0, ticks[0]), min(most, ticks[-1])
