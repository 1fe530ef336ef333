"""OCTID: 572 OCT B-scans in five folders, one a diagnosis.

Layout after Gholami et al. 2020 (Borealis Dataverse: one zip a class), not checked against the archive.
Nothing is said of patients or eyes: every image counts as a patient of its own, and the split goes by a hash
of its name. So images of one person may stand on both sides, which nobody can know from the archive.
"""

from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder

CLASSES = {
    "NORMAL": labels.NORMAL,
    "AMRD": labels.AMD,
    "CSR": labels.CSC,
    "DR": labels.DR,
    "MH": labels.MACULAR_HOLE,
}
DISEASES = tuple(CLASSES.values())
COUNTS = dict(zip(DISEASES, (206, 55, 102, 107, 102), strict=True))


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List OCTID.

    Args:
      source: the folder with NORMAL, AMRD, CSR, DR and MH.
      partial: accept another number of images than the publisher's.

    Raises DataError naming folders that are missing or unknown, or the counts that are wrong.
    """
    found = layout.by_class(layout.root(source, "NORMAL"), CLASSES)
    layout.require_counts(source, Counter(disease for disease, _ in found), COUNTS, partial=partial)
    return [
        Sample(
            key=(key := f"{path.parent.name}/{path.stem}"),
            image=path,
            split=layout.hashed_split("octid", key.lower()),
            patient=key,
            modality="OCT",
            labels={"disease": disease},
        )
        for disease, path in found
    ]


class Octid(SampleBuilder):
    """OCTID as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get the five archives of OCTID from Borealis and unpack them here."
    samples = staticmethod(samples)
