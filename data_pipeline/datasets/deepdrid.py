"""DeepDRiD: 2000 regular and 256 ultra-widefield photographs, graded for diabetic retinopathy.

Layout and columns: github.com/deepdrdoc/DeepDRiD; the tables of training and validation were read there, the
columns of the evaluation tables (.xlsx) in loaders of others. A regular row has its grade in one of two
columns, one an eye; in 11 of 1200 the name says the other eye, and a wide-field patient has two left ones:
there the grade is kept and the eye is unknown. Grade 5 is ungradable and left out. Patients are numbered anew
for ultra-widefield; whether they are other persons is not said. The evaluation parts are never in "train":
FunBench and OmniMedVQA draw on them.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

DISEASES = labels.DR_DISEASES
CODES = {**labels.ICDR, "5": None}
EYES = {"l": "OS", "r": "OD"}
Graded = tuple[int | None, str]  # DR grade (None: ungradable), eye ("": unknown)
_LEVEL = re.compile(r"(UWF_)?DR_levels?", re.IGNORECASE)
REGULAR, WIDE = "regular_fundus_images", "ultra-widefield_images"
PARTS = {  # (kind, split) -> folder, table, images
    (REGULAR, "train"): ("regular-fundus-training", "regular-fundus-training.csv", 1200),
    (REGULAR, "val"): ("regular-fundus-validation", "regular-fundus-validation.csv", 400),
    (REGULAR, "test"): ("Online-Challenge1&2-Evaluation", "Challenge1_labels.xlsx", 400),
    (WIDE, "train"): ("ultra-widefield-training", "ultra-widefield-training.csv", 154),
    (WIDE, "val"): ("ultra-widefield-validation", "ultra-widefield-validation.csv", 50),
    (WIDE, "test"): ("Online-Challenge3-Evaluation", "Challenge3_labels.xlsx", 52),
}


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List DeepDRiD.

    Args:
      source: the folder with regular_fundus_images and ultra-widefield_images, or one above it.
      partial: accept a copy that lacks images.

    Raises DataError naming all bad rows, all missing files, or the counts that are wrong.
    """
    root = layout.root(source, REGULAR)
    found: list[Sample] = []
    counts: dict[str, int] = {}
    for (kind, split), (folder, name, _) in PARTS.items():
        home = layout.entry(layout.entry(root, kind), folder)
        table = layout.entry(home, name)
        rows = tables.keyed(table, *_read(table, kind, split))
        counts[folder] = len(rows)
        files = layout.deep_stems(layout.entry(home, "Images"))
        views = Counter(_eye(image) for image in rows)
        for image, (grade, eye), path in layout.joined(
            rows, files, table=table, folder=home, partial=partial
        ):
            alone = kind == REGULAR or views[_eye(image)] == 1
            if grade is not None:
                found.append(
                    Sample(
                        key=f"{'regular' if kind == REGULAR else 'ultra-widefield'}/{image}",
                        image=path,
                        split=split,
                        patient=f"{kind}/{image.partition('_')[0]}",
                        eye=eye if alone else "",
                        modality="CFP" if kind == REGULAR else "UWF",
                        labels=labels.dr(grade),
                    )
                )
    layout.require_counts(source, counts, {folder: n for folder, _, n in PARTS.values()}, partial=partial)
    return layout.reported("DeepDRiD", found)


def _read(table: Path, kind: str, split: str) -> tuple[list, str, Callable[[tables.Row], Graded]]:
    """Rows, key column, and what makes a grade and an eye of a row."""
    if split != "test" and kind == REGULAR:
        columns = ("left_eye_DR_Level", "right_eye_DR_Level")
        return tables.read(table, ("image_id", *columns)), "image_id", _own_eye
    rows = tables.read(table, ("image_id",))
    levels = [name for name in (rows[0][1] if rows else ()) if _LEVEL.fullmatch(name)]
    if len(levels) != 1:
        raise DataError(f"{table}: no rows, or not one column named DR_Levels or UWF_DR_Levels")

    def grade(row: tables.Row) -> Graded:
        return tables.code(row, levels[0], CODES), EYES[_eye(row["image_id"])[-1]]

    return rows, "image_id", grade


def _own_eye(row: tables.Row) -> Graded:
    graded = [side for side in ("left", "right") if row[f"{side}_eye_DR_Level"]]
    if len(graded) != 1:
        raise DataError(f"grades of {' and '.join(graded) or 'no'} eye; one is expected")
    named = _eye(row["image_id"])[-1]
    grade = tables.code(row, f"{graded[0]}_eye_DR_Level", CODES)
    return grade, EYES[named] if graded[0].startswith(named) else ""


def _eye(image: str) -> str:
    """The eye that a name such as 265_l1 says: 265_l."""
    number, _, view = image.partition("_")
    if not number.isdecimal() or view[:1] not in EYES:
        raise DataError("image_id is not NUMBER_l... or NUMBER_r...")
    return f"{number}_{view[0]}"


class Deepdrid(SampleBuilder):
    """DeepDRiD as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Clone github.com/deepdrdoc/DeepDRiD here."
    samples = staticmethod(samples)
