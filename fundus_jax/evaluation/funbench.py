"""Reads FunBench's own tree of question files, with the images under a folder of the user's.

FunBench (Wei, Qian, Li, MICCAI 2025; CC BY-NC-SA 4.0) is levels > tasks > files of questions keyed by image
path; its images stay with their publishers, so some of the user's may be missing or be spelt in another case.
Prompts are its "E-mode3" (image and question); "E-mode2" describes the image in words and is for text-only
models. Its metric is in scores.py. Neighbour: benchmarks.py, the table.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from fundus_jax import dialog
from fundus_jax.data import open_image
from fundus_jax.evaluation.items import Item, Selection
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
_SHOWN = 5


class FunBench:
    """FunBench's questions.

    Images are looked up under `selection.images` with upper and lower case ignored. Without that folder only
    the questions can be listed; an image that is missing is an error unless `selection.allow_partial`, and
    then its items are left out and its key stands in `missing`.
    """

    name = "funbench"

    def __init__(self, source: str | Path, selection: Selection | None = None) -> None:
        selection = selection or Selection()
        self.images = Path(selection.images) if selection.images else None
        items = selection.choose(read_tree(Path(source), selection))
        self.missing = self._find_missing(items)
        if self.missing and not selection.allow_partial:
            asked = len({item.image for item in items})
            first = ", ".join(self.missing[:_SHOWN]) + (", ..." if len(self.missing) > _SHOWN else "")
            raise DataError(
                f"{len(self.missing)} of {asked} images are not under {self.images}: {first}; add them or "
                "allow a partial benchmark (allow_partial), whose scores cannot be compared with FunBench's"
            )
        gone = set(self.missing)
        self.items = tuple(item for item in items if item.image not in gone)
        if not self.items:
            raise ConfigError(f"none of FunBench's images is under {self.images}: check the folder of images")

    def _find_missing(self, items: tuple[Item, ...]) -> tuple[str, ...]:
        if self.images is None:
            return ()
        keys = dict.fromkeys(item.image for item in items)
        return tuple(key for key in keys if find_file(self.images, key) is None)

    def load_image(self, image: str) -> Image.Image:
        """The picture of an image key."""
        if self.images is None:
            raise ConfigError("FunBench does not bring its images: name the folder they lie in (images)")
        path = find_file(self.images, image)
        if path is None:
            raise DataError(f"{image} is not under {self.images}")
        return open_image(path.read_bytes(), str(path))


def read_tree(source: Path, selection: Selection) -> list[Item]:
    """All items of the tree at `source` (the folder that holds L1-..., L2-...), by level, task and file.

    Raises:
        DataError: no question file; a file that is not in FunBench's form.
    """
    files = sorted(
        path for depth in ("L?-*/*.json", "L?-*/*/*.json") for path in source.glob(depth) if path.is_file()
    )
    if not files:
        raise DataError(f"{source} has no L?-*/*.json: give FunBench's folder, which holds L1-... to L4-...")
    return [item for path in files for item in read_file(path, source, selection)]


def read_file(path: Path, source: Path, selection: Selection) -> list[Item]:
    """The items of one question file.

    Raises:
        DataError: naming file and image.
    """
    level, task = path.relative_to(source).parts[:2]
    try:
        questions = json.loads(path.read_text(encoding="utf-8"))["data"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: not a FunBench file with an object "data": {error}') from error
    return [
        _item(key, question, level.split("-")[0], task.removesuffix(".json"), path.stem, selection)
        for key, question in questions
    ]


def _item(key: str, question: Any, level: str, task: str, part: str, selection: Selection) -> Item:
    where = f"{part}: {key}"
    try:
        raw, prompt, marked = question["raw_data"], question["E-mode3"], question["gt"].split(",")
        options, gold = tuple(raw["options"]), raw["gt"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: not a question with E-mode3, gt, raw_data.options and .gt: {error!r}"
        ) from error
    multiple = isinstance(gold, list)
    answers = tuple(gold) if multiple else (gold,)
    table = dialog.lettered(options)
    if [table.get(letter.strip()) for letter in marked] != list(answers):
        raise DataError(f"{where}: gt {question['gt']!r} does not name {answers!r} among {options!r}")
    if selection.instruct:
        prompt += "\n" + (dialog.THINK_INSTRUCTION if selection.think else dialog.ANSWER_INSTRUCTION)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return Item(
        id=f"{part}:{key}",
        image=key,
        messages=({"role": "user", "content": content},),
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


def find_file(root: Path, key: str) -> Path | None:
    """The file `key` under `root`, exactly spelt or else with case ignored; None if there is none.

    Raises:
        DataError: a key that leads out of `root`.
    """
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\\" in key:
        raise DataError(f"image key {key!r} leads out of its folder")
    path = root.joinpath(*parts)
    if path.is_file():
        return path
    folder = root
    for part in parts:
        name = _names(folder).get(part.lower())
        if name is None:
            return None
        folder = folder / name
    return folder if folder.is_file() else None


@functools.lru_cache(maxsize=4096)
def _names(folder: Path) -> dict[str, str]:
    """Lower-case name -> name of everything in a folder; of two that differ in case only, the first."""
    if not folder.is_dir():
        return {}
    return {path.name.lower(): path.name for path in sorted(folder.iterdir(), reverse=True)}
