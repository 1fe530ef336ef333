"""From what is known of images to questions with options and an answer.

A question is asked only where the publisher's data answer it: no grade, no question. What is left to choice
(the wording, whether a question is asked at all) follows from a hash of the sample's key, so that it is the
same on every run. `VERSION` goes into the config of `ingest`: raise it when a wording or a rule changes.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from data_pipeline.datasets import labels
from data_pipeline.datasets.base import Sample
from fundus_jax.findings import FINDINGS
from fundus_jax.records import GRID, ConfigError

VERSION = 3

DR = ("Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")
FUNDUS = ("Normal", *DR, "Glaucoma", "AMD")
DISEASES = {"CFP": FUNDUS, "UWF": FUNDUS, "OCT": ("Normal", "DME", "Drusen", "CNV")}
GRADES = ("No DR", *DR)
MODALITIES = {
    "CFP": "Colour fundus photograph",
    "OCT": "Optical coherence tomography",
    "UWF": "Ultra-widefield photograph",
}
EYES = {"OD": "Right eye", "OS": "Left eye"}
PRESENCE = ("Yes", "No")
GRADED = {
    "dr_grade": GRADES,
    "amd_grade": labels.AMD_GRADES,
    "dme_risk": labels.DME_RISKS,
}  # label -> options
CRITERIA = ("PLR2", "PLR3", "MD")  # by which a field of vision gets worse; labels are "progression_plr2" ...
MOST_OPTIONS, DRAWN = 8, 5  # among more diseases than the first, a question offers the second
QUADRANTS = ("Upper left", "Upper right", "Lower left", "Lower right")  # of the image, not of the retina
DOMINANT = 0.75  # share of the boxes' area that has to lie in one quadrant

WORDINGS = {
    "disease": ("What is the diagnosis for this image?", "Which disease does this image show, if any?"),
    "dr_grade": ("What is the grade of diabetic retinopathy?", "How severe is diabetic retinopathy here?"),
    "amd_grade": ("What is the stage of macular degeneration?", "How far is macular degeneration here?"),
    "dme_risk": (
        "What is the risk of macular oedema?",
        "How do hard exudates threaten the macula, if at all?",
    ),
    "progression": ("Does glaucoma progress in this eye, by {}?", "Will the visual field get worse, by {}?"),
    "disease_presence": ("Does this image show signs of {}?", "Is {} among the diagnoses here?"),
    "modality": ("Which imaging modality is this?", "How was this image taken?"),
    "laterality": ("Which eye is shown?", "Is this a right or a left eye?"),
    "lesion_presence": ("Does this image show {}?", "Can {} be seen in this image?"),
    "lesion_location": ("Which quadrant mainly shows {}?", "Where does this image mainly show {}?"),
}
TASKS = tuple(WORDINGS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about one image; `answer` is one of `options`."""

    task: str
    question: str
    options: tuple[str, ...]
    answer: str


def check_tasks(tasks: Mapping[str, float]) -> None:
    """Raise ConfigError for no task, an unknown one, or a rate below zero."""
    if not tasks:
        raise ConfigError(f"no task is wanted; known tasks are {', '.join(TASKS)}")
    for task, rate in tasks.items():
        if task not in TASKS or not 0 <= rate < math.inf:
            raise ConfigError(f"task {task!r}: {rate}; known tasks are {', '.join(TASKS)}, rates are >= 0")


def ask(
    samples: Sequence[Sample], tasks: Mapping[str, float], *, diseases: Mapping[str, int] | None = None
) -> list[list[Question]]:
    """Questions about each of some samples (a shard of them, with their findings read).

    Args:
      samples: the samples; `lesion_presence` and `disease_presence` are balanced over all of them.
      tasks: task -> how many of its questions to ask about an image, where that many can be answered; a
        fraction is a probability (1.5: one, and every other time two).
      diseases: options of the task `disease`, and of how many images of the data set each is the answer; by
        default those of the modality.

    Returns:
      A list for each sample, in the order of `tasks`.

    Raises:
      ConfigError: an unknown task, a rate below zero, a label that is not among the options.
    """
    check_tasks(tasks)
    asked: list[list[Question]] = [[] for _ in samples]
    for task, rate in tasks.items():
        rooms = [_number(sample, task, rate) for sample in samples]
        if task in _SIDES:
            found = _balanced(samples, rooms, task)
        else:
            found = [_CANDIDATES[task](sample, diseases or {}) for sample in samples]
        for sample, one, more, room in zip(samples, asked, found, rooms, strict=True):
            more.sort(key=lambda question: _chance(sample, task, question.question))  # noqa: B023
            one += more[:room]
    return asked


def _chance(sample: Sample, *of: str) -> float:
    """A number in [0, 1) that depends on the sample and on `of` only."""
    text = "\n".join((sample.split, sample.key, *of))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _number(sample: Sample, task: str, rate: float) -> int:
    return int(rate) + (_chance(sample, task, "number") < rate - int(rate))


def _question(sample: Sample, task: str, options: Sequence[str], answer: str, finding: str = "") -> Question:
    if answer not in options:
        raise ConfigError(
            f"{sample.key}: {task} is {answer!r}, which is not among the options {tuple(options)}"
        )
    wordings = WORDINGS[task]
    text = wordings[int(_chance(sample, task, finding, "wording") * len(wordings))]
    if finding:
        text = text.format(FINDINGS[finding].plural if finding in FINDINGS else finding)
    return Question(task=task, question=text, options=tuple(options), answer=answer)


def _disease(sample: Sample, diseases: Mapping[str, int]) -> list[Question]:
    if "disease" not in sample.labels:
        return []
    options = diseases or dict.fromkeys(DISEASES[sample.modality], 1)
    return [_question(sample, "disease", _drawn(sample, options), sample.labels["disease"])]


