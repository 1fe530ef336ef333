"""Reads OmniMedVQA's open-access questions, and of them those about fundus images: Omni-Fundus.

OmniMedVQA (Hu et al., CVPR 2024) is QA_information/Open-access/DATASET.json, a list of questions each, with
the right answer as a text, and Images/DATASET/... beside it. Which questions the paper's Omni-Fundus holds is
not printed in what we have of it: the default takes fundus photographs and OCT, which the paper both calls
fundus images, and its four tasks. docs/evaluation.md says what speaks for that and what against.
Neighbour: benchmarks.py, the table.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from fundus_jax.data import Size
from fundus_jax.evaluation import complete
from fundus_jax.evaluation.items import Item, Selection, choice_prompt, counted, turn
from fundus_jax.evaluation.pictures import Folder
from fundus_jax.records import ConfigError, DataError

FOLDER = "QA_information/Open-access"
OCT = "OCT (Optical Coherence Tomography"  # without its closing bracket, as the publisher spells it
MODALITIES = {"Fundus Photography": "CFP", OCT: "OCT"}
TASKS = {
    "Modality Recognition": "MR",
    "Anatomy Identification": "AI",
    "Lesion Grading": "LG",
    "Disease Diagnosis": "DD",
}
OTHER = "Other Biological Attributes"  # the fifth of the publisher's tasks, which Omni-Fundus leaves out
FILES = {  # modality -> the question files that have questions about it, and how many, of all five tasks
    "Fundus Photography": {
        "ACRIMA": 159,
        "Adam Challenge": 87,
        "DRIMDB": 132,
        "DeepDRiD": 131,
        "Diabetic Retinopathy": 2051,
        "JSIEC": 220,
        "OLIVES": 593,
        "PALM2019": 510,
        "Yangxi": 1515,
    },
    OCT: {"OCT & X-Ray 2017": 630, "Retinal OCT-C8": 4016},
}
_TEXTS = ("question_id", "question_type", "question", "gt_answer", "image_path")


class OmniMedVQA:
    """The questions of `selection.modalities` (default: `MODALITIES`) in the tasks MR, AI, LG and DD.

    Images are looked up under `selection.images`, or else under `source`. `notes` says how many questions
    were taken and how many the rule left out, by task.
    """

    name = "omnimedvqa"
    published = "Omni-Fundus"

    def __init__(self, source: str | Path, selection: Selection | None = None) -> None:
        selection = selection or Selection()
        source = Path(source)
        self.images = Folder(Path(selection.images) if selection.images else source)
        wanted = selection.modalities or tuple(MODALITIES)
        items, left, counts = read(source, wanted, selection)
        published = {name: n for modality in wanted for name, n in FILES.get(modality, {}).items()}
        self.notes = (
            f"OmniMedVQA, {', '.join(wanted)}: {len(items)} questions, {counted(one.task for one in items)}; "
            f"by data set: {counted(one.part.split('-', 1)[1] for one in items)}",
            f"left out by the rule: {', '.join(f'{name} {n}' for name, n in sorted(left.items())) or 'none'}",
        )
        chosen = complete.choose(
            items,
            selection,
            "OmniMedVQA",
            there=self.images.__contains__,
            size=self.image_size,
            where=str(self.images.root),
            gaps=complete.file_gaps(
                {name: (counts[name], n) if name in counts else None for name, n in published.items()}
            ),
        )
        self.items, self.missing, self.partial = chosen.items, chosen.missing, chosen.partial

    def load_image(self, image: str) -> Image.Image:
        """The picture of an image_path."""
        return self.images.load_image(image)

    def image_size(self, image: str) -> Size:
        """Its size, from the file's head."""
        return self.images.image_size(image)


def read(
    source: Path, modalities: tuple[str, ...], selection: Selection
) -> tuple[list[Item], Counter[str], dict[str, int]]:
    """The items of the question files of `source`; how many questions were left out, by the reason; and file
    -> how many questions it has about these modalities, of all tasks.

    Raises:
        DataError: no question file; a question that is not in the publisher's form, by file and number.
        ConfigError: no question has one of the modalities.
    """
    files = sorted((source / FOLDER).glob("*.json"))
    if not files:
        raise DataError(f"{source} has no {FOLDER}/*.json: give OmniMedVQA's folder, which holds both")
    items, left, counts = [], Counter[str](), {}
    for path in files:
        counts[path.stem] = 0
        for number, question in enumerate(_questions(path)):
            where = f"{path.name}[{number}]"
            if not isinstance(question, dict):
                raise DataError(f"{where}: holds a {type(question).__name__}, not a question")
            # one of the publisher's questions has its modality under another name
            modality = question.get("modality_type", question.get("modality"))
            if modality not in modalities:
                left[f"modality {modality}"] += 1
                continue
            counts[path.stem] += 1
            if question.get("question_type") == OTHER:
                left[OTHER] += 1
            else:
                items.append(_item(question, str(modality), path.stem, where, selection))
    if not items:
        seen = ", ".join(sorted(name.removeprefix("modality ") for name in left if name != OTHER))
        raise ConfigError(f"no question has a modality in {modalities}: there are {seen}")
    return items, left, counts


def _questions(path: Path) -> list[Any]:
    try:
        questions = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(questions, list):
        raise DataError(f"{path}: holds a {type(questions).__name__}, not a list of questions")
    return questions


def _item(question: dict[str, Any], modality: str, name: str, where: str, selection: Selection) -> Item:
    texts: dict[str, Any] = {field: question.get(field) for field in _TEXTS}
    wrong = [field for field, text in texts.items() if not isinstance(text, str) or not text.strip()]
    if wrong:
        raise DataError(f"{where}: {', '.join(wrong)} is missing, empty or no text")
    if texts["question_type"] not in TASKS:
        known = ", ".join((*TASKS, OTHER))
        raise DataError(f"{where}: question_type is {texts['question_type']!r}; known are {known}")
    options = _options(question, where)
    if options.count(texts["gt_answer"]) != 1:
        raise DataError(f"{where}: gt_answer {texts['gt_answer']!r} is not one of the options {options!r}")
    task = TASKS[texts["question_type"]]
    return Item(
        id=f"{name}:{texts['question_id']}",
        images=(texts["image_path"],),
        messages=turn(choice_prompt(texts["question"], options), selection),
        options=options,
        answers=(texts["gt_answer"],),
        level="",
        task=task,
        part=f"{task}-{name}",
        modality=MODALITIES.get(modality, modality),
        unit=texts["image_path"],
        lettered=True,
        think=selection.think,
    )


def _options(question: dict[str, Any], where: str) -> tuple[str, ...]:
    """option_A to option_D; the last ones may be missing, or be null."""
    found = [question.get(f"option_{letter}") for letter in "ABCD"]
    while found and found[-1] is None:
        found.pop()
    if len(found) < 2 or any(not isinstance(text, str) or not text.strip() for text in found):
        raise DataError(f"{where}: options are {found!r}; two to four texts without a gap are needed")
    return tuple(str(text) for text in found)
