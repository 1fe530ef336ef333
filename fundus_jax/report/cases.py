"""Chooses the sample cases of the report, and puts together what is shown of each.

Cases are spread over modalities and classes in the order of the hash of their id, so nobody picked them by
how well they went. Neighbours: `collect` has read the files, `pictures` encodes, the template shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fundus_jax import dialog
from fundus_jax.data import load_image
from fundus_jax.records import MODALITIES, DataError, Example, Knowledge, Trace
from fundus_jax.report.claims import DIAGNOSES, Piece, clean, mark, missed
from fundus_jax.report.collect import Run, find, raw
from fundus_jax.report.pictures import data_uri

CASES = 8


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A response, read: its parts, whether its answer is right, its findings against the image's (`claims`).

    `think`: the trace in pieces; the whole response, unmarked, where it has no readable blocks. `outside`:
    what stands outside of its blocks.
    """

    think: tuple[Piece, ...]
    answer: str | None
    right: bool | None
    well_formed: bool
    finished: bool
    missed: tuple[str, ...]
    outside: str


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A picture with its boxes: (number of the finding's colour, x, y, width, height) on the 0-999 grid."""

    uri: str
    boxes: tuple[tuple[int, int, int, int, int], ...] = ()
    names: tuple[str, ...] = ()  # the finding of each colour
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A held-out example with everything known about it, and the replies of the stages by name."""

    example: Example
    shot: Shot
    knowledge: Knowledge | None
    trace: Trace | None
    replies: dict[str, Reply] = field(default_factory=dict)


def sample_cases(run: Run, count: int = CASES) -> list[Case]:
    """Up to `count` cases of the test split; those with a prediction where there are any."""
    asked = set().union(*({*found} for stage, found in run.predictions.items() if stage != "base"))
    lines = [
        line
        for _, line in raw(run, "examples")
        if line.get("split") == "test" and (not asked or line.get("id") in asked)
    ]
    diagnoses = [line for line in lines if line.get("task") in DIAGNOSES]
    chosen = _spread(diagnoses or lines, count)
    examples = find(run, "examples", Example, set(chosen))
    traces = find(run, "traces", Trace, set(chosen), key="example")
    return [_case(run, examples[name], traces.get(name)) for name in chosen if name in examples]


def read_reply(
    text: str,
    example: Example | None,
    scored: Mapping[str, Any] | None = None,
    there: Collection[str] | None = None,
) -> Reply:
    """A response in parts. `scored`: its line of predictions.jsonl, which says what is right. `there`: the
    findings of the image, where they are not the example's."""
    scored, parsed = scored or {}, dialog.parse(text)
    answer, right = parsed.answer, scored.get("correct")
    if answer is None and scored.get("extracted"):
        answer = ", ".join(scored["extracted"])
    if right is None and example is not None:
        right = answer is not None and dialog.same_answer(answer, example.answer)
    modality, task = (example.modality, example.task) if example is not None else ("", "")
    there = example.findings if there is None and example is not None else there
    whole = parsed.think is None or parsed.answer is None
    return Reply(
        think=(Piece(clean(text)),) if whole else mark(parsed.think or "", modality, there),
        answer=None if answer is None else clean(answer),
        right=right,
        well_formed=parsed.well_formed,
        finished=bool(scored.get("finished", True)),
        outside="" if whole else clean(" ".join(dialog.outside(text).split()), 300),
        missed=missed(parsed.think or "", task, there),
    )


def _spread(lines: Sequence[dict[str, Any]], count: int) -> list[str]:
    """Ids: one modality after the other, of the class shown least so far, with masks before without."""

    def place(line: dict[str, Any]) -> tuple[bool, bytes]:
        masked = line.get("findings") is not None  # first: they show more
        return not masked, hashlib.sha256(str(line.get("id")).encode(errors="replace")).digest()

    queues = {
        name: sorted((one for one in lines if one.get("modality") == name), key=place) for name in MODALITIES
    }
    shown: list[str] = []
    answers: list[str] = []
    while len(shown) < count and any(queues.values()):
        for queue in filter(None, queues.values()):
            line = min(
                queue, key=lambda one: answers.count(str(one.get("answer")))
            )  # the first of the rarest class
            queue.remove(line)
            if len(shown) < count:
                shown.append(str(line.get("id")))
                answers.append(str(line.get("answer")))
    return shown


def _case(run: Run, example: Example, trace: Trace | None) -> Case:
    labels = (example.answer, *example.labels)
    known = [
        run.knowledge[label, example.modality]
        for label in labels
        if (label, example.modality) in run.knowledge
    ]
    replies = {}
    for stage, found in run.predictions.items():
        line = found.get(example.id)
        if line is not None:
            replies[stage] = read_reply(str(line.get("response", "")), example, line)
    return Case(
        example=example,
        shot=shot_of(run, example),
        knowledge=known[0] if known else None,
        trace=trace,
        replies=replies,
    )


def shot_of(run: Run, example: Example) -> Shot:
    """The picture of an example with its boxes; where it can not be read, why."""
    try:
        uri = data_uri(load_image(run.path / "data" / "examples", example.image))
    except (DataError, OSError, SyntaxError, ValueError) as error:
        return Shot(uri="", problem=f"the picture could not be read: {error}")
    names = tuple(dict.fromkeys([*(box.finding for box in example.boxes), *(example.findings or ())]))
    boxes = tuple((names.index(b.finding), b.x1, b.y1, b.x2 - b.x1, b.y2 - b.y1) for b in example.boxes)
    return Shot(uri=uri, boxes=boxes, names=names)
