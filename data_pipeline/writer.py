"""Writes reasoning traces by rule, from findings and knowledge: the embedded back end, called `rules`.

Paper, section 3.2.3: a trace (i) summarises the visual findings, (ii) connects them to the knowledge, (iii)
derives the answer. A positioned trace (FundusExpert's chain: region, finding, diagnosis) says where first. A
language model writes the real ones (`trace_server.py`); these are for machines without one and for learners
of two million parameters, so words and sentences are few and always the same. Nothing is written that the
records do not hold. Neighbours: `quality.py` checks what is written, here and there; `composing.py` does
both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fundus_jax import dialog, findings
from fundus_jax.records import Box, Example, Findings, Knowledge

EVERYWHERE = "in all quadrants"
SEVERE = "Severe NPDR"
BESIDE_SPREAD = findings.proofs(SEVERE, "haemorrhage")  # each makes the disease severe without it
SPREAD = 0.3  # share of the image that the boxes of haemorrhages cover at least when they are everywhere

VIEWS = {
    "CFP": "The image shows the round disc and the vessels of one field of the retina.",
    "OCT": "The image is a cross-section of retinal layers.",
    "UWF": "The image shows a wide field of the retina up to the periphery.",
}
SIDES = {"OD": "right", "OS": "left"}
REGIONS = ("upper left", "upper right", "lower left", "lower right")  # quadrants of the image
_HALF = 500  # of the grid of boxes
_REACH = 0.2  # share of a box from which it counts as lying in a quadrant too
# What a label stands for in the sentence that connects it to the findings.
CONCEPTS = {
    "Normal": "a normal eye",
    "No DR": "no retinopathy",
    "Mild NPDR": "mild disease",
    "Moderate NPDR": "moderate disease",
    "Severe NPDR": "severe disease",
    "PDR": "proliferative disease",
    "Glaucoma": "glaucoma",
    "AMD": "macular degeneration",
    "DME": "macular oedema",
    "Drusen": "dry disease",
    "CNV": "choroidal neovascularisation",
}

# Label -> what tells it from its neighbours, and the findings whose absence that claims.
WITHOUT = {
    "Moderate NPDR": ("without neovascularisation", ("neovascularisation",)),
    "Severe NPDR": ("without neovascularisation", ("neovascularisation",)),
    "DME": ("without a pigment epithelial detachment", ("pigment epithelial detachment",)),
    "Drusen": ("without fluid", ("intraretinal fluid", "subretinal fluid")),
}


@dataclass
class RuleWriter:
    """The deterministic writer. With `boxes`, a trace goes from regions to findings to the answer: it begins
    with at most so many boxes of each finding, and with the quadrants they lie in."""

    boxes: int = 0

    @property
    def config(self) -> dict:
        """The version of the wording, to be raised when that changes, and the boxes where there are any."""
        return {"version": 2} | ({"boxes": self.boxes, "places": 1} if self.boxes else {})

    def write(self, example: Example, found: Findings | None, knowledge: Knowledge | None) -> str:
        """The think text, "" where there is nothing to write from. `found` is None for an unseen image."""
        if example.task == "modality":
            middle = [VIEWS[example.modality]]
        elif example.task == "laterality":
            side = SIDES.get(example.eye)
            middle = [f"The optic disc lies to the {side} of the macula."] if side else []
        elif found is None:
            middle = []
        elif example.task in ("lesion_presence", "lesion_location"):
            middle = _about_one(example, found)
        else:
            middle = [summary(example, found), connection(example, found, knowledge)]
        if self.boxes and found is not None and any(middle):
            middle = [*positions(dialog.positioned(example, self.boxes).boxes), *middle]
        return " ".join(filter(None, [*middle, derivation(example.answer)])) if any(middle) else ""


def positions(boxes: Sequence[Box]) -> list[str]:
    """What stands before step (i) in a positioned trace: a sentence a finding, in their fixed order, such as
    "Upper left and lower left: <ref>drusen</ref><box>[[...], [...]]</box>."."""
    sentences = []
    for name in findings.ordered(box.finding for box in boxes):
        mine = [box for box in boxes if box.finding == name]
        reached = regions(mine)
        *others, last = reached if len(reached) < len(REGIONS) else ("all quadrants",)
        where = f"{', '.join(others)} and {last}" if others else last
        sentences.append(f"{_capital(where)}: {dialog.render_boxes(mine)}.")
    return sentences


def regions(boxes: Iterable[Box]) -> tuple[str, ...]:
    """The quadrants in which boxes lie, in the order of `REGIONS`: each that holds a fifth of a box."""
    reached = set()
    for box in boxes:
        left, top = (_before(low, high) for low, high in ((box.x1, box.x2), (box.y1, box.y2)))
        shares = (left * top, (1 - left) * top, left * (1 - top), (1 - left) * (1 - top))
        reached |= {name for name, share in zip(REGIONS, shares, strict=True) if share >= _REACH}
    return tuple(name for name in REGIONS if name in reached)


def _before(low: int, high: int) -> float:
    """The share of a span that lies in the first half of the grid."""
    return min(1.0, max(0.0, (_HALF - low) / (high - low)))


def summary(example: Example, found: Findings) -> str:
    """Step (i): "The image shows ..." with the findings in their fixed order, or "No lesion is seen."; where
    not all lesions were looked for, "No microaneurysms or haemorrhages are seen."."""
    present = found.present
    if not present and findings.surveyed(example.modality, found.searched):
        return "No lesion is seen."
    if not present:
        absent = findings.ordered(found.searched or ())
        return f"No {_bare(absent)} {_verb_of(absent, 'be')} seen." if absent else ""
    text = findings.phrase(present)
    if "haemorrhage" in present and everywhere(example.boxes):
        parts = findings.phrase(present).split("haemorrhages", 1)  # the first is the plain one, by the order
        text = f"{parts[0]}many haemorrhages {EVERYWHERE}{parts[1]}"
    return f"The image shows {text}."


def connection(example: Example, found: Findings, knowledge: Knowledge | None) -> str:
    """Step (ii): one sentence from findings to label; "" when the image lacks what the label requires. It
    says that a finding is absent only where somebody looked for it."""
    label = example.answer
    if knowledge is None or findings.missing(knowledge, found.present):
        return ""
    concept, unknown = CONCEPTS.get(label, label), findings.unknown(example.modality, found.searched)
    without, names = WITHOUT.get(label, ("", ()))
    without = f" {without}" if without and unknown.isdisjoint(names) else ""
    if label == "No DR" and unknown.isdisjoint(("microaneurysm", "haemorrhage")):
        return f"Without microaneurysms or haemorrhages there is {concept}."
    proof = (
        knowledge.required or knowledge.supportive
    )  # some labels require no finding, and are known by several
    if not proof:
        subject = "Layers" if example.modality == "OCT" else "A retina"
        return f"{subject} without lesions {_verb(subject, 'fit')} {concept}."
    if label == "Mild NPDR":
        absent = [name for name in knowledge.excluded if name not in {*unknown, *found.present}]
        others = f"without {_bare(absent)}" if unknown and absent else "alone"
        return f"Microaneurysms {others} fit {concept}."
    if label == "Moderate NPDR" and {"microaneurysm", "haemorrhage"} <= set(found.present):
        return f"Haemorrhages beyond microaneurysms{without} fit {concept}."
    if label == SEVERE and everywhere(example.boxes):
        return f"Haemorrhages {EVERYWHERE}{without} fit {concept}."
    if label == SEVERE and spread_is_known(found):
        proof = BESIDE_SPREAD
    others = [name for one in proof for name in findings.proofs(label, one)]
    signs = [name for name in found.present if name in (*proof, *others)]
    if not signs:
        return ""
    return f"{_capital(findings.phrase(signs))}{without} {_verb_of(signs, 'fit')} {concept}."


def spread_is_known(found: Findings) -> bool:
    """Whether boxes say how far haemorrhages spread; votes do not."""
    return found.origin != "votes" and "haemorrhage" not in found.votes


def derivation(answer: str) -> str:
    """Step (iii)."""
    return f"So the answer is {answer}."


def asked(example: Example) -> str | None:
    """The finding that a lesion question is about: the only one it names. None for none or several."""
    mentions = findings.parse_mentions(example.question)
    names = mentions.present | mentions.absent
    return next(iter(names)) if len(names) == 1 else None


def everywhere(boxes: Iterable[Box]) -> bool:
    """Whether the boxes of haemorrhages reach all four quadrants and cover `SPREAD` of the image.

    The boxes of a finding are few and drawn around groups of lesions, so their area says how far it spreads.
    It is our stand-in for the count of more than twenty in each quadrant (ICDR), which boxes do not give.
    """
    mine = [box for box in boxes if box.finding == "haemorrhage"]
    quadrants = {(x, y) for box in mine for x in (box.x1 // 500, (box.x2 - 1) // 500) for y in _rows(box)}
    return len(quadrants) == 4 and sum((b.x2 - b.x1) * (b.y2 - b.y1) for b in mine) >= SPREAD * 999**2


def _rows(box: Box) -> tuple[int, int]:
    return box.y1 // 500, (box.y2 - 1) // 500


def _about_one(example: Example, found: Findings) -> list[str]:
    name = asked(example)
    if name is None:
        return []
    subject = _capital(findings.FINDINGS[name].plural)
    if example.task == "lesion_presence":
        state = "present" if name in found.present else "absent"
        return [summary(example, found), f"{subject} {_verb_of([name], 'be')} {state}."]
    place = example.answer[:1].lower() + example.answer[1:]
    return [
        summary(example, found),
        f"{subject} {_verb_of([name], 'lie')} in the {place} of the image.",
    ]


def _bare(names: Iterable[str]) -> str:
    """Findings as what is not there: "microaneurysms, haemorrhages or large cup"."""
    words = [findings.FINDINGS[name].plural for name in findings.ordered(names)]
    words = [word.removeprefix("a ").removeprefix("an ") for word in words]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _verb_of(names: Sequence[str], verb: str) -> str:
    subject = findings.FINDINGS[names[0]].plural if len(names) == 1 else "s"
    return _verb(subject, verb)


def _verb(subject: str, verb: str) -> str:
    plural = subject.endswith(("s", "drusen", "foci"))
    if verb == "be":
        return "are" if plural else "is"
    return verb if plural else f"{verb}s"
