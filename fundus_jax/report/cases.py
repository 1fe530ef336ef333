"""Chooses the sample cases and the rollouts of the report, and puts together what is shown of each.

Cases are spread over modalities and classes in the order of the hash of their id, so nobody picked them by
how well they went. Neighbours: `collect` has read the files, `pictures` encodes, the template shows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fundus_jax import dialog, localisation
from fundus_jax.data import load_image
from fundus_jax.findings import parse_mentions
from fundus_jax.records import MODALITIES, DataError, Example, Knowledge, Trace
from fundus_jax.report.collect import Run, find, raw
from fundus_jax.report.pictures import data_uri

CASES = 8
DIAGNOSES = ("disease", "dr_grade")  # tasks whose answer obliges the trace to name every finding
LONGEST = 1200  # characters of a response that are shown
# Control characters, halves of surrogate pairs, and marks that turn the direction of the text around them.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A finding that a text claims, denies or leaves out, and whether that is right (None: nobody knows)."""

    name: str
    says: str  # "claimed", "denied" or "missed"
    right: bool | None


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
    """A response, read: its parts, whether its answer is right, its findings and boxes against the masks."""

    think: str
    answer: str | None
    right: bool | None
    well_formed: bool
    finished: bool
    marks: tuple[Mark, ...]
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


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rollouts of one prompt; each is (its dictionary of scores, its text read)."""

    step: int
    example: Example | None
    name: str
    shot: Shot
    rollouts: list[tuple[dict[str, Any], Reply]]
    widest: float  # largest |advantage|, at least a little


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


def rollout_groups(run: Run) -> list[Group]:
    """The groups of the first and the last rollout file, with their pictures."""
    wanted = {str(group.get("example")) for _, groups in run.rollouts for group in groups}
    examples = find(run, "examples", Example, wanted) if wanted else {}
    found = []
    for step, groups in run.rollouts:
        for group in groups:
            name = str(group.get("example"))
            example, scores = examples.get(name), group.get("rollouts", [])
            replies = [
                (one, read_reply(str(one.get("text", "")), example, think=asks_for_trace(run)))
                for one in scores
            ]
            widest = max([1e-6, *(abs(one.get("advantage") or 0.0) for one in scores)])
            shot = (
                _shot(run, example) if example else Shot(uri="", problem="no such example in data/examples")
            )
            found.append(
                Group(step=step, example=example, name=name, shot=shot, rollouts=replies, widest=widest)
            )
    return found


def asks_for_trace(run: Run) -> bool:
    """Whether the prompts of a run ask for a trace before the answer."""
    return bool(run.config.get("prompt", {}).get("think", True))


def read_reply(
    text: str,
    example: Example | None,
    scored: Mapping[str, Any] | None = None,
    *,
    think: bool = True,
    boxes: int = 0,
) -> Reply:
    """A response in parts. `scored`: its line of predictions.jsonl, which says what is right and claimed.
    think: whether a trace was asked for; where it was not, none is missing. boxes: the trace was asked for so
    many of a finding; they are compared, and left out of its text."""
    scored, parsed = scored or {}, dialog.parse(text, think=think)
    mentions = parse_mentions(parsed.think or "")
    claimed = mentions.present if scored.get("claimed") is None else frozenset(scored["claimed"])
    answer, right = parsed.answer, scored.get("correct")
    if answer is None and scored.get("extracted"):
        answer = ", ".join(scored["extracted"])
    if right is None and example is not None:
        right = answer is not None and dialog.same_answer(answer, example.answer)
    whole = (parsed.think is None and think) or parsed.answer is None
    places = _places(parsed.think or "", example, boxes) if example and boxes else None
    shown = text if whole else parsed.think or ""
    return Reply(
        think=clean(dialog.without_boxes(shown) if places else shown),
        answer=None if answer is None else clean(answer),
        right=right,
        well_formed=parsed.well_formed,
        finished=bool(scored.get("finished", True)),
        marks=tuple(_marks(claimed, mentions.absent, example)) if think else (),
        places=places,
    )


def _places(think: str, example: Example, most: int) -> Places | None:
    """None where nobody knows the places, or the question is not about findings."""
    if example.findings is None or example.task in dialog.WITHOUT_FINDINGS:
        return None
    there, said = dialog.positioned(example, most).boxes, dialog.parse_boxes(think)
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


def clean(text: str, longest: int = LONGEST) -> str:
    """A text of anyone's, fit to be shown: at most `longest` characters, and none that controls or turns the
    text around it."""
    rest = len(text) - longest
    more = f" … ({rest:,} more characters)" if rest > 0 else ""
    return _UNSHOWABLE.sub("\ufffd", text[:longest]) + more


def _marks(present: Iterable[str], absent: Iterable[str], example: Example | None) -> list[Mark]:
    there = None if example is None or example.findings is None else frozenset(example.findings)
    claimed, denied = frozenset(present), frozenset(absent)
    says = [(name, "claimed", None if there is None else name in there) for name in sorted(claimed)]
    if there is not None and example is not None:
        says += [(name, "denied", False) for name in sorted(there & denied - claimed)]
        if example.task in DIAGNOSES:
            says += [(name, "missed", False) for name in sorted(there - claimed - denied)]
    return [Mark(name=name, says=word, right=right) for name, word, right in says]


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
            text, asked = str(line.get("response", "")), {"think": asks_for_trace(run)}
            replies[stage] = read_reply(text, example, line, **asked, boxes=boxes_asked(run))
    return Case(
        example=example,
        shot=_shot(run, example),
        knowledge=known[0] if known else None,
        trace=trace,
        replies=replies,
    )


def boxes_asked(run: Run) -> int:
    """How many boxes of a finding the traces of a run say; 0 where they say none."""
    return int(run.config.get("prompt", {}).get("boxes") or 0)


def _shot(run: Run, example: Example) -> Shot:
    try:
        uri = data_uri(load_image(run.path / "data" / "examples", example.image))
    except (DataError, OSError, SyntaxError, ValueError) as error:
        return Shot(uri="", problem=f"the picture could not be read: {error}")
    names = tuple(dict.fromkeys([*(box.finding for box in example.boxes), *(example.findings or ())]))
    boxes = tuple((names.index(b.finding), b.x1, b.y1, b.x2 - b.x1, b.y2 - b.y1) for b in example.boxes)
    return Shot(uri=uri, boxes=boxes, names=names)