def _drawn(sample: Sample, options: Mapping[str, int]) -> tuple[str, ...]:
    """The options if they are few; else `DRAWN` of them, the answer among them, in their order.

    The others are drawn without putting back, each as likely as it is an answer of the data set: were they
    all alike, the most frequent of the options offered would nearly always be the answer.
    """
    answer = sample.labels["disease"]
    if len(options) <= MOST_OPTIONS or answer not in options:
        return tuple(options)

    def late(option: str) -> tuple[bool, float]:  # an exponential clock of each; the first to ring are taken
        chance = _chance(sample, "option", option)
        often = options[option]
        return (not often, -math.log1p(-chance) / often if often else chance)

    others = sorted((o for o in options if o != answer), key=late)
    return tuple(o for o in options if o == answer or o in others[: DRAWN - 1])


def _graded(task: str, sample: Sample, _: Mapping[str, int]) -> list[Question]:
    grade = sample.labels.get(task)
    return [_question(sample, task, GRADED[task], grade)] if grade else []


def _progression(sample: Sample, _: Mapping[str, int]) -> list[Question]:
    stated = {name: sample.labels.get(f"progression_{name.lower()}") for name in CRITERIA}
    return [
        _question(sample, "progression", labels.PROGRESSION, answer, name)
        for name, answer in stated.items()
        if answer
    ]


def _modality(sample: Sample, _: Mapping[str, int]) -> list[Question]:
    return [_question(sample, "modality", tuple(MODALITIES.values()), MODALITIES[sample.modality])]


def _laterality(sample: Sample, _: Mapping[str, int]) -> list[Question]:
    if sample.modality == "OCT" or not sample.eye:
        return []
    return [_question(sample, "laterality", tuple(EYES.values()), EYES[sample.eye])]


def _location(sample: Sample, _: Mapping[str, int]) -> list[Question]:
    questions = []
    for finding in sorted({box.finding for box in sample.boxes}):
        shares = _shares(sample, finding)
        if max(shares) >= DOMINANT:
            answer = QUADRANTS[shares.index(max(shares))]
            questions.append(_question(sample, "lesion_location", QUADRANTS, answer, finding))
    return questions


def _shares(sample: Sample, finding: str) -> list[float]:
    """Share of the area of a finding's boxes in each of the `QUADRANTS`."""
    half, areas = GRID / 2, [0.0] * 4
    for box in sample.boxes:
        if box.finding == finding:
            across = (max(0, min(box.x2, half) - box.x1), max(0, box.x2 - max(box.x1, half)))
            down = (max(0, min(box.y2, half) - box.y1), max(0, box.y2 - max(box.y1, half)))
            for quadrant in range(4):
                areas[quadrant] += across[quadrant % 2] * down[quadrant // 2]
    return [area / sum(areas) for area in areas]


def _balanced(samples: Sequence[Sample], rooms: Sequence[int], task: str) -> list[list[Question]]:
    """Ask for each finding (or disease) of each modality about as many images that show it as that do not.

    Equal numbers, because a finding that is nearly always there (microaneurysms in IDRiD) or nearly never is
    answered best without a look at the image. A finding that all images show, or none, is not asked for.
    """
    left = list(rooms)
    found: list[list[Question]] = [[] for _ in samples]
    for modality in MODALITIES:
        sides = _SIDES[task](samples, modality)
        members = {i for pair in sides.values() for side in pair for i in side}
        order = sorted(sides, key=lambda name: min(map(len, sides[name])))  # the rarest get their share first
        for place, name in enumerate(order):
            fair = math.ceil(sum(left[i] for i in members) / 2 / (len(order) - place))
            hashed = {i: _chance(samples[i], name) for i in members}
            free = [[i for i in side if left[i]] for side in sides[name]]
            many = min(fair, *map(len, free))
            for answer, side in zip(PRESENCE, free, strict=True):
                for i in sorted(side, key=lambda i: (-left[i], hashed[i]))[:many]:  # noqa: B023
                    left[i] -= 1
                    found[i].append(_question(samples[i], task, PRESENCE, answer, name))
    return found


def _of_findings(samples: Sequence[Sample], modality: str) -> dict[str, tuple[list[int], list[int]]]:
    """Finding -> indices of the samples that show it, and of those in which it was looked for in vain."""
    sides: dict[str, tuple[list[int], list[int]]] = {}
    for i, sample in enumerate(samples):
        if sample.modality == modality and sample.findings is not None:
            for name in sample.searched:
                sides.setdefault(name, ([], []))[name not in sample.findings].append(i)
    return dict(sorted(sides.items()))


def _of_diseases(samples: Sequence[Sample], modality: str) -> dict[str, tuple[list[int], list[int]]]:
    """Disease -> indices of the samples that have it, and of those without, among the samples with several:
    these have no one diagnosis to ask for."""
    several = [i for i, one in enumerate(samples) if one.modality == modality and len(one.diseases) > 1]
    sides: dict[str, tuple[list[int], list[int]]] = {}
    for name in sorted({name for i in several for name in samples[i].diseases}):
        sides[name] = ([], [])
        for i in several:
            sides[name][name not in samples[i].diseases].append(i)
    return sides


_SIDES = {"lesion_presence": _of_findings, "disease_presence": _of_diseases}
_CANDIDATES: dict[str, Callable[[Sample, Mapping[str, int]], list[Question]]] = {
    "disease": _disease,
    **{task: partial(_graded, task) for task in GRADED},
    "progression": _progression,
    "modality": _modality,
    "laterality": _laterality,
    "lesion_location": _location,
}
