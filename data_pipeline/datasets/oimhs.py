"""OIMHS: 3859 OCT B-scans of 125 eyes with a macular hole, and masks.

Layout and colours after Ye et al. 2023 (figshare) and loaders of others, not checked against the archive. A
picture holds the B-scan in its left half and the mask in its right: red is the hole, blue are intraretinal
cysts; green (retina) and yellow (choroid) are anatomy. The workbook of the participants, where it is there,
says which eyes are of one patient; else an eye counts as a patient. No split is published: patients are split
by a hash; the paper trains on all images.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray

from data_pipeline import images
from data_pipeline.datasets import layout, tables
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from data_pipeline.datasets.cut import Cut
from fundus_jax.records import DataError

DISEASES = ()  # every eye has a macular hole: no question
COLOURS = {"intraretinal fluid": (0, 0, 255), "macular hole": (255, 0, 0)}
NEAR = 64  # a channel may be off by this, should the picture have been through JPEG or a resampling
EYES = {"od": "OD", "os": "OS", "right": "OD", "left": "OS", "r": "OD", "l": "OS", "": ""}
COUNT = 3859
TABLE = "Demographics of the participants.xlsx"


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List OIMHS.

    Args:
      source: the folder with the folder Images, or one above it.
      partial: accept another number of images than the publisher's.

    Returns:
      Samples whose image and masks are halves of the publisher's pictures; every image has masks.

    Raises DataError naming all bad rows, eyes that the workbook lacks, or the count that is wrong.
    """
    root = layout.root(source, "Images")
    folder = layout.entry(root, "Images")
    found = layout.tree(folder)
    layout.require_counts(source, {"all": len(found)}, {"all": COUNT}, partial=partial)
    people = _people(root)
    lost = sorted({path.parent.name for path in found} - people.keys()) if people else []
    if lost:
        raise DataError(f"{root / TABLE}: {len(lost)} eyes have no row: {', '.join(lost)}")
    listed = []
    for path in found:
        patient, eye = people.get(path.parent.name, (f"eye {path.parent.name}", ""))
        listed.append(
            Sample(
                key=f"{path.parent.name}/{path.stem}",
                image=Cut(path, scan),
                split=layout.hashed_split("oimhs", patient),
                patient=patient,
                eye=eye,
                modality="OCT",
                searched=tuple(COLOURS),
                masks={name: (Cut(path, mask, (name,)),) for name in COLOURS},
            )
        )
    return listed


def scan(path: Path) -> NDArray[np.uint8]:
    """The B-scan of a picture, its left half [H, W, 3]."""
    return _halves(path)[0]


def mask(path: Path, finding: str) -> NDArray[np.bool_]:
    """Where the right half of a picture has the colour of a finding, [H, W]."""
    away = np.abs(_halves(path)[1].astype(np.int16) - COLOURS[finding])
    return away.max(axis=-1) < NEAR


def _halves(path: Path) -> NDArray[np.uint8]:
    pixels = np.asarray(images.decode(path))
    if pixels.shape[1] % 2:
        raise DataError(f"{path.name}: {pixels.shape[1]} pixels wide; two halves of one width are expected")
    return np.stack(np.split(pixels, 2, axis=1))


def _people(root: Path) -> dict[str, tuple[str, str]]:
    """Eye -> patient, side; empty without the workbook."""
    if not any(path.name.lower() == TABLE.lower() for path in root.iterdir()):
        return {}
    table = layout.entry(root, TABLE)
    return tables.keyed(
        table, tables.read(table, ("Patient ID", "Eye ID", "Eye category")), "Eye ID", _person
    )


def _person(row: tables.Row) -> tuple[str, str]:
    if not row["Patient ID"]:
        raise DataError("no Patient ID")
    lower = {"Eye category": row["Eye category"].lower().removesuffix(" eye")}
    return row["Patient ID"], tables.code(lower, "Eye category", EYES)


class Oimhs(SampleBuilder):
    """OIMHS as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get OIMHS from figshare (23508453) and unpack it here."
    samples = staticmethod(samples)
