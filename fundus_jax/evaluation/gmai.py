"""Reads GMAI-MMBench's table, and of it the questions about fundus images: GMAI-Fundus.

GMAI-MMBench (Ye et al., NeurIPS 2024) is published as a TSV with an image in base64 in every row
(GMAI-MMBench_VAL.tsv; the TEST files have no answers). It marks no row as a fundus image: the default takes
the modalities that the paper calls fundus images, and its five clinical tasks; docs/evaluation.md has what
is known of the paper's own choice. Neighbours: wide.py reads the rows, benchmarks.py is the table.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fundus_jax import dialog
from fundus_jax.data import Size
from fundus_jax.evaluation import complete, wide
from fundus_jax.evaluation.items import Item, Selection, choice_prompt, counted, turn
from fundus_jax.records import ConfigError, DataError

FILE = "GMAI-MMBench_VAL.tsv"
MD5 = "254bd581627866f1c499d3d6b4422324"  # of the published one, by VLMEvalKit
ROWS = 4550  # that it has
MODALITIES = {"fundus photography": "CFP", "oct": "OCT"}
TASKS = {
    "attribute recognition": "AR",
    "nervous tissue": "NT",
    "blood vessels recognition": "BVR",
    "disease diagnosis": "DD",
    "severity grading": "SG",
}
_LETTERS = dialog.LETTERS[:5]
_NEEDED = ("index", "image", "question", "A", "B", "answer", "clinical vqa task", "modality")
_REFERENCE = 64  # a shorter image cell names the row that has the image (VLMEvalKit's image_base.py)


class GmaiMMBench:
    """The questions of `selection.modalities` (default: fundus photographs and OCT) in the tasks AR, NT, BVR,
    DD and SG.

    `source` is the TSV, or the folder that holds GMAI-MMBench_VAL.tsv. An item's image is the byte at which
    its row begins. `notes` says how many questions were taken and how many the rule left out.

    Raises:
        DataError: rows that can not be used, the first of them by number.
    """

    name = "gmai"
    published = "GMAI-Fundus"

    def __init__(self, source: str | Path, selection: Selection | None = None) -> None:
        selection = selection or Selection()
        source = Path(source)
        self.path = source / FILE if source.is_dir() else source
        if not self.path.is_file():
            raise DataError(f"{self.path} is not there: give GMAI-MMBench's TSV, or the folder of {FILE}")
        wanted = {name.lower() for name in selection.modalities} or set(MODALITIES)
        table = _Table(self.path)
        self._place, self._width = table.columns["image"], len(table.columns)
        self._rows = {str(one.begin): one.where for one in table.own.values()}
        items, left = table.items(wanted, selection)
        self.notes = (
            f"GMAI-MMBench, {', '.join(sorted(wanted))}: {len(items)} of {table.rows} questions, "
            f"{counted(one.task for one in items)}; {counted(one.modality for one in items)}",
            f"left out by the rule: {', '.join(f'{name} {n}' for name, n in sorted(left.items())) or 'none'}",
        )
        with open(self.path, "rb") as file:
            known = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False))
        other = (
            f"{self.path.name} is not the published validation file: it has {table.rows} rows of {ROWS}, and "
            f"the md5 {known.hexdigest()}"
        )
        gaps = () if known.hexdigest() == MD5 else (other,)
        chosen = complete.choose(items, selection, "GMAI-MMBench", size=self.image_size, gaps=gaps)
        self.items, self.missing, self.partial = chosen.items, chosen.missing, chosen.partial

    def load_image(self, image: str) -> Image.Image:
        """The picture of the row that begins at byte `image`."""
        return wide.picture(*self._cell(image))

    def image_size(self, image: str) -> Size:
        """Its size."""
        return wide.picture_size(*self._cell(image))

    def _cell(self, image: str) -> tuple[str, str]:
        """The base64 of a picture, and where it stands, for messages."""
        cells = wide.row_at(self.path, "\t", int(image), self._width)
        return cells[self._place], f"{self.path}, {self._rows[image]}"


class _Own(NamedTuple):
    """An image of a row's own: the byte at which the row begins, the image's hash, and the row's name."""

    begin: int
    digest: str
    where: str


