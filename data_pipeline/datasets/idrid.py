"""IDRiD: 516 colour fundus photographs graded for diabetic retinopathy, and 81 with lesion masks.

Layout and label codes: Porwal et al. 2018 (IEEE DataPort, CC BY 4.0). Parts A (segmentation) and B (disease
grading) are listed as samples of their own, "A/IDRiD_01" and "B/IDRiD_001"; part B counts from 001 in its
training and again in its test half.

The parts share photographs and persons, and so do the halves; no table of the publisher says which. So
`samples` looks: at thumbnails (`twins`), and at the comment inside part B's JPEG files, which numbers a visit
("010119991" is the first of 1 January 1999); files of one number show the right and left eye of one person.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_pipeline import images
from data_pipeline.datasets import labels, layout, tables, twins
from data_pipeline.datasets.base import Sample, by_stem, subfolder
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

DISEASES = labels.DR_DISEASES
DME_RISKS = {str(code): risk for code, risk in enumerate(labels.DME_RISKS)}
LESIONS = {  # code at the end of a mask's name -> start of its folder, canonical finding
    "MA": ("1.", "microaneurysm"),
    "HE": ("2.", "haemorrhage"),
    "EX": ("3.", "hard exudate"),
    "SE": ("4.", "cotton-wool spot"),
}  # "5. Optic Disc" is anatomy
HALVES = {"train": "a.", "test": "b."}
COUNTS = {("A", "train"): 54, ("A", "test"): 27, ("B", "train"): 413, ("B", "test"): 103}
IMAGES, MASKS = (".jpg", ".jpeg"), (".tif", ".tiff")

# Correlation of two thumbnails. Measured on the whole set: one picture under two names >= 0.99986, another
# photograph of the same eye 0.9968 and 0.9972, two different eyes <= 0.9953.
SAME_PICTURE, SAME_EYE = 0.9994, 0.9962


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List IDRiD.

    Args:
      source: the folder with "A. Segmentation" and "B. Disease Grading", or with one of them.
      partial: accept another number of images than the publisher's.

    Returns:
      Part A with `masks`, and with the grade of the same picture in part B where there is one and B does
      not contradict itself; part B with `labels` disease, dr_grade and dme_risk. Photographs of one eye, or
      of one visit, have the same `patient`. The publisher gives no eye.

    Raises:
      DataError: naming all missing files, all bad rows of a table, or the count that is wrong.
    """
    readers = {"A": _segmentation, "B": _grading}
    inside = [path.name for path in source.iterdir()] if source.is_dir() else []
    parts = [part for part in sorted(readers) if any(name.startswith(f"{part}. ") for name in inside)]
    if not parts:
        raise DataError(
            f"{source}: neither 'A. Segmentation' nor 'B. Disease Grading' is here; check --source"
        )
    found: list[Sample] = []
    for part in parts:
        for split, half in HALVES.items():
            here = readers[part](subfolder(source, f"{part}. "), split, half)
            if len(here) != COUNTS[part, split] and not partial:
                raise DataError(
                    f"{source}: part {part} has {len(here)} {split} images, published are "
                    f"{COUNTS[part, split]}; get the archive again, or say that the copy is partial"
                )
            found += here
    return _paired(found)


def _segmentation(root: Path, split: str, half: str) -> list[Sample]:
    pictures = by_stem(subfolder(subfolder(root, "1."), half), IMAGES)
    truths = subfolder(subfolder(root, "2."), half)
    masks: dict[str, dict[str, tuple[Path, ...]]] = {stem: {} for stem in pictures}
    strangers = []
    for code, (folder, finding) in LESIONS.items():
        files = by_stem(subfolder(truths, folder), MASKS)
        for stem in pictures:
            path = files.pop(f"{stem}_{code.lower()}", None)  # no file: the lesion is absent
            masks[stem][finding] = () if path is None else (path,)
        strangers += [path.name for path in files.values()]
    if strangers:
        raise DataError(f"{truths}: {len(strangers)} masks belong to no image: {', '.join(strangers)}")
    searched = tuple(finding for _, finding in LESIONS.values())
    found = sorted(pictures.items())
    return [_sample("A", path, split, searched=searched, masks=masks[stem]) for stem, path in found]


def _grading(root: Path, split: str, half: str) -> list[Sample]:
    folder = subfolder(subfolder(root, "1."), half)
    pictures = by_stem(folder, IMAGES)
    found = [
        p for p in subfolder(root, "2.").iterdir() if p.suffix.lower() == ".csv" and p.name.startswith(half)
    ]
    if len(found) != 1:
        raise DataError(f"{root}: {len(found)} label tables whose name begins with '{half}'; one is expected")
    columns = ("Image name", "Retinopathy grade", "Risk of macular edema")
    rows = tables.keyed(found[0], tables.read(found[0], columns), "Image name", _row)
    named = layout.joined(rows, pictures, table=found[0], folder=folder, partial=False)
    return [_sample("B", path, split, labels=graded) for _, graded, path in named]


def _sample(part: str, path: Path, split: str, **more) -> Sample:
    patient = f"{part}/{split}/{path.stem}"  # the publisher says nothing of patients: every image its own
    return Sample(key=f"{part}/{path.stem}", image=path, split=split, patient=patient, modality="CFP", **more)


def _row(row: tables.Row) -> dict[str, str]:
    grade = tables.code(row, "Retinopathy grade", labels.ICDR)
    return {**labels.dr(grade), "dme_risk": tables.code(row, "Risk of macular edema", DME_RISKS)}


def _paired(found: Sequence[Sample]) -> list[Sample]:
    """Give photographs of one person one patient, and part A the grade of the same picture in part B."""
    paths = [sample.image for sample in found if isinstance(sample.image, Path)]
    alike, visits = twins.similarity(paths), np.array([_visit(path) for path in paths])
    same_visit = (visits[:, None] == visits) & (visits != "")
    people, pictures = twins.groups((alike >= SAME_EYE) | same_visit), twins.groups(alike >= SAME_PICTURE)
    grades: dict[int, set[str]] = {}
    for sample, picture in zip(found, pictures, strict=True):
        if sample.labels:
            grades.setdefault(picture, set()).add(sample.labels["dr_grade"])
    paired = []
    for sample, person, picture in zip(found, people, pictures, strict=True):
        stated = sample.labels
        if not stated and len(grades.get(picture, ())) == 1:
            stated = labels.dr(labels.GRADES.index(next(iter(grades[picture]))))
        paired.append(replace(sample, patient=found[person].patient, labels=stated))
    _report(paired, [len(names) for names in grades.values()])
    return paired


def _visit(path: Path) -> str:
    """The number of the visit, or "": some comments only say that there is none."""
    text = images.comment(path)
    return text if sum(letter.isdigit() for letter in text) >= 6 else ""


def _report(paired: Sequence[Sample], grades: Sequence[int]) -> None:
    splits: dict[str, set[str]] = {}
    for sample in paired:
        splits.setdefault(sample.patient, set()).add(sample.split)
    logging.info(
        "IDRiD: %d images of at most %d patients; %d patients stand on both sides of the train/test line; "
        "%d pictures were graded twice, differently",
        len(paired), len(splits), sum(len(s) > 1 for s in splits.values()), sum(n > 1 for n in grades),
    )  # fmt: skip


class Idrid(SampleBuilder):
    """IDRiD as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get parts A and B of IDRiD from IEEE DataPort and unpack them here."
    samples = staticmethod(samples)
