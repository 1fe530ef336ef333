"""Reads FunBench's own tree of question files, with the images under a folder of the user's.

FunBench (Wei, Qian, Li, MICCAI 2025; CC BY-NC-SA 4.0) is levels > tasks > files of questions keyed by image
path; its images stay with their publishers, so some of the user's may be missing or be spelt in another case.
Prompts are its "E-mode3" (image and question), or its "E-mode2", which also describes the image in words and
exists for some questions only. Its metric is in scores.py, its parser in funbench_parser.py, the preparation
of photographs in crop.py. Neighbour: benchmarks.py, the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from fundus_jax import dialog
from fundus_jax.data import Size, open_image
from fundus_jax.evaluation import complete, crop
from fundus_jax.evaluation.items import Item, Selection, counted, turn
from fundus_jax.evaluation.pictures import Folder
from fundus_jax.records import ConfigError, DataError

# Beginning of an image key -> modality; the first row that fits counts.
MODALITY_OF = {
    "DeepDRiD/ultra": "UWF",
    "DeepDRiD/": "CFP",
    "MMC-AMD/ImageData/oct": "OCT",
    "MMC-AMD/ImageData/cfp": "CFP",
    "TOP/": "UWF",
    **dict.fromkeys(("DDR/", "IDRiD/", "JSIEC/", "OIA-ODIR/", "Retinal-Lesions/", "RFMiD/"), "CFP"),
    **dict.fromkeys(("NEH", "OCTDL", "OCTID", "RETOUCH", "UCSD"), "OCT"),
}
_LESIONS = (
    "Fibrous_proliferation",
    "Haemorrhage",
    "Hard_exudate",
    "Intraretinal_Fluid",
    "Intraretinal_hemorrhage",
    "Microaneurysm",
    "Neovascularization",
    "Pigment_Epithelial_Detachment",
    "Preretinal_hemorrhage",
    "Soft_exudate",
    "Subretinal_Fluid",
    "Vitreous_hemorrhage",
)
_COUNTED = ("Haemorrhage", "Intraretinal_hemorrhage", "Microaneurysm", "Soft_exudate")
_LESION_TASKS = {
    "L3a-lesion_recognition": _LESIONS,
    "L3b-lesion_localization": _LESIONS,
    "L3c-lesion_size_estimation": tuple(name for name in _LESIONS if name != "Microaneurysm"),
    "L3d-lesion_counting": _COUNTED,
}
FILES = (
    "L1-modality_perception/L1a-coarse_modality_perception.json",
    "L1-modality_perception/L1b-fine_modality_perception.json",
    "L2-anatomy_perception/L2a-od_fovea_positioning.json",
    "L2-anatomy_perception/L2b-laterality.json",
    *(
        f"L3-lesion_analysis/{task}/{task[:3]}{number}{task[3:]}-{lesion}.json"
        for task, lesions in _LESION_TASKS.items()
        for number, lesion in enumerate(lesions)
    ),
    "L4-disease_diagnosis/L4a-binary_condition_diagnosis.json",
    "L4-disease_diagnosis/L4b-multi_condition_diagnosis.json",
    "L4-disease_diagnosis/L4c-dr_grading.json",
    "L4-disease_diagnosis/L4d-amd_categorization.json",
)
EMODES = (2, 3)
_TOLD = "number of images"  # of which each has one question in a file


class FunBench:
    """FunBench's questions.

    Images are looked up under `selection.images` with upper and lower case ignored. Without that folder only
    the questions can be listed. An image or a question file that is missing is an error unless
    `selection.allow_partial` (complete.py).
    """

    name = "funbench"
    published = "FunBench"

    def __init__(self, source: str | Path, selection: Selection | None = None) -> None:
        selection = selection or Selection()
        if selection.emode not in EMODES:
            raise ConfigError(f"emode is {selection.emode}: FunBench has prompts for 2 and 3")
        source = Path(source)
        self.images = Folder(Path(selection.images)) if selection.images else None
        self.side = selection.side
        self.cuts = crop.read_cuts(Path(selection.preprocess)) if selection.preprocess else None
        items, mute, counts = read_tree(source, selection)
        wanted = [file for file in FILES if not selection.tasks or _place(file)[1] in selection.tasks]
        chosen = complete.choose(
            items,
            selection,
            "FunBench",
            there=self.images.__contains__ if self.images else None,
            size=self.image_size if self.images else None,
            where=selection.images,
            gaps=complete.file_gaps({file: counts.get(file) for file in wanted}),
        )
        self.items, self.missing, self.partial = chosen.items, chosen.missing, chosen.partial
        self.notes = (
            f"FunBench, E-mode{selection.emode}: {len(items)} questions, {counted(i.task for i in items)}",
            *([f"{mute} questions have no E-mode2 prompt and are not asked"] if mute else []),
            "images: "
            + (f"prepared by {selection.preprocess}" if selection.preprocess else "taken as they are")
            + (f", resized to {self.side} x {self.side}" if self.side else ""),
        )

    def load_image(self, image: str) -> Image.Image:
        """The picture of an image key, prepared and resized where that was asked for."""
        picture = self._folder().load_image(image)
        if self.cuts is not None:
            picture = crop.prepare(picture, image, self.cuts)
        if not self.side:
            return picture
        return picture.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)

    def image_size(self, image: str) -> Size:
        """The size of that picture: the side, the cut's diameter, or what the file's head says."""
        path = self._folder().path(image)
        with open_image(path, str(path)) as picture:
            size = Size(*picture.size) if self.cuts is None else crop.size_of(picture, image, self.cuts)
        return Size(self.side, self.side) if self.side else size

    def _folder(self) -> Folder:
        if self.images is None:
            raise ConfigError("FunBench does not bring its images: name the folder they lie in (images)")
        return self.images


def read_tree(source: Path, selection: Selection) -> tuple[list[Item], int, dict[str, tuple[int, int]]]:
    """All items of the tree at `source` (the folder that holds L1-..., L2-...), by level, task and file; how
    many questions have no prompt in the selected mode; and file -> how many questions it has, and how many it
    says it has.

    Raises:
        DataError: no question file; one that FunBench does not have; one that is not in its form.
    """
    files = sorted(
        path.relative_to(source).as_posix()
        for depth in ("L?-*/*.json", "L?-*/*/*.json")
        for path in source.glob(depth)
        if path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise DataError(f"{source} has no L?-*/*.json: give FunBench's folder, which holds L1-... to L4-...")
    strange = [file for file in files if file not in FILES]
    if strange:
        raise DataError(f"{source} has files that FunBench has not: {complete.listed(strange)}; remove them")
    read: list[Item | None] = []
    counts = {}
    for file in files:
        found, told = read_file(source / file, source, selection)
        read += found
        counts[file] = len(found), told
    items = [item for item in read if item is not None]
    return items, len(read) - len(items), counts


def read_file(path: Path, source: Path, selection: Selection) -> tuple[list[Item | None], int]:
    """The items of one question file, None for a question without a prompt in the selected mode; and how many
    questions the file says it has.

    Raises:
        DataError: naming file and image.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        questions, told = pairs["data"].items(), int(pairs["info"][_TOLD])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path}: not a FunBench file with an object "data" and {_TOLD!r} in "info": {error}'
        ) from error
    level, task = _place(path.relative_to(source).as_posix())
    return [_item(key, question, level, task, path.stem, selection) for key, question in questions], told