class _Table:
    """The rows of a TSV without their images: these stay in the file, at the byte where their row begins.

    Attributes:
        columns: name -> place. rows: how many there are. own: index -> its image, where the row has one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = wide.rows(path, "\t")
        self.columns = _columns(next(lines, (0, []))[1], path)
        self.own: dict[str, _Own] = {}
        self._texts: list[dict[str, str]] = []  # in "image": another row's index, or "" for its own
        seen: dict[str, int] = {}
        for number, (begin, cells) in enumerate(lines, start=1):
            row = {name: cells[place] for name, place in self.columns.items()}
            if seen.setdefault(row["index"], number) != number:
                first = seen[row["index"]]
                raise DataError(f"{path}, row {number}: has the index {row['index']} of row {first}")
            image, row["image"] = row["image"].strip(), ""
            if len(image) > _REFERENCE:
                digest = hashlib.sha256(image.encode()).hexdigest()[:16]
                self.own[row["index"]] = _Own(begin, digest, _where(number, row))
            else:
                row["image"] = image or "nothing"
            self._texts.append(row)
        self.rows = len(self._texts)

    def items(self, wanted: set[str], selection: Selection) -> tuple[list[Item], Counter[str]]:
        """The items of the rows that the rule takes, and what it left out, by reason.

        Raises:
            DataError: rows that can not be used, the first of them by number, counted from 1.
            ConfigError: no row has a wanted modality.
        """
        items, left, faults = [], Counter[str](), []
        for number, row in enumerate(self._texts, start=1):
            if row["modality"].strip().lower() not in wanted:
                left[f"modality {row['modality'].strip()}"] += 1
            elif row["clinical vqa task"].strip().lower() not in TASKS:
                left[row["clinical vqa task"].strip()] += 1
            else:
                try:
                    items.append(self._item(row, _where(number, row), selection))
                except DataError as error:
                    faults.append(str(error))
        if faults:
            raise DataError(f"{self.path}: {len(faults)} bad rows: {'; '.join(faults[: complete.SHOWN])}")
        if not items:
            raise ConfigError(f"{self.path}: no row has a modality in {sorted(wanted)}: {dict(left)}")
        return items, left

    def _item(self, row: dict[str, str], where: str, selection: Selection) -> Item:
        place = self.own.get(row["image"] or row["index"])
        if place is None:
            raise DataError(f"{where}: its image is {row['image']!r}, neither base64 nor another row's index")
        return _item(row, str(place.begin), place.digest, where, selection)


def _where(number: int, row: dict[str, str]) -> str:
    return f"row {number} (index {row['index']})"


def _columns(header: list[str], path: Path) -> dict[str, int]:
    """Column names -> their places; all but the option letters in lower case, as VLMEvalKit reads them."""
    columns = {name if name in dialog.LETTERS else name.strip().lower(): k for k, name in enumerate(header)}
    lacking = [name for name in _NEEDED if name not in columns]
    if lacking:
        raise DataError(f"{path}: no column {', '.join(lacking)}; there are {', '.join(header)[:200]}")
    return columns


def _item(row: dict[str, str], image: str, unit: str, where: str, selection: Selection) -> Item:
    options = tuple(row.get(letter, "") for letter in _LETTERS)
    options = options[: max((k + 1 for k, text in enumerate(options) if text.strip()), default=0)]
    if len(options) < 2 or not all(text.strip() for text in options):
        raise DataError(f"{where}: options are {options!r}; two to five without a gap are needed")
    answer = row["answer"].strip()
    if not answer:
        raise DataError(f"{where}: there is no answer: the TEST files have none, give {FILE}")
    if dialog.lettered(options).get(answer) is None:
        raise DataError(f"{where}: answer {answer!r} is the letter of none of {len(options)} options")
    if not row["question"].strip():
        raise DataError(f"{where}: the question is empty")
    modality = row["modality"].strip()
    task = TASKS[row["clinical vqa task"].strip().lower()]
    return Item(
        id=row["index"],
        images=(image,),
        messages=turn(choice_prompt(row["question"], options), selection),
        options=options,
        answers=(dialog.lettered(options)[answer],),
        level="",
        task=task,
        part=f"{task}-{row.get('original task', '') or 'all'}",
        modality=MODALITIES.get(modality.lower(), modality),
        unit=unit,
        lettered=True,
        think=selection.think,
    )
