"""The quality check: reasons why a trace is not fit to learn from.

Paper, section 3.2.3, where a language model looks for a wrong modality, required findings left out, findings
that are redundant or wrong, and knowledge left out or misapplied. Here rules find the same faults: a trace's
mentions are compared with the findings of the image and with the knowledge of the label. Traces of any writer
can be checked. Neighbours: `writer.py` has the rule writer, `trace_server.py` asks a model too, `traces.py`
keeps the verdicts.
"""

import re
from collections.abc import Iterator, Sequence

from data_pipeline.stages import LABEL_TASKS
from data_pipeline.writer import (
    BESIDE_SPREAD,
    CONCEPTS,
    EVERYWHERE,
    REGIONS,
    SEVERE,
    SIDES,
    asked,
    everywhere,
    regions,
    spread_is_known,
)
from fundus_jax import dialog, findings
from fundus_jax.findings import Mentions
from fundus_jax.records import Box, DataError, Example, Findings, Knowledge

VERSION = 4  # raise it when a rule changes: shards that were checked by the old one are made again

MALFORMED = "malformed"
NO_FINDINGS = "no findings"
MODALITY = "modality contradiction"
CONTRADICTION = "contradicts itself"
ABSENT = "absent finding claimed"
DENIED = "present finding denied"
OMITTED = "required finding omitted"
EXCLUDED = "excluded finding claimed"
KNOWLEDGE = "knowledge missing"
LABEL = "label not reached"
PLACE = "wrong place"
KINDS = (
    *(MALFORMED, NO_FINDINGS, MODALITY, CONTRADICTION, ABSENT, DENIED),
    *(OMITTED, EXCLUDED, KNOWLEDGE, LABEL, PLACE),
)

MOST_WORDS = 45
PLACE_WORDS = 10  # more for each finding whose place a trace says
ROUNDING = 1  # of the grid, by which a corner may differ from that of the masks
LESION_TASKS = ("lesion_presence", "lesion_location")
EXPLAINED = (
    *LABEL_TASKS,
    *LESION_TASKS,
    *dialog.WITHOUT_FINDINGS,
)  # tasks whose answers a trace can argue for
_SENTENCE = re.compile(r"[^.!?\n]+")
_CLEAN = re.compile(
    r"\bno (?:visible |other )?(?:lesions?|abnormalit(?:y|ies)) (?:is|are) (?:seen|visible|present)"
    r"|\bwithout (?:any |other )?(?:lesions?|abnormalit(?:y|ies))\b"
)
_MANY = f"many haemorrhages {EVERYWHERE}"
_WORD = re.compile(r"[a-z0-9]+")
_SAY_MODALITY = {
    "CFP": ("CFP", "colour fundus photograph", "color fundus photograph"),
    "OCT": ("OCT", "optical coherence tomography", "B-scan", "cross-section"),
    "UWF": ("UWF", "ultra-widefield", "ultrawide field", "wide field"),
}
_HALF = 500  # of the grid of boxes


def check(
    example: Example,
    found: Findings | None,
    knowledge: Knowledge | None,
    think: str,
    answer: str,
    *,
    most_words: int = MOST_WORDS,
    boxes: int = 0,
) -> tuple[str, ...]:
    """The reasons against a trace, each "KIND: detail"; () for a good one. A pure function.

    Args:
        example: the question, its right answer, and the boxes.
        found: the findings of its image; None where nobody looked.
        knowledge: of the example's answer and modality; needed by the tasks whose answer is a label.
        think: the reasoning of the trace.
        answer: the answer of the trace.
        most_words: how long `think` may be, without boxes; the default suits the rule writer.
        boxes: the trace has to say the example's boxes, so many of a finding (`dialog.positioned`); 0: none.
    """
    if example.task not in EXPLAINED:
        return (f"{KNOWLEDGE}: there is no record on how to come to the answers of {example.task}",)
    if found is None and (example.task in LABEL_TASKS or example.task in LESION_TASKS):
        return (f"{NO_FINDINGS}: nobody looked for any in this image",)
    if found is not None and (blind := unseen(example, found, knowledge)):
        return (f"{NO_FINDINGS}: nobody looked for {', '.join(blind)}, on which the answer depends",)
    there = dialog.positioned(example, boxes).boxes if boxes else ()
    plain = dialog.without_boxes(think)
    form = tuple(_form(think, answer, most_words + PLACE_WORDS * len({box.finding for box in there})))
    if form:
        return form  # nothing else can be said of what is no trace
    mentions = findings.parse_mentions(findings.observations(plain))  # a conclusion has seen nothing
    reasons = [
        *_claims(example, found, plain, mentions),
        *(_label(example, found, knowledge, plain, mentions) if example.task in LABEL_TASKS else ()),
        *_task(example, think, mentions),
        *_answer(example, plain, answer),
        *_places(think, there),
    ]
    return tuple(dict.fromkeys(reasons))


