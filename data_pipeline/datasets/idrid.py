"""IDRiD: 516 colour fundus photographs graded for diabetic retinopathy, and 81 with lesion masks.

Layout and label codes: Porwal et al. 2018 (IEEE DataPort, CC BY 4.0). Parts A (segmentation) and B (disease
grading) are listed as samples of their own, "A/IDRiD_01" and "B/IDRiD_001"; part B counts from 001 in its
training and again in its test half.

The parts share photographs and persons, and so do the halves; no table of the publisher says which. So
`samples` looks: at thumbnails (`twins`), and at the comment inside part B's JPEG files, which numbers a visit
("010119991" is the first of 1 January 1999); files of one number show the right and left eye of one person.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_pipeline import images
from data_pipeline.datasets import twins
from data_pipeline.datasets.base import Sample, by_stem, require_files, subfolder
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

GRADES = ("No DR", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")  # ICDR 0 to 4
DISEASES = ("Normal", *GRADES[1:])
DME_RISKS = ("none", "exudates away from the fovea", "exudates within one disc diameter")  # codes 0 to 2
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
    tables = [
        p for p in subfolder(root, "2.").iterdir() if p.suffix.lower() == ".csv" and p.name.startswith(half)
    ]
    if len(tables) != 1:
        raise DataError(
            f"{root}: {len(tables)} label tables whose name begins with '{half}'; one is expected"
        )
    rows = _table(tables[0])
    require_files(pictures, list(rows), folder)
    if unlabelled := sorted(set(pictures) - {name.lower() for name in rows}):
        raise DataError(f"{tables[0]}: {len(unlabelled)} images have no row: {', '.join(unlabelled)}")
    return [_sample("B", pictures[name.lower()], split, labels=labels) for name, labels in rows.items()]


def _sample(part: str, path: Path, split: str, **more) -> Sample:
    patient = f"{part}/{split}/{path.stem}"  # the publisher says nothing of patients: every image its own
    return Sample(key=f"{part}/{path.stem}", image=path, split=split, patient=patient, modality="CFP", **more)


def _table(path: Path) -> dict[str, dict[str, str]]:
    """Image name -> labels. The header has a trailing space, and nine columns without a name in one file."""
    lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    header = [name.strip() for name in next(lines, [])]
    wanted = ("Image name", "Retinopathy grade", "Risk of macular edema")
    if lost := [name for name in wanted if name not in header]:
        raise DataError(f"{path}: columns {lost} are missing; the header is {header}")
    places = [header.index(name) for name in wanted]
    rows: dict[str, dict[str, str]] = {}
    bad: list[str] = []
    for number, line in enumerate(lines, 2):
        if not any(cell.strip() for cell in line):
            continue
        name, grade, risk = (line[at].strip() if at < len(line) else "" for at in places)
        if grade not in ("0", "1", "2", "3", "4") or risk not in ("0", "1", "2") or not name or name in rows:
            bad.append(f"line {number} ({name or 'no name'}, grade {grade!r}, risk {risk!r})")
            continue
        g, r = int(grade), int(risk)
        rows[name] = {"disease": DISEASES[g], "dr_grade": GRADES[g], "dme_risk": DME_RISKS[r]}
    if bad:
        raise DataError(f"{path}: grades are 0-4, risks 0-2, names occur once; not so in {', '.join(bad)}")
    return rows


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
        labels = sample.labels
        if not labels and len(grades.get(picture, ())) == 1:
            grade = GRADES.index(next(iter(grades[picture])))
            labels = {"disease": DISEASES[grade], "dr_grade": GRADES[grade]}
        paired.append(replace(sample, patient=found[person].patient, labels=labels))
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
