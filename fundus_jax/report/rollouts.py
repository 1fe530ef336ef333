"""Groups of rollouts as people see them: in report.html, and on pages of their own while a run goes on.

Neighbours: `grpo/show.py` writes rollouts/<step>.jsonl, and has the page beside it written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fundus_jax.records import Example
from fundus_jax.report.cases import Reply, Shot, asks_for_trace, boxes_asked, read_reply, shot_of, style_asked
from fundus_jax.report.collect import Run, find


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a reward: what it is worth (None: it abstained, for the reason `why`), and its share of the
    bar in per cent."""

    name: str
    value: float | None
    share: float
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One reply with its reward (None: an abstention), its advantage and that one's place on the lever: from
    `left`, `width` wide, in per cent."""

    reply: Reply
    parts: tuple[Part, ...]
    total: float | None
    verdicts: tuple[dict[str, Any], ...]
    advantage: float
    left: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rollouts of one prompt. `findings`: of the image, None where nobody knows."""

    step: int
    example: Example | None
    name: str
    shot: Shot
    findings: tuple[str, ...] | None
    rollouts: tuple[Rollout, ...]


def rollout_groups(run: Run, examples: Mapping[str, Example] | None = None) -> list[Group]:
    """The groups of the run's rollout files, with their pictures; `examples` are looked up if not given."""
    wanted = {str(group.get("example")) for _, groups in run.rollouts for group in groups}
    if examples is None:
        examples = find(run, "examples", Example, wanted) if wanted else {}
    return [_group(run, step, group, examples) for step, groups in run.rollouts for group in groups]


def weights_of(run: Run) -> dict[str, float]:
    """Part of the reward -> its weight, if any, in the order of the bars: the config's, then the user's."""
    grpo = run.config.get("grpo", {})
    found = {name: _number(grpo.get(f"{name}_weight", 1.0)) for name in ("answer", "format", "process")}
    found["localisation"] = _number(grpo.get("localisation_weight", 0.0))
    for _, groups in run.rollouts:
        for group in groups:
            found |= {str(name): _number(weight) for name, weight in _dict(group.get("weights")).items()}
    return {name: weight for name, weight in found.items() if weight}


def most(run: Run, weights: Mapping[str, float]) -> float:
    """What a perfect rollout gets, by the weights of the parts and by what its trace is judged against; parts
    of the user's own know no bound and are left out."""
    grpo = run.config.get("grpo", {})
    findings, knowledge = grpo.get("plausible", 1.0), grpo.get("knowledge_plausible", 0.5)
    process = {"knowledge": knowledge, "sum": findings + knowledge}.get(str(grpo.get("process")), findings)
    best = {"answer": 1.0, "format": 1.0, "process": process, "localisation": 1.0}
    return sum(weights.get(name, 0.0) * worth for name, worth in best.items()) or 1.0


def _group(run: Run, step: int, group: Mapping[str, Any], examples: Mapping[str, Example]) -> Group:
    name, weights = str(group.get("example")), weights_of(run)
    example = examples.get(name)
    there = group.get("findings", example.findings if example is not None else None)
    there = None if there is None else tuple(str(one) for one in there)
    searched = group.get("searched")
    scores = [_dict(one) for one in group.get("rollouts", [])]
    gains = [
        sum(max(0.0, weights[name] * (value or 0)) for name, value in _values(one, weights)) for one in scores
    ]
    full = max([most(run, weights), *gains])  # what fills the bar: a part of the user's own knows no bound
    widest = max([1e-6, *(abs(_number(one.get("advantage"))) for one in scores)])
    think, boxes = asks_for_trace(run), boxes_asked(run)
    texts = [str(one.get("text", "")) for one in scores]
    asked = {"think": think, "style": style_asked(run), "boxes": boxes}
    replies = [read_reply(text, example, there=there, searched=searched, **asked) for text in texts]
    shot = shot_of(run, example) if example else Shot(uri="", problem="no such example in data/examples")
    return Group(
        step=step,
        example=example,
        name=name,
        shot=shot,
        findings=there,
        rollouts=tuple(
            _rollout(one, reply, weights, full, widest) for one, reply in zip(scores, replies, strict=True)
        ),
    )


def _rollout(
    one: Mapping[str, Any], reply: Reply, weights: Mapping[str, float], full: float, widest: float
) -> Rollout:
    why, lever = _dict(one.get("why")), 50 * _number(one.get("advantage")) / widest
    parts = (
        Part(
            name=name,
            value=value,
            share=max(0.0, 100 * weights[name] * (value or 0) / full),
            why=str(why.get(name, "")),
        )
        for name, value in _values(one, weights)
    )
    return Rollout(
        reply=reply,
        parts=tuple(parts),
        total=None if one.get("total") is None else _number(one["total"]),
        verdicts=tuple(_dict(verdict) for verdict in one.get("verdicts") or ()),
        advantage=_number(one.get("advantage")),
        left=50 + min(lever, 0.0),
        width=abs(lever),
    )


def _values(one: Mapping[str, Any], weights: Mapping[str, float]) -> list[tuple[str, float | None]]:
    """(part, value or None) in the order of the weights."""
    known = {**one, **_dict(one.get("own"))}
    values = ((name, known.get(name)) for name in weights)
    return [(name, None if value is None else _number(value)) for name, value in values]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