def unseen(example: Example, found: Findings, knowledge: Knowledge | None) -> tuple[str, ...]:
    """The findings on which the answer depends and of which nobody knows whether the image shows them: the
    one that is asked about; those that the label requires, or, where it is known by the absence of lesions
    alone, the core ones that it excludes."""
    unknown = findings.unknown(example.modality, found.searched)
    if example.task in LESION_TASKS:
        return tuple(name for name in (asked(example),) if name in unknown)
    if example.task not in LABEL_TASKS or knowledge is None:
        return ()
    needed = {*findings.missing(knowledge, found.present)}
    needed -= {*findings.missing(knowledge, found.present, unknown)}
    if not knowledge.required and not knowledge.supportive:
        needed = unknown & {*knowledge.excluded} & {*findings.vocabulary(example.modality)}
    return findings.ordered(needed)


def kind(reason: str) -> str:
    """The kind of a reason, which summaries count."""
    return reason.partition(":")[0]


def _form(think: str, answer: str, most_words: int) -> Iterator[str]:
    try:
        dialog.render(think, answer)
    except DataError as error:
        yield f"{MALFORMED}: {error}"
    words = len(dialog.without_boxes(think).split())
    if words > most_words:
        yield f"{MALFORMED}: {words} words, at most {most_words} are allowed"


def _claims(example: Example, found: Findings | None, think: str, mentions: Mentions) -> Iterator[str]:
    """The trace against the modality, against itself and against the image."""
    for other, names in _SAY_MODALITY.items():
        if other != example.modality and any(_says(think, name) for name in names):
            yield f"{MODALITY}: calls an image of {example.modality} one of {other}"
    for name in findings.modality_contradictions(example.modality, mentions.present):
        yield f"{MODALITY}: {example.modality} can not show {name}"
    for name in findings.contradictions(mentions.present, mentions.absent):
        yield f"{CONTRADICTION}: {name} is claimed and denied"
    if found is None:
        if mentions.present:
            yield f"{NO_FINDINGS}: claims {', '.join(findings.ordered(mentions.present))}, which nobody saw"
        return
    unknown = findings.unknown(example.modality, found.searched)
    for name in findings.ordered((mentions.present | mentions.absent) & unknown):
        yield f"{NO_FINDINGS}: nobody looked for {name}, so it is neither there nor absent"
    for name in findings.ordered(mentions.present - unknown - set(found.present)):
        yield f"{ABSENT}: {name}"
    for name in findings.ordered(mentions.absent & set(found.present)):
        yield f"{DENIED}: {name}"
    if _CLEAN.search(think.lower()):
        if found.present:
            yield f"{DENIED}: says that there is no lesion"
        elif not findings.surveyed(example.modality, found.searched):
            yield f"{NO_FINDINGS}: nobody looked for all lesions, so there may be one"
    if EVERYWHERE in think.lower() and not everywhere(example.boxes):
        yield f"{ABSENT}: {_MANY}"


def _label(
    example: Example, found: Findings | None, knowledge: Knowledge | None, think: str, mentions: Mentions
) -> Iterator[str]:
    """The trace against the knowledge of the label it argues for."""
    label = example.answer
    if knowledge is None or (knowledge.label, knowledge.modality) != (label, example.modality):
        yield f"{KNOWLEDGE}: there is no record on {label} in {example.modality}"
        return
    for name in findings.missing(knowledge, mentions.present):
        yield f"{OMITTED}: {name}"
    for name in findings.ordered(mentions.present & set(knowledge.excluded)):
        yield f"{EXCLUDED}: {name}"
    if not any(_connects(sentence, knowledge) for sentence in _SENTENCE.findall(think)):
        yield f"{KNOWLEDGE}: no sentence connects the findings to {CONCEPTS.get(label, label)}"
    spread = EVERYWHERE in think.lower()
    known = found is not None and spread_is_known(found)
    if label == SEVERE and known and not spread and mentions.present.isdisjoint(BESIDE_SPREAD):
        yield f"{LABEL}: {label} needs {_MANY}, or {' or '.join(BESIDE_SPREAD)}"
    if label in ("No DR", "Mild NPDR", "Moderate NPDR") and spread:
        yield f"{LABEL}: {_MANY} fit {SEVERE}, not {label}"


