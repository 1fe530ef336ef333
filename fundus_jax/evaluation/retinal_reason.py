"""Reads MM-Retinal-Reason: single-choice, multiple-choice and open questions, the last with a clinical story.

MM-Retinal-Reason (Wu et al. 2025, OphthaReason) is JSON lists of items with `image`, `conversations` (a
human turn and the answer), `reason`, and for complex reasoning `pmcid`, `title` and `caption`. The files
released on the hub (complex_reasoning.json, basic_reasoning.json) hold their images in base64; the
publisher's eval.py reads others (single_choice_test_data_CFP.json, ...) whose images are cells of a CSV of
the same name. The complaint and history of a complex item are a part of its human turn, and so of the
prompt. Its `caption` and `reason` tell the answer, and are never shown.

What eval.py and the dataset's card show is read so. A reading of ours: how options stand in the text of a
question, and that an answer of letters belongs to them. docs/evaluation.md lists both. Neighbour:
benchmarks.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from fundus_jax import dialog
from fundus_jax.data import Size
from fundus_jax.evaluation import complete, wide
from fundus_jax.evaluation.extract import answer_text
from fundus_jax.evaluation.items import Item, Selection, counted, turn
from fundus_jax.evaluation.pictures import Folder
from fundus_jax.records import DataError

SINGLE, MULTI, COMPLEX = "single_choice", "multi_choice", "complex"
FILES = {  # name without .json -> task (None: by the answer), modality
    "single_choice_test_data_CFP": (SINGLE, "CFP"),
    "single_choice_test_data_FFA": (SINGLE, "FFA"),
    "single_choice_test_data_OCT": (SINGLE, "OCT"),
    "multi_choice_test_data_CFP": (MULTI, "CFP"),
    "complex_reason": (COMPLEX, "mixed"),
    "complex_reasoning": (COMPLEX, "mixed"),
    "basic_reasoning": (None, "mixed"),
}
ASKED = {  # how the answer is to be written
    SINGLE: "Exactly one option is right: answer with its letter.",
    MULTI: "Several options may be right: answer with the letters of all of them, separated by commas.",
    COMPLEX: "Answer with the name of the disease or structure alone.",
}
_INLINE = 512  # an `image` that is longer is base64, not the name of one
_MARK = re.compile(r"(?:^|(?<=[\s,;:.?)]))\(?([A-Z])[.):]\s+")
_LETTERS_ONLY = re.compile(r"[A-Z](?:\s?,\s?[A-Z])*")
_PLACEHOLDER = re.compile(r"<image>\n?")


class RetinalReason:
    """The questions of every file of `FILES` that lies in `source`.

    Images that are neither base64 nor in FILE.csv are looked up under `selection.images`, or else under
    `source`.
    """

    name = "retinal_reason"
    published = ""

    def __init__(self, source: str | Path, selection: Selection | None = None) -> None:
        selection = selection or Selection()
        source = Path(source)
        self.images = Folder(Path(selection.images) if selection.images else source)
        self._inline: dict[str, str] = {}  # image key -> base64
        files = [name for name in FILES if (source / f"{name}.json").is_file()]
        if not files:
            raise DataError(
                f"{source} has none of {', '.join(FILES)} (.json): give MM-Retinal-Reason's folder"
            )
        items = [item for name in files for item in self._read(source / f"{name}.json", selection)]
        chosen = complete.choose(
            items,
            selection,
            "MM-Retinal-Reason",
            there=lambda key: key in self._inline or key in self.images,
            size=self.image_size,
            where=f"{self.images.root} or in a CSV",
        )
        self.items, self.missing, self.partial = chosen.items, chosen.missing, chosen.partial
        tasks = counted(item.task for item in items)
        self.notes = (f"MM-Retinal-Reason, {', '.join(files)}: {len(items)} questions, {tasks}",)

    def load_image(self, image: str) -> Image.Image:
        """The picture of an image key."""
        if image in self._inline:
            return wide.picture(self._inline[image], image)
        return self.images.load_image(image)

    def image_size(self, image: str) -> Size:
        """Its size."""
        if image in self._inline:
            return wide.picture_size(self._inline[image], image)
        return self.images.image_size(image)

    def _read(self, path: Path, selection: Selection) -> list[Item]:
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}") from error
        if not isinstance(records, list):
            raise DataError(f"{path}: holds a {type(records).__name__}, not a list of items")
        table = path.with_suffix(".csv")
        if table.is_file():
            self._inline |= _cells(table)
        items = []
        for number, record in enumerate(records):
            where = f"{path.name}[{number}]"
            question, answer = _conversation(record, where)
            images = self._images(record.get("image"), where)
            items.append(_item(path.stem, number, record, question, answer, images, selection))
        return items

    def _images(self, given: Any, where: str) -> tuple[str, ...]:
        """The keys of an item's images; those in base64 are kept."""
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
            raise DataError(f"{where}: image is no text and no list of texts")
        keys = []
        for k, text in enumerate(texts):
            key = text
            if len(text) > _INLINE:
                key = f"{where}#{k}"
                self._inline[key] = text
            keys.append(key)
        return tuple(keys)


