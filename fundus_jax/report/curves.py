"""What is drawn of metrics.jsonl and timeline.jsonl: which curves, what they mean, and where the time went.

A metric that a run did not log has no panel; where one was null, its curve skips the step. Neighbours:
`charts` draws, `page` asks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from fundus_jax.report import charts

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Spec:
    """A curve: the metrics that are summed, its title, unit and meaning, its axis (see `charts.curve`)."""

    names: tuple[str, ...]
    title: str
    unit: str
    what: str
    axis: str = "zero"


_NORM = Spec(("grad_norm",), "Gradient norm", "L2 norm", "Of the whole update, before clipping.")
PANELS: dict[str, tuple[Spec, ...]] = {
    "base": (
        Spec(("loss",), "Warm-up loss", "nats a target", "Of the findings head, later discarded.", "log"),
        Spec(("exact",), "All targets right", "share of images", "Every finding and the label, in training."),
        _NORM,
    ),
    "sft": (
        Spec(("loss",), "SFT loss", "nats a token", "Cross-entropy of the assistant's tokens.", "log"),
        Spec(("entropy",), "Entropy", "nats a token", "How undecided the next token is.", "log"),
        _NORM,
    ),
    "grpo": (
        Spec(("reward/total",), "Reward", "mean of the rollouts", "Answer + format + process.", "free"),
        Spec(("reward/answer",), "Answer reward", "mean", "1 where the answer is right.", "free"),
        Spec(("reward/format",), "Format reward", "mean", "1 where the reply keeps the format.", "free"),
        Spec(("reward/process",), "Process reward", "mean", "What the judge gives the trace.", "free"),
        Spec(
            ("reward/localisation",),
            "Localisation reward",
            "mean",
            "Boxes of the trace on the masks'.",
            "free",
        ),
        Spec(("kl",), "KL to the reference", "nats a token", "How far the policy has moved."),
        Spec(("entropy",), "Entropy", "nats a token", "Falls as the policy commits itself."),
        Spec(("clip_low", "clip_high"), "Clipped", "share of tokens", "Ratios outside the trust region."),
        Spec(("length",), "Response length", "tokens", "Mean of the rollouts of a step.", "free"),
        Spec(("signs/repetition",), "Repetition", "share of phrases", "Said in the same reply before."),
        Spec(("signs/empty_think",), "Empty traces", "share of replies", "An answer without a trace."),
        Spec(("signs/outside",), "Outside the tags", "share of replies", "Words outside of the blocks."),
        Spec(
            ("zero_variance",), "Zero-variance groups", "share of groups", "Equal rewards: nothing to learn."
        ),
        Spec(("sampler_gap",), "Sampler against trainer", "mean |Δ log-prob|", "Rounding, if both agree."),
        _NORM,
    ),
}
PHASES = ("rollout", "update", "score", "judge", "data")  # from the darkest tint to the faintest
STAGES = ("data", "base", "sft", "grpo", "evaluate", "export")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small chart."""

    title: str
    what: str
    picture: Markup


def panels(metrics: Mapping[str, Lines]) -> dict[str, list[Panel]]:
    """Stage -> its panels; stages without any are left out."""
    found: dict[str, list[Panel]] = {}
    for stage, rows in PANELS.items():
        lines = metrics.get(stage, ())
        for spec in (*rows, *_own(lines)):
            points = [
                (float(line.get("step") or 0), _sum(line, spec.names))
                for line in lines
                if any(name in line for name in spec.names)
            ]
            picture = charts.curve(points, unit=spec.unit, axis=spec.axis)
            if picture is not None:
                found.setdefault(stage, []).append(Panel(title=spec.title, what=spec.what, picture=picture))
    return found


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a stage took, all of its runs together; `share` of the longest stage. origin: the workdir that it
    was taken over from, if it was."""

    stage: str
    seconds: float
    share: float
    runs: int
    started: str
    origin: str = ""


def timeline(lines: Lines) -> list[Span]:
    """The stages in their order; a stage that was run again has one line with the sum."""
    seconds: dict[str, list[float]] = {}
    started: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for line in lines:
        stage = str(line.get("stage"))
        seconds.setdefault(stage, []).append(float(line.get("seconds") or 0))
        started.setdefault(stage, line.get("started"))
        origins[stage] = str(line.get("from") or origins.get(stage, ""))
    longest = max((sum(one) for one in seconds.values()), default=0) or 1.0
    order = sorted(seconds, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))
    return [
        Span(
            stage=stage, seconds=sum(seconds[stage]), share=sum(seconds[stage]) / longest,
            runs=len(seconds[stage]), started=moment(started[stage]), origin=origins[stage],
        )
        for stage in order
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Where a training step goes: seconds by phase (medians, without the first step, which compiles)."""

    stage: str
    parts: list[tuple[str, float]]
    total: float
    steps: int
    first: float


def phases(metrics: Mapping[str, Lines]) -> list[Phases]:
    """The time/* metrics of the training stages."""
    found = []
    for stage in ("base", "sft", "grpo"):
        lines = [line for line in metrics.get(stage, ()) if any(name.startswith("time/") for name in line)]
        if not lines:
            continue
        names = sorted((name for name in lines[0] if name.startswith("time/")), key=_place)
        steady = lines[1:] or lines
        parts = [(name.removeprefix("time/"), _median(line.get(name) for line in steady)) for name in names]
        first = sum(float(lines[0].get(name) or 0) for name in names)
        found.append(
            Phases(
                stage=stage, parts=parts, total=sum(part for _, part in parts), steps=len(steady), first=first
            )
        )
    return found


def duration(seconds: float) -> str:
    """Seconds as a person says them: 24 ms, 3.1 s, 27 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 1:
        return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(seconds: Any) -> str:
    """A time since 1970 as date and hour in UTC; "unknown" for anything else."""
    try:
        when = datetime.fromtimestamp(float(seconds), UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return "unknown"
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def _own(lines: Lines) -> list[Spec]:
    """A curve for each reward of the user's own: those whose abstentions are counted."""
    counted = {name for line in lines for name in line if name.startswith("reward/")}
    names = sorted(name.removesuffix("_abstained") for name in counted if name.endswith("_abstained"))
    what = "Of your own; mean where it gave a number."
    return [Spec((name,), name.removeprefix("reward/"), "mean", what, "free") for name in names]


def _sum(line: Mapping[str, Any], names: Sequence[str]) -> float | None:
    values = [line.get(name) for name in names if name in line]
    known = [float(value) for value in values if isinstance(value, int | float)]
    return sum(known) if known and len(known) == len(values) else None


def _place(name: str) -> tuple[int, str]:
    phase = name.removeprefix("time/")
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def _median(values: Iterable[Any]) -> float:
    known = [float(value) for value in values if isinstance(value, int | float)]
    return statistics.median(known) if known else 0.0