def _connects(sentence: str, knowledge: Knowledge) -> bool:
    """Whether a sentence names what the label stands for together with a finding that matters for it."""
    if not any(_says(sentence, name) for name in (knowledge.label, CONCEPTS.get(knowledge.label, ""))):
        return False
    mentions = findings.parse_mentions(findings.observations(sentence))
    if not knowledge.required and not knowledge.supportive:
        return "without lesion" in sentence.lower() or bool(mentions.absent & set(knowledge.excluded))
    proofs = {name for one in knowledge.required for name in findings.proofs(knowledge.label, one)}
    matters = proofs | {*knowledge.required, *knowledge.supportive}
    return bool(mentions.present & matters)


def _task(example: Example, think: str, mentions: Mentions) -> Iterator[str]:
    """The trace against what the task asks for: a side, a finding, a place."""
    words = set(_WORD.findall(think.lower()))
    if example.task == "laterality":
        side = SIDES.get(example.eye)
        if side is None or words & {"left", "right"} != {side}:
            yield f"{PLACE}: the disc of eye {example.eye or 'unknown'} lies to the {side} of the macula"
    if example.task not in LESION_TASKS:
        return
    name = asked(example)
    if name is None:
        yield f"{MALFORMED}: the question does not name exactly one finding"
        return
    denied = dialog.same_answer(example.answer, "No")
    if name not in (mentions.absent if denied else mentions.present):
        yield f"{LABEL}: says nothing on {name} that leads to {example.answer}"
    if example.task == "lesion_location":
        place = example.answer.lower()
        unboxed = ". ".join(one for one in _SENTENCE.findall(think) if "<ref>" not in one)
        for other in example.options:  # a sentence with boxes may be about another finding
            if other != example.answer and _says(unboxed, other):
                yield f"{PLACE}: says {other.lower()}, not {place}"
        if _share(example, name, place) <= 0.5:
            yield f"{PLACE}: {name} does not lie mainly in the {place}"


def _places(think: str, there: Sequence[Box]) -> Iterator[str]:
    """The boxes that the trace says against those of the masks, and its words for the regions they lie in."""
    said = dialog.parse_boxes(think)
    for name, wrong in said.malformed:
        yield f"{MALFORMED}: the boxes of {name or 'a finding'}: {wrong}"
    for name in dict.fromkeys(box.finding for box in (*there, *said.boxes)):
        ours, theirs = ([box for box in boxes if box.finding == name] for boxes in (said.boxes, there))
        if not _alike(ours, theirs):
            yield f"{PLACE}: {len(ours)} boxes of {name} are not the {len(theirs)} of the masks"
    for sentence in _SENTENCE.findall(think):
        boxes = dialog.parse_boxes(sentence).boxes
        if not boxes:
            continue
        reached = regions(boxes)
        for region in REGIONS:
            if region not in reached and _says(sentence, region):
                yield f"{PLACE}: the boxes of {boxes[0].finding} do not lie in the {region}"


def _alike(ours: Sequence[Box], theirs: Sequence[Box]) -> bool:
    """Whether two lists hold the same boxes, up to their order and `ROUNDING`."""
    left = list(theirs)
    for box in ours:
        near = [one for one in left if _distance(box, one) <= ROUNDING]
        if not near:
            return False
        left.remove(min(near, key=lambda one: _distance(box, one)))  # noqa: B023
    return not left


def _distance(a: Box, b: Box) -> int:
    return max(abs(a.x1 - b.x1), abs(a.y1 - b.y1), abs(a.x2 - b.x2), abs(a.y2 - b.y2))


def _share(example: Example, name: str, place: str) -> float:
    """Share of the area of a finding's boxes in a quadrant of the image, named as "upper left"."""
    rows = (0, _HALF) if "upper" in place else (_HALF, 2 * _HALF)
    columns = (0, _HALF) if "left" in place else (_HALF, 2 * _HALF)
    inside = total = 0
    for box in example.boxes:
        if box.finding == name:
            width = max(0, min(box.x2, columns[1]) - max(box.x1, columns[0]))
            height = max(0, min(box.y2, rows[1]) - max(box.y1, rows[0]))
            inside += width * height
            total += (box.x2 - box.x1) * (box.y2 - box.y1)
    return inside / total if total else 0.0


def _answer(example: Example, think: str, answer: str) -> Iterator[str]:
    """The answer has to be the right one, and the last sentence of the trace has to arrive at it."""
    if not dialog.same_answer(answer, example.answer):
        yield f"{LABEL}: the answer is {answer}, not {example.answer}"
    sentences = [sentence for sentence in _SENTENCE.findall(think) if sentence.strip()]
    if not sentences or not _says(sentences[-1], example.answer):
        yield f"{LABEL}: the last sentence does not arrive at {example.answer}"


def _says(sentence: str, name: str) -> bool:
    """Whether a sentence holds a name as whole words, so that NPDR does not say PDR."""
    said, wanted = (f" {' '.join(_WORD.findall(text.lower()))} " for text in (sentence, name))
    return bool(name) and wanted in said
