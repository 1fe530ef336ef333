"""What the page shows of a case, as JSON: texts are data there, never markup, and clean of what turns them.

Neighbours: `index.py` finds the records, `server.py` sends this, page/show.js puts it on the screen.
"""

import io
from collections.abc import Collection, Sequence
from typing import Any

from PIL import Image

from data_pipeline import images, reviewed
from data_pipeline.decisions import Decision, trace_sha256
from data_pipeline.pictures import Picture
from data_pipeline.reviewing.index import Case, Index
from data_pipeline.stages import LABEL_TASKS
from fundus_jax import dialog
from fundus_jax.findings import FINDINGS, clean, mark, missed, unknown
from fundus_jax.records import Box, Knowledge

LONGEST = 20_000  # characters of a text that are shown, or taken from a reviewer
SIDES = (256, 4096)  # of a picture on the screen, in pixels
QUALITY = 90


def view(case: Case, rules: reviewed.Rules) -> dict[str, Any]:
    """Everything about a case. `rules`: those that the quality check holds its trace to."""
    example, trace = case.example, case.trace
    there = case.found.present if case.found else None
    shown = read(trace.think, case, said=True)
    voted = [name for name, votes in case.found.votes.items() if votes] if case.found else []
    names = _in_order({*(box.finding for box in example.boxes), *(there or ()), *voted})
    return {
        "id": clean(example.id),
        "dataset": clean(example.dataset),
        "split": example.split,
        "modality": example.modality,
        "eye": example.eye,
        "task": clean(example.task),
        "question": clean(example.question),
        "options": list(example.options),
        "published": example.answer,
        "boxes": _boxes(example.boxes),
        "colours": {name: number for number, name in enumerate(names)},
        "findings": _findings(case, names),
        "knowledge": _knowledge(case),
        "trace": {
            **shown,
            "text": trace.think[:LONGEST],
            "answer": trace.answer[:LONGEST],
            "sha256": trace_sha256(trace),
            "kept": trace.kept,
            "reasons": [clean(reason) for reason in trace.reasons],
            "missed": list(missed(trace.think, example.task, there)),
        },
        "rules": dict(rules),
    }


def read(think: str, case: Case, *, said: bool = False) -> dict[str, Any]:
    """A think text in pieces, each claim marked; with `said`, apart from the boxes that it says."""
    places = dialog.parse_boxes(think) if said else None
    text = dialog.without_boxes(think) if places and (places.boxes or places.malformed) else think
    there, searched = (case.found.present, case.found.searched) if case.found else (None, None)
    pieces = mark(text, case.example.modality, there, LONGEST, searched=searched)
    found: dict[str, Any] = {"pieces": [[one.text, one.kind, one.why] for one in pieces]}
    if places:
        found["said"] = _boxes(places.boxes)
        said_badly = [f"{name}: {why}" if name else why for name, why in places.malformed]
        found["malformed"] = [clean(one, 300) for one in said_badly[:5]]
    return found


def decided(one: Decision, why_void: str = "") -> dict[str, Any]:
    """A decision; `why_void` says why it does not count."""
    return {
        "outcome": one.outcome,
        "reason": clean(one.reason),
        "think": one.think[:LONGEST],
        "answer": one.answer[:LONGEST],
        "reviewer": clean(one.reviewer),
        "time": one.time,
        "void": why_void,
    }


def picture(index: Index, case: Case, side: int) -> bytes:
    """The picture of a case as a JPEG whose longer side has at most `side` pixels (within SIDES).

    Raises DataError where it is missing or can not be read.
    """
    file, _, number = case.example.image.partition("#")
    place = Picture(case.example.id, case.example.split, index.folder / "examples" / file, int(number))
    image = images.decode(place.read())
    side = min(max(side, SIDES[0]), SIDES[1])
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _boxes(boxes: Sequence[Box]) -> list[list[Any]]:
    return [[clean(box.finding, 80), box.x1, box.y1, box.x2, box.y2] for box in boxes]


def _findings(case: Case, names: Sequence[str]) -> dict[str, Any] | None:
    """Of each name: whether it is present, and its votes; present and much voted first. None where nobody
    looked. `unseen` counts the findings that were asked for and got no vote; `unknown` are those that nobody
    looked for."""
    found = case.found
    if found is None:
        return None
    unseen_by_all = _in_order(unknown(case.example.modality, found.searched))
    rows = [[clean(name, 80), name in found.present, found.votes.get(name)] for name in names]
    rows.sort(key=lambda row: (not row[1], -(row[2] or 0)))
    unseen = sum(1 for votes in found.votes.values() if not votes)
    return {"origin": found.origin, "n": found.n, "rows": rows, "unseen": unseen, "unknown": unseen_by_all}


def _in_order(names: Collection[str]) -> list[str]:
    """Names in the order of the table of findings; those that it does not know come last."""
    known = list(FINDINGS)
    return sorted(set(names), key=lambda name: (known.index(name) if name in FINDINGS else len(known), name))


def _knowledge(case: Case) -> dict[str, Any] | None:
    """What is known of the answer; None for a question that is not about a label, or where nothing is."""
    known: Knowledge | None = case.knowledge if case.example.task in LABEL_TASKS else None
    if known is None:
        return None
    return {
        "label": clean(known.label),
        "text": clean(known.text, LONGEST),
        "required": [clean(one) for one in known.required],
        "supportive": [clean(one) for one in known.supportive],
        "excluded": [clean(one) for one in known.excluded],
        "passages": [
            {
                "text": clean(one.text, LONGEST),
                "quotes": [
                    [clean(claim.finding, 200), claim.role, clean(claim.quote, LONGEST)]
                    for claim in known.claims
                    if claim.passage == one.sha256
                ],
                "source": clean(one.source),
                "address": clean(one.address),
                "licence": clean(one.licence),
            }
            for one in known.passages
        ],
    }