def _place(file: str) -> tuple[str, str]:
    """Level and task of a question file: "L3-x/L3a-y/L3a0-y-z.json" -> ("L3", "L3a-y")."""
    level, task = file.split("/")[:2]
    return level.split("-")[0], task.removesuffix(".json")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _item(key: str, question: Any, level: str, task: str, part: str, selection: Selection) -> Item | None:
    where = f"{part}: {key}"
    try:
        raw, prompt = question["raw_data"], question[f"E-mode{selection.emode}"]
        marked, options, gold = question["gt"].split(","), tuple(raw["options"]), raw["gt"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: not a question with E-mode{selection.emode}, gt, raw_data.options and .gt: {error!r}"
        ) from error
    multiple = isinstance(gold, list)
    answers = tuple(gold) if multiple else (gold,)
    table = dialog.lettered(options)
    if [table.get(letter.strip()) for letter in marked] != list(answers):
        raise DataError(f"{where}: gt {question['gt']!r} does not name {answers!r} among {options!r}")
    if prompt is None and selection.emode == 2:
        return None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: E-mode{selection.emode} is {prompt!r}, not a prompt")
    return Item(
        id=f"{part}:{key}",
        images=(key,),
        messages=turn(prompt, selection),
        options=options,
        answers=answers,
        level=level,
        task=task,
        part=part,
        modality=modality_of(key),
        unit=key,
        lettered=True,
        multiple=multiple,
        think=selection.think,
    )


def modality_of(key: str) -> str:
    """CFP, OCT or UWF of an image key, by `MODALITY_OF`; upper and lower case do not matter.

    Raises:
        DataError: a data set that the table lacks.
    """
    for beginning, modality in MODALITY_OF.items():
        if key.lower().startswith(beginning.lower()):
            return modality
    raise DataError(f"{key}: no modality is known for this data set; add a row to MODALITY_OF")
