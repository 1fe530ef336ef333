"""OCTDL: 2064 OCT B-scans of 820 patients in seven folders, with a table.

Layout and codes: Kulyabin et al. 2024 (Mendeley, CC BY 4.0); read off the real table. An eye, a sex or a year
of 0 is not known. No split is published: patients are split by a hash of their number. `amd_grade` is the
grading task: of the AMD images as the table says, and of normal ones, which have none.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample, stems
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

CLASSES = {
    "AMD": labels.AMD,
    "DME": labels.DME,
    "ERM": labels.ERM,
    "NO": labels.NORMAL,
    "RAO": labels.RAO,
    "RVO": labels.RVO,
    "VID": "Vitreomacular interface disease",
}
DISEASES = tuple(CLASSES.values())
STAGES: dict[str, str] = dict(zip(("early", "intermediate", "late"), labels.AMD_GRADES[1:], strict=True))
EYES = {"0": "", "OD": "OD", "OS": "OS"}
COUNT = 2064
TABLE = "OCTDL_labels.csv"


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List OCTDL.

    Args:
      source: the folder with OCTDL_labels.csv and the seven folders (which may lie in a folder OCTDL).
      partial: accept a copy that lacks images.

    Raises DataError naming all bad rows, all missing files, all images in the folder of another class, or the
    count that is wrong.
    """
    table = layout.entry(layout.root(source, TABLE), TABLE)
    columns = ("file_name", "disease", "subcategory", "patient_id", "eye")
    rows = tables.keyed(table, tables.read(table, columns), "file_name", _row)
    folder = layout.root(table.parent, "AMD")
    placed = layout.by_class(folder, CLASSES)
    files = stems((path for _, path in placed), folder)
    found = layout.joined(rows, files, table=table, folder=folder, partial=partial)
    layout.require_counts(source, {"all": len(found)}, {"all": COUNT}, partial=partial)
    homes = {path: disease for disease, path in placed}
    if bad := [path.name for _, (_, _, stated), path in found if homes[path] != stated["disease"]]:
        raise DataError(f"{table}: {len(bad)} images lie in the folder of another class: {', '.join(bad)}")
    return [
        Sample(
            key=name,
            image=path,
            split=layout.hashed_split("octdl", patient),
            patient=patient,
            eye=eye,
            modality="OCT",
            labels=stated,
        )
        for name, (patient, eye, stated), path in found
    ]


def _row(row: tables.Row) -> tuple[str, str, dict[str, str]]:
    if not row["patient_id"]:
        raise DataError("no patient_id")
    stated = {"disease": tables.code(row, "disease", CLASSES)}
    if row["disease"] == "AMD":
        stated["amd_grade"] = tables.code(row, "subcategory", STAGES)
    if row["disease"] == "NO":
        stated["amd_grade"] = labels.AMD_GRADES[0]
    return row["patient_id"], tables.code(row, "eye", EYES), stated


class Octdl(SampleBuilder):
    """OCTDL as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get OCTDL from Mendeley (sncdhf53xc) and unpack it here."
    samples = staticmethod(samples)
