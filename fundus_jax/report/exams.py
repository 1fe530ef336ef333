"""The exams of a run: what a policy knew while it was trained, and which of its bundles is kept for it.

Numbers are those of metrics.jsonl, as the loops logged them (`evaluation/exam.py`); a run without exams has
none of this on its page. Neighbours: `charts` draws, `workdir` says which step is the best, `page` asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fundus_jax.report.charts import Measurement, measurements
from fundus_jax.report.figures import Figure, figure
from fundus_jax.workdir import BEST_BY, best_step

Lines = Sequence[Mapping[str, Any]]
Numbers = Mapping[str, float]
ENDS = ("exam/low", "exam/high")  # of the interval
STAGES = {"sft": "Supervised fine-tuning", "grpo": "GRPO"}


@dataclass(frozen=True, kw_only=True)
class Exam:
    """One exam: after which step, its figures, and whether the bundle of that step is kept as the best."""

    step: int
    accuracy: Figure | None
    well_formed: Figure | None
    length: Figure | None
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Exams:
    """The exams of a stage in order of their steps, drawn; the best of them, and the last."""

    title: str
    exams: list[Exam]
    best: Exam
    last: Exam
    picture: Markup


def exams(metrics: Mapping[str, Lines]) -> list[Exams]:
    """Those of each stage that has any."""
    found = []
    for stage, title in STAGES.items():
        lines = [one for line in metrics.get(stage, ()) if BEST_BY in (one := _numbers(line))]
        if not lines:
            continue
        kept = best_step(lines)
        taken = [
            Exam(
                step=int(line["step"]),
                accuracy=_figure(line, BEST_BY, *ENDS),
                well_formed=_figure(line, "exam/well_formed"),
                length=_figure(line, "exam/length", scale=1.0),
                kept=line["step"] == kept,
            )
            for line in lines
        ]
        best = next(one for one in taken if one.kept)
        found.append(Exams(title=title, exams=taken, best=best, last=taken[-1], picture=_drawn(lines, kept)))
    return found


def _figure(line: Numbers, name: str, *ends: str, scale: float = 100.0) -> Figure | None:
    low, high = (line.get(end) for end in ends or ("", ""))
    shown = {"value": line.get(name), "low": low, "high": high, "n": line.get("exam/n")}
    return figure(shown, scale=scale)


def _drawn(lines: Sequence[Numbers], kept: float | None) -> Markup:
    points = []
    for line in lines:
        low, high = (None if end is None else 100 * end for end in map(line.get, ENDS))
        marked = line["step"] == kept
        points.append(
            Measurement(step=line["step"], value=100 * line[BEST_BY], low=low, high=high, marked=marked)
        )
    return measurements(points, unit="% of the questions", most=100.0)


def _numbers(line: Mapping[str, Any]) -> Numbers:
    """What a line has of numbers, with its step; a damaged one may hold anything."""
    known = {name: one for name, one in line.items() if isinstance(one, int | float) and math.isfinite(one)}
    return {"step": 0} | known
