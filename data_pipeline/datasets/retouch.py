"""RETOUCH: 70 OCT volumes of three devices with fluid masks, as 6936 B-scans.

Layout and codes after Bogunovic et al. 2019 (grand-challenge, under an agreement) and loaders of others, not
checked against the archive. The challenge's test volumes have no masks and are left out; so there is no
published split, and volumes, each of another patient, are split by a hash. Keys are named and numbered as
FunBench does, which draws on this set: see `heldout`. The 16 bits of Spectralis become 8 by value / 2^16 *
255.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray

from data_pipeline.datasets import layout, metaimage
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from data_pipeline.datasets.cut import Cut
from fundus_jax.records import DataError

DISEASES = ()  # no diagnosis is published
CODES = {"intraretinal fluid": 1, "subretinal fluid": 2, "pigment epithelial detachment": 3}
VOLUMES = {"Cirrus": 24, "Spectralis": 24, "Topcon": 22}
COUNT = 6936


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List RETOUCH.

    Args:
      source: the folder with RETOUCH-TrainingSet-Cirrus, -Spectralis and -Topcon, or with their parents
        TrainingCirrus and so on, or one above.
      partial: accept another number of volumes and B-scans than the publisher's.

    Returns:
      A sample for each B-scan, cut from its volume when it is needed; every one has masks.

    Raises DataError naming a volume without reference, a bad header, or the counts that are wrong.
    """
    names = {device: f"RETOUCH-TrainingSet-{device}" for device in VOLUMES}
    found: list[Sample] = []
    volumes: Counter[str] = Counter()
    for device, name in names.items():
        folder = layout.entry(layout.root(source, name), name)
        for case in sorted(path for path in folder.iterdir() if path.is_dir()):
            scans, truth = metaimage.header(case / "oct.mhd"), metaimage.header(case / "reference.mhd")
            sizes = [(one.width, one.height, one.depth) for one in (scans, truth)]
            if sizes[0] != sizes[1]:
                raise DataError(f"{case}: oct.mhd is {sizes[0]}, reference.mhd {sizes[1]}; get both again")
            volumes[device] += 1
            found += [_sample(name, case, index) for index in range(scans.depth)]
    layout.require_counts(source, volumes, VOLUMES, partial=partial)
    layout.require_counts(source, {"all": len(found)}, {"all": COUNT}, partial=partial)
    return found


def _sample(device: str, case: Path, index: int) -> Sample:
    truth = case / "reference.mhd"
    return Sample(
        key=f"{device}_{case.name}_{index:03d}",
        image=Cut(case / "oct.mhd", scan, (index,)),
        split=layout.hashed_split("retouch", case.name),
        patient=case.name,
        modality="OCT",
        searched=tuple(CODES),
        masks={name: (Cut(truth, mask, (index, name)),) for name in CODES},
    )


def scan(path: Path, index: int) -> NDArray[np.uint8]:
    """One B-scan of a volume in 8 bits, [H, W]."""
    values = metaimage.plane(path, index)
    if values.dtype.itemsize == 1:
        return values.astype(np.uint8)
    return (values.astype(np.int64) * 255 >> 16).clip(0, 255).astype(np.uint8)


def mask(path: Path, index: int, finding: str) -> NDArray[np.bool_]:
    """Where one B-scan of a reference has the code of a finding, [H, W]; DataError for codes above 3."""
    values = metaimage.plane(path, index)
    if values.min() < 0 or values.max() > 3:
        raise DataError(
            f"{path}: plane {index} has codes from {values.min()} to {values.max()}; known are 0-3"
        )
    return values == CODES[finding]


class Retouch(SampleBuilder):
    """RETOUCH as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Sign RETOUCH's agreement at grand-challenge, and unpack the training sets here."
    )
    samples = staticmethod(samples)
