"""Chooses the sample cases of the report, and puts together what is shown of each.

Cases are spread over modalities and classes in the order of the hash of their id, so nobody picked them by
how well they went. Neighbours: `collect` has read the files, `pictures` encodes, the template shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fundus_jax import dialog, localisation
from fundus_jax.data import load_image
from fundus_jax.findings import unknown
from fundus_jax.findings.claims import DIAGNOSES, Piece, clean, mark, missed
from fundus_jax.records import MODALITIES, DataError, Example, Knowledge, Trace
from fundus_jax.report.collect import Run, find, raw
from fundus_jax.report.pictures import data_uri

CASES = 8


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a response says that findings lie, and where they do.

    boxes: (number of the finding, "there" or "said", x, y, width, height) on the 0-999 grid.
    findings: (name, agreement of its boxes in [0, 1]); a box's number is the place here, from 1.
    malformed: what is wrong with boxes that can not be read.
    """

    boxes: tuple[tuple[int, str, int, int, int, int], ...]
    findings: tuple[tuple[str, float], ...]
    malformed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A response, read: its parts, whether its answer is right, its findings against the image's (`claims`),
    its boxes against the masks'.

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
    places: Places | None = None


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
    asked = set().union(*(run.predictions.get(stage, {}) for stage in run.shown))
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


def asks_for_trace(run: Run) -> bool:
    """Whether the prompts of a run ask for a trace before the answer."""
    return bool(run.config.get("prompt", {}).get("think", True))


def style_asked(run: Run) -> str:
    """How the prompts of a run ask for an answer (`dialog.messages`)."""
    return str(run.config.get("prompt", {}).get("style", "options"))


def boxes_asked(run: Run) -> int:
    """How many boxes of a finding the traces of a run say; 0 where they say none."""
    return int(run.config.get("prompt", {}).get("boxes") or 0)


def read_reply(
    text: str,
    example: Example | None,
    scored: Mapping[str, Any] | None = None,
    there: Collection[str] | None = None,
    searched: Collection[str] | None = None,
    *,
    think: bool = True,
    style: str = "options",
    boxes: int = 0,
) -> Reply:
    """A response in parts. `scored`: its line of predictions.jsonl, which says what is right. `there`: the
    findings of the image, where they are not the example's, and `searched` what was looked for. think:
    whether a trace was asked for; where it was not, none is missing. style: how the prompt asked for the
    answer. boxes: the trace was asked for so many of a finding; they are compared, and left out of its
    text."""
    scored, parsed = scored or {}, dialog.parse(text, think=think)
    answer, right = parsed.answer, scored.get("correct")
    if answer is None and scored.get("extracted"):
        answer = ", ".join(scored["extracted"])
    if example is not None:
        named = dialog.meant(answer, example, style)
        right = (named is not None and dialog.same_answer(named, example.answer)) if right is None else right
        answer = named or answer
    modality, task = (example.modality, example.task) if example is not None else ("", "")
    if there is None and example is not None:
        there, searched = example.findings, example.searched
    whole = (parsed.think is None and think) or parsed.answer is None
    trace = parsed.think or ""
    places = _places(trace, example, boxes) if example and boxes else None
    said = dialog.without_boxes(trace) if places else trace
    return Reply(
        think=(Piece(clean(text)),) if whole else mark(said, modality, there, searched=searched),
        answer=None if answer is None else clean(answer),
        right=right,
        well_formed=parsed.well_formed,
        finished=bool(scored.get("finished", True)),
        outside="" if whole else clean(" ".join(dialog.outside(text).split()), 300),
        missed=missed(trace, task, there) if think else (),
        places=places,
    )


def _places(think: str, example: Example, most: int) -> Places | None:
    """None where nobody knows the places, or the question is not about findings."""
    if example.findings is None or example.task in dialog.WITHOUT_FINDINGS:
        return None
    unseen = unknown(example.modality, example.searched)
    there, said = dialog.positioned(example, most).boxes, localisation.read(think, unseen)
    scores = localisation.agreements(said.boxes, there, [name for name, _ in said.malformed])
    order = [name for name in localisation.by_finding((*there, *said.boxes)) if name]
    order += [name for name in scores if name and name not in order]
    drawn = [
        (
            order.index(localisation.canonical(box.finding)) + 1,
            kind,
            box.x1,
            box.y1,
            box.x2 - box.x1,
            box.y2 - box.y1,
        )
        for kind, boxes in (("there", there), ("said", said.boxes))
        for box in boxes
    ]
    return Places(
        boxes=tuple(drawn),
        findings=tuple((clean(name), scores[name]) for name in order),
        malformed=tuple(clean(f"{name}: {reason}" if name else reason) for name, reason in said.malformed),
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
            text, think = str(line.get("response", "")), asks_for_trace(run)
            replies[stage] = read_reply(
                text, example, line, think=think, style=style_asked(run), boxes=boxes_asked(run)
            )
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
