"""FGADR-143-9: 143 photographs of FGADR with masks of nine lesions.

A re-annotation by Kheradfallah et al. 2022 (SPIE 12033); its archive has no published layout that we know of.
So the user says what is where, in a table fgadr_143_9.csv with the columns image, lesion, mask: one row for
each image and each lesion that was looked for, paths below the table's folder, an empty mask where the lesion
is absent. A lesion may go by any name that `fundus_jax.findings` knows, but by no abbreviation: HE are
haemorrhages to some, hard exudates to others. Images lie where FGADR (Zhou et al. 2021) has them,
"Seg-set/Original_Images"; where its table of grades is there too, the grade is taken. Nothing is said of
patients: images are split by a hash of their name; the paper trains on all 143.
"""

from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax import findings
from fundus_jax.records import DataError

DISEASES = labels.DR_DISEASES
COUNT, LESIONS = 143, 9
TABLE, GRADES = "fgadr_143_9.csv", "DR_Seg_Grading_Label.csv"


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List FGADR-143-9.

    Args:
      source: the folder with fgadr_143_9.csv, or one above it.
      partial: accept another number of images or lesions than the publisher's.

    Raises DataError naming all bad rows (unknown lesions, missing files, paths that lead elsewhere), bad
    grades, or the counts that are wrong.
    """
    table = layout.entry(layout.root(source, TABLE), TABLE)
    rows = tables.read(table, ("image", "lesion", "mask"))
    found = tables.keyed(
        table, rows, lambda row: f"{row['image']}, {row['lesion']}", lambda row: _row(row, table.parent)
    )
    masks: dict[Path, dict[str, tuple[Path, ...]]] = {}
    for image, lesion, mask in found.values():
        masks.setdefault(image, {})[lesion] = mask
    counts = {"images": len(masks), "lesions": len({lesion for one in masks.values() for lesion in one})}
    layout.require_counts(source, counts, {"images": COUNT, "lesions": LESIONS}, partial=partial)
    grades = _grades(layout.tree(table.parent, [".csv"]))
    return [
        Sample(
            key=image.stem,
            image=image,
            split=layout.hashed_split("fgadr_143_9", image.stem),
            patient=image.stem,
            modality="CFP",
            labels=labels.dr(grades[image.stem]) if image.stem in grades else {},
            searched=tuple(one),
            masks=one,
        )
        for image, one in sorted(masks.items())
    ]


def _row(row: tables.Row, folder: Path) -> tuple[Path, str, tuple[Path, ...]]:
    lesion = findings.canonical(row["lesion"])
    if lesion not in findings.vocabulary("CFP", extended=True) or row["lesion"].isupper():
        raise DataError("a lesion that fundus_jax/findings.py does not know, or an abbreviation")
    return _inside(folder, row["image"]), lesion, (_inside(folder, row["mask"]),) if row["mask"] else ()


def _inside(folder: Path, text: str) -> Path:
    path = PurePosixPath(text.replace("\\", "/"))
    found = folder / path
    if path.is_absolute() or not found.resolve().is_relative_to(folder.resolve()) or not found.is_file():
        raise DataError(f"no file {text} below the table's folder")
    return found


def _grades(tables_: list[Path]) -> dict[str, int]:
    """Stem of an image -> grade 0 to 4, from FGADR's own table, which has no header; empty without one."""
    found: dict[str, int] = {}
    for table in tables_:
        if table.name.lower() == GRADES.lower():
            found |= tables.keyed(
                table,
                tables.headless(table, ("image", "grade"), delimiter=","),
                lambda row: Path(row["image"]).stem,
                lambda row: tables.code(row, "grade", labels.ICDR),
            )
    return found


class Fgadr1439(SampleBuilder):
    """FGADR-143-9 as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put FGADR's Seg-set, the nine masks and fgadr_143_9.csv here."
    samples = staticmethod(samples)
