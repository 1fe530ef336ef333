"""UCSD (Kermany): 109,309 OCT B-scans of 4 classes, in train and test folders with one folder a class.

Layout and counts: Kermany et al. 2018; version 3 on Mendeley ("CellData/OCT", train and test) and Kaggle's
version 2 ("OCT2017", with 32 images as "val"). The article counts 108,312 training images, the archive has
108,309. Names are CLASS-PATIENT-NUMBER. Training and test share patients: the log says how many, and the
split stays the publisher's. FunBench and OmniMedVQA draw on the test half, which is never in "train", and
OmniMedVQA on Kaggle's "val" too; which part of version 3 has these images is not known: see `heldout`.
"""

import re
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

CLASSES = {"CNV": labels.CNV, "DME": labels.DME, "DRUSEN": labels.DRUSEN, "NORMAL": labels.NORMAL}
DISEASES = tuple(CLASSES.values())
COUNTS = {"train": (108_309, 108_312), "test": 1000}
COUNTS_KAGGLE = {"train": 83_484, "val": 32, "test": 968}
_NAME = re.compile(r"(cnv|dme|drusen|normal)-([0-9]+)-[0-9]+", re.IGNORECASE)


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List UCSD.

    Args:
      source: the folder with train and test (and val, in Kaggle's version), or one above it.
      partial: accept another number of images than the publisher's.

    Raises DataError naming folders that are missing or unknown, all images whose name does not fit their
    folder, or the counts that are wrong.
    """
    root = layout.root(source, "train", "test")
    kaggle = any(path.name.lower() == "val" for path in root.iterdir())
    found: list[Sample] = []
    bad: list[str] = []
    for split in COUNTS_KAGGLE if kaggle else COUNTS:
        for disease, path in layout.by_class(layout.entry(root, split), CLASSES):
            name = _NAME.fullmatch(path.stem)
            if name is None or CLASSES[name[1].upper()] != disease:
                bad.append(f"{split}/{path.parent.name}/{path.name}")
                continue
            found.append(
                Sample(
                    key=path.stem,
                    image=path,
                    split=split,
                    patient=name[2],
                    modality="OCT",
                    labels={"disease": disease},
                )
            )
    if bad:
        raise DataError(f"{root}: {len(bad)} names are not CLASS-PATIENT-NUMBER: {', '.join(bad)}")
    counts = COUNTS_KAGGLE if kaggle else COUNTS
    layout.require_counts(source, Counter(one.split for one in found), counts, partial=partial)
    return layout.reported("UCSD", found)


class Ucsd(SampleBuilder):
    """UCSD as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get the OCT images of Kermany et al. from Mendeley and unpack them here."
    samples = staticmethod(samples)
