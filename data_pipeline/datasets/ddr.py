"""DDR: 12,522 colour fundus photographs with a grade of diabetic retinopathy, 757 with lesion masks.

Layout and counts after Li et al. 2019 (github.com/nkicsl/DDR-dataset), not checked against the archive. The
table of the grades has 1151 images more, which are ungradable (5) and left out. Both parts are drawn from one
pool: an image of one name in both is one sample with a grade and masks, on the stricter side of the two
splits (test, then valid). Nothing is said of patients or eyes. Both test parts are never in "train": FunBench
draws on them.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample, by_stem, subfolder
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

DISEASES = labels.DR_DISEASES
LESIONS = {"MA": "microaneurysm", "HE": "haemorrhage", "EX": "hard exudate", "SE": "cotton-wool spot"}
PARTS = {"train": "train", "val": "valid", "test": "test"}
GRADED = {"train": 6835, "val": 2733, "test": 4105}  # with the ungradable
MASKED = {"train": 383, "val": 149, "test": 225}
CODES = {**labels.ICDR, "5": None}
STRICT = ("train", "val", "test")


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List DDR.

    Args:
      source: the folder "DDR-dataset" with DR_grading and lesion_segmentation, or one above it.
      partial: accept a copy that lacks images.

    Returns:
      One sample an image. A finding is `searched` where the image has a mask file for it, empty or not.

    Raises DataError naming all bad rows, all missing files, masks without an image, or the wrong counts.
    """
    root = layout.root(source, "DR_grading")
    graded = _graded(layout.entry(root, "DR_grading"), source, partial)
    masked = _masked(layout.entry(root, "lesion_segmentation"), source, partial)
    found = []
    for name in sorted({*graded, *masked}):
        split, path, grade = graded.get(name, ("train", None, None))
        other, picture, masks = masked.get(name, ("train", None, None))
        image = picture or path  # the masks are of the size of the picture that came with them
        if image is None or grade is None and masks is None:
            continue
        found.append(
            Sample(
                key=name,
                image=image,
                split=max(split, other, key=STRICT.index),
                patient=name,
                modality="CFP",
                labels={} if grade is None else labels.dr(grade),
                searched=tuple(masks or ()),
                masks=masks,
            )
        )
    return found


def _graded(folder: Path, source: Path, partial: bool) -> dict[str, tuple[str, Path, int | None]]:
    """Name -> split, file, grade (None for an ungradable one)."""
    found, counts = {}, {}
    for split, part in PARTS.items():
        table = layout.entry(folder, f"{part}.txt")
        rows = tables.headless(table, ("name", "grade"))
        grades = tables.keyed(table, rows, lambda row: Path(row["name"]).stem, _grade)
        counts[split] = len(grades)
        home = layout.entry(folder, part)
        files = by_stem(home, layout.PICTURES)
        for name, grade, path in layout.joined(grades, files, table=table, folder=home, partial=partial):
            found[name] = (split, path, grade)
    layout.require_counts(source, counts, GRADED, partial=partial)
    return found


def _grade(row: tables.Row) -> int | None:
    return tables.code(row, "grade", CODES)


def _masked(folder: Path, source: Path, partial: bool) -> dict[str, tuple[str, Path, dict]]:
    """Name -> split, file, masks by finding."""
    found, counts = {}, {}
    for split, part in PARTS.items():
        home = layout.entry(folder, part)
        pictures = by_stem(layout.entry(home, "image"), layout.PICTURES)
        truths = subfolder(home, "label" if part != "valid" else "segmentation label")
        masks: dict[str, dict[str, tuple[Path, ...]]] = {stem: {} for stem in pictures}
        strangers = []
        for code, finding in LESIONS.items():
            for stem, path in by_stem(layout.entry(truths, code), layout.PICTURES).items():
                if stem in masks:
                    masks[stem][finding] = (path,)
                else:
                    strangers.append(f"{code}/{path.name}")
        if strangers:
            raise DataError(f"{truths}: {len(strangers)} masks belong to no image: {', '.join(strangers)}")
        counts[split] = len(pictures)
        found |= {path.stem: (split, path, masks[stem]) for stem, path in pictures.items()}
    layout.require_counts(source, counts, MASKED, partial=partial)
    return found


class Ddr(SampleBuilder):
    """DDR as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get DDR by the links of github.com/nkicsl/DDR-dataset and unpack it here."
    samples = staticmethod(samples)
