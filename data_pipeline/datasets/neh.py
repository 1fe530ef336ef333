"""NEH: 16,822 OCT B-scans of 441 patients, labelled one by one.

Layout and columns after Sotoudeh-Paima et al. 2022 and the publisher's own reading script (Mendeley, CC BY
4.0), not checked against the archive. A patient lies in the folder of the worst diagnosis of the volume; the
label of a B-scan is the column Label, which differs for every fifth of them. Numbers of patients restart in
each folder. No split is published: patients are split by a hash. FunBench draws on this set: see `heldout`.
"""

from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

CLASSES = {"normal": labels.NORMAL, "drusen": labels.DRUSEN, "cnv": labels.CNV}
DISEASES = tuple(CLASSES.values())
EYES = {"od": "OD", "os": "OS", "r": "OD", "l": "OS", "right": "OD", "left": "OS", "": ""}
COUNT = 16_822
TABLE = "data_information.csv"


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List NEH.

    Args:
      source: the folder with NORMAL, DRUSEN and CNV; data_information.csv lies in it or above it.
      partial: accept a copy that lacks images.

    Raises DataError naming all bad rows, all missing files, or the count that is wrong.
    """
    table = layout.entry(layout.root(source, TABLE), TABLE)
    folder = layout.root(table.parent, "NORMAL")
    columns = ("Patient ID", "Class", "Eye", "Label", "Directory")
    rows = tables.keyed(table, tables.read(table, columns), _place, _row)
    files = {
        path.relative_to(folder).with_suffix("").as_posix().lower(): path for path in layout.tree(folder)
    }
    found = layout.joined(rows, files, table=table, folder=folder, partial=partial)
    layout.require_counts(source, {"all": len(found)}, {"all": COUNT}, partial=partial)
    return [
        Sample(
            key=path.relative_to(folder).with_suffix("").as_posix(),
            image=path,
            split=layout.hashed_split("neh", patient),
            patient=patient,
            eye=eye,
            modality="OCT",
            labels={"disease": disease},
        )
        for _, (patient, eye, disease), path in found
    ]


def _place(row: tables.Row) -> str:
    """The path in column Directory from the class folder on, without suffix: "cnv/12/od/3"."""
    parts = PurePosixPath(row["Directory"].replace("\\", "/").lower()).with_suffix("").parts
    starts = [at for at, part in enumerate(parts) if part in CLASSES]
    return "/".join(parts[starts[0] :]) if starts else ""


def _row(row: tables.Row) -> tuple[str, str, str]:
    if not row["Patient ID"]:
        raise DataError("no Patient ID")
    lower = {column: row[column].lower() for column in ("Class", "Eye", "Label")}
    home = tables.code(lower, "Class", {name: name for name in CLASSES})
    return (
        f"{home}/{row['Patient ID']}",
        tables.code(lower, "Eye", EYES),
        tables.code(lower, "Label", CLASSES),
    )


class Neh(SampleBuilder):
    """NEH as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get the NEH data set from Mendeley (8kt969dhx6) and unpack it here."
    samples = staticmethod(samples)
