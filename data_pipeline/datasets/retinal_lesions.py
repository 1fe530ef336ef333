"""Retinal-Lesions: 1593 colour fundus photographs with masks of eight lesions and grades of retinopathy.

Layout after Wei et al. 2020 (github.com/WeiQijie/retinal-lesions) and loaders of others; the archive comes on
request and was not checked. Grades are the publisher's, not Kaggle's. No file is no lesion; in a mask 255 is
the lesion, and 127 an annotation that the publisher excluded from use: where a mask holds nothing else, the
lesion is neither there nor absent. Names are those of EyePACS (Kaggle): the two eyes of a person share a
number, and other sets drawn from there share images. No split is published: patients are split by a hash.
FunBench draws on this set, and OmniMedVQA on EyePACS: see `heldout`.
"""

import re
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample, by_stem
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

DISEASES = labels.DR_DISEASES
LESIONS = {
    "microaneurysm": "microaneurysm",
    "retinal_hemorrhage": "haemorrhage",
    "hard_exudate": "hard exudate",
    "cotton_wool_spots": "cotton-wool spot",
    "vitreous_hemorrhage": "vitreous haemorrhage",
    "preretinal_hemorrhage": "preretinal haemorrhage",
    "neovascularization": "neovascularisation",
    "fibrous_proliferation": "fibrous proliferation",
}
GRADES: dict[str, int] = dict(zip(labels.GRADES, (166, 337, 929, 99, 62), strict=True))
EXCLUDED = 127
IMAGES, MASKS, TABLE = "images_896x896", "lesion_segs_896x896", "dr_grades.csv"
_NAME = re.compile(r"([0-9]+)_(left|right)", re.IGNORECASE)


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List Retinal-Lesions.

    Args:
      source: the folder "retinal-lesions-v20191227", or one above it.
      partial: accept a copy that lacks images.

    Raises DataError naming all bad rows, all missing files, masks of no image or no known lesion, or the
    counts of grades that are wrong.
    """
    root = layout.root(source, TABLE)
    table, folder = layout.entry(root, TABLE), layout.entry(root, IMAGES)
    lines = tables.read(table, ("image id", "our label"))
    rows = tables.keyed(table, lines, lambda row: row["image id"].removesuffix(".jpg"), _row)
    masks = _masks(layout.entry(root, MASKS), {name.lower() for name in rows})
    files = by_stem(folder, layout.PICTURES)
    found = layout.joined(rows, files, table=table, folder=folder, partial=partial)
    counts = Counter(labels.GRADES[grade] for _, (_, grade), _ in found)
    layout.require_counts(source, counts, GRADES, partial=partial)
    return [
        Sample(
            key=name,
            image=path,
            split=layout.hashed_split("retinal_lesions", patient),
            patient=patient,
            modality="CFP",
            labels=labels.dr(grade),
            searched=tuple(LESIONS.values()),
            masks={finding: masks.get((name.lower(), lesion), ()) for lesion, finding in LESIONS.items()},
            excluded=EXCLUDED,
        )
        for name, (patient, grade), path in found
    ]


def _row(row: tables.Row) -> tuple[str, int]:
    """Patient and grade. The name says which eye it is too, but EyePACS has images that are turned by half,
    with nothing to tell them by: what is said of a side would be wrong in these."""
    name = _NAME.fullmatch(row["image id"].removesuffix(".jpg"))
    if name is None:
        raise DataError("no name NUMBER_left or NUMBER_right")
    return name[1], tables.code(row, "our label", labels.ICDR)


def _masks(folder: Path, names: set[str]) -> dict[tuple[str, str], tuple[Path, ...]]:
    """(image, lesion) -> its mask file."""
    found, bad = {}, []
    for path in layout.tree(folder):
        image, lesion = path.parent.name.lower(), path.stem.lower()
        found[image, lesion] = (path,)
        if lesion not in LESIONS or image not in names:
            bad.append(f"{path.parent.name}/{path.name}")
    if bad:
        raise DataError(f"{folder}: {len(bad)} masks of no image or no known lesion: {', '.join(bad)}")
    return found


class RetinalLesions(SampleBuilder):
    """Retinal-Lesions as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Ask for Retinal-Lesions by the form of github.com/WeiQijie/retinal-lesions."
    )
    samples = staticmethod(samples)
