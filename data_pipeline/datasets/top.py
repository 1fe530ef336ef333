"""TOP (Tsukazaki Optos Public): 13,047 ultra-widefield photographs with nine flags.

Layout and codes: github.com/DateCazuki/Fundus_Diagnosis ("data.csv" and the folder "img"); header and rows
read there. MH is the macular hole, AO the retinal artery occlusion. DM says that the person has diabetes,
which is no finding of the eye: an image with DM alone has neither a disease nor the label Normal. No split is
published: patients (the column ID) are split by a hash. FunBench draws on this set: see `heldout`.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

CODES = {
    "AMD": labels.AMD,
    "RVO": labels.RVO,
    "Gla": labels.GLAUCOMA,
    "MH": labels.MACULAR_HOLE,
    "DR": labels.DR,
    "RD": labels.RETINAL_DETACHMENT,
    "RP": labels.RP,
    "AO": labels.RAO,
}
DIABETES = {"0": "No", "1": "Yes"}
EYES = {"L": "OS", "R": "OD"}
DISEASES = (labels.NORMAL, *CODES.values())
COUNT = 13_047
TABLE = "data.csv"


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List TOP.

    Args:
      source: the folder with data.csv and, in it or below it, the images.
      partial: accept a copy that lacks images.

    Returns:
      Samples with all their `diseases`, with `disease` where there is only one, or none and no diabetes, and
      with `diabetes`, which is no question about the image.

    Raises DataError naming all bad rows, all missing files, or the count that is wrong.
    """
    table = layout.entry(layout.root(source, TABLE), TABLE)
    columns = ("filename", "ID", "LR", *CODES, "DM")
    rows = tables.keyed(table, tables.read(table, columns), lambda row: Path(row["filename"]).stem, _row)
    files = layout.deep_stems(table.parent)
    found = layout.joined(rows, files, table=table, folder=table.parent, partial=partial)
    layout.require_counts(source, {"all": len(found)}, {"all": COUNT}, partial=partial)
    return [
        Sample(
            key=name,
            image=path,
            split=layout.hashed_split("top", patient),
            patient=patient,
            eye=eye,
            modality="UWF",
            labels={**labels.one_of_many(diseases), "diabetes": diabetes},
            diseases=diseases,
        )
        for name, (patient, eye, diseases, diabetes), path in found
    ]


def _row(row: tables.Row) -> tuple[str, str, tuple[str, ...], str]:
    if not row["ID"]:
        raise DataError("no ID")
    diseases, diabetes = tables.flagged(row, CODES), tables.code(row, "DM", DIABETES)
    if not diseases and diabetes == "No":
        diseases = (labels.NORMAL,)
    return row["ID"], tables.code(row, "LR", EYES), diseases, diabetes


class Top(SampleBuilder):
    """TOP as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Clone github.com/DateCazuki/Fundus_Diagnosis here."
    samples = staticmethod(samples)