def _cells(path: Path) -> dict[str, str]:
    """Image key -> base64 of a CSV whose first column is the key."""
    found: dict[str, str] = {}
    column = 0
    for number, (_, cells) in enumerate(wide.rows(path, ",")):
        if number == 0:
            if "base64" not in cells[1:]:
                raise DataError(f"{path}: no column base64; there are {', '.join(cells)[:200]}")
            column = cells.index("base64")
        elif cells[0] in found:
            raise DataError(f"{path}, row {number}: {cells[0]} is there twice")
        else:
            found[cells[0]] = cells[column]
    return found


def _conversation(record: Any, where: str) -> tuple[str, str]:
    """The human turn without image placeholders, and the answer of the turn that follows."""
    try:
        (human, question), (gpt, answer) = ((one["from"], one["value"]) for one in record["conversations"])
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{where}: conversations are not a human and a gpt turn: {error!r}") from error
    if (human, gpt) != ("human", "gpt") or not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"{where}: conversations are from {human!r} and {gpt!r}, not from human and gpt")
    question, answer = _PLACEHOLDER.sub("", question).strip(), answer_text(answer).strip()
    if not question or not answer:
        raise DataError(f"{where}: the question or the answer is empty")
    return question, answer


def _item(
    name: str,
    number: int,
    record: dict[str, Any],
    question: str,
    answer: str,
    images: tuple[str, ...],
    selection: Selection,
) -> Item:
    where = f"{name}.json[{number}]"
    task, modality = FILES[name]
    letters = tuple(re.findall("[A-Z]", answer)) if _LETTERS_ONLY.fullmatch(answer) else ()
    options = () if task == COMPLEX else listed_options(question)
    if task is None:
        task = COMPLEX if not letters or not options else MULTI if len(letters) > 1 else SINGLE
    if task == COMPLEX:
        options, answers = (), (answer,)
    else:
        table = dialog.lettered(options)
        answers = tuple(table.get(letter, "") for letter in letters)
        if not answers or not all(answers) or (task == SINGLE and len(answers) > 1):
            raise DataError(f"{where}: answer {answer!r} names none, or too many, of the options {options!r}")
    text = f"{question}\n{ASKED[task]}"
    return Item(
        id=f"{name}:{number}",
        images=images,
        messages=turn(text, selection, len(images)),
        options=options,
        answers=answers,
        level="",
        task=task,
        part=f"{task}-{modality}",
        modality=modality,
        unit=str(record.get("pmcid") or images[0]),
        lettered=bool(options),
        multiple=task == MULTI,
        think=selection.think,
    )


def listed_options(question: str) -> tuple[str, ...]:
    """The options that a question lists as "A. text", "A) text", "(A) text" or "A: text", on lines of their
    own or in a row: the last run of letters that begins with A; () where fewer than two are listed. Linear
    time."""
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(question):
        if mark.group(1) == "A":
            marks = [mark]
        elif marks and mark.group(1) == chr(ord("A") + len(marks)):
            marks.append(mark)
    if len(marks) < 2:
        return ()
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    texts = [question[m.end() : end].strip(" \t\r\n,;") for m, end in zip(marks, ends, strict=True)]
    return tuple(texts) if all(texts) else ()
