"""NEH: 16,822 OCT B-scans of 441 patients, labelled one by one.

Layout and columns after Sotoudeh-Paima et al. 2022, the publisher's own reading script (Mendeley, CC BY 4.0)
and scripts of others, not checked against the archive. A patient lies in the folder of the worst diagnosis of
the volume; the label of a B-scan is the column Label, which differs for every fifth of them. Numbers of
patients restart in each folder. The table names twelve files twice, so there are 16,810. Some eyes stand
under two numbers, even in two folders: patients that share a file, byte for byte, count as one. No split is
published: patients are split by a hash. FunBench draws on this set: see `heldout`.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_pipeline.datasets import labels, layout, tables, twins
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

CLASSES = {"normal": labels.NORMAL, "drusen": labels.DRUSEN, "cnv": labels.CNV}
DISEASES = tuple(CLASSES.values())
EYES = {"od": "OD", "os": "OS", "r": "OD", "l": "OS", "right": "OD", "left": "OS", "": ""}
COUNTS = (16_810, 16_822)  # files, rows of the table
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
    lines = tables.distinct(tables.read(table, columns), [name for name in columns if name != "Eye"])
    rows = tables.keyed(table, lines, _place, _row)
    files = {path.relative_to(folder).as_posix().lower(): path for path in layout.tree(folder)}
    found = layout.joined(rows, files, table=table, folder=folder, partial=partial)
    layout.require_counts(source, {"all": len(found)}, {"all": COUNTS}, partial=partial)
    people = _people([(patient, path) for _, (patient, _, _), path in found])
    return [
        Sample(
            key=path.relative_to(folder).with_suffix("").as_posix(),
            image=path,
            split=layout.hashed_split("neh", people[patient]),
            patient=people[patient],
            eye=eye,
            modality="OCT",
            labels={"disease": disease},
        )
        for _, (patient, eye, disease), path in found
    ]


def _place(row: tables.Row) -> str:
    """The path in column Directory from the class folder on: "cnv/12/od/3_cnv.jpg"."""
    parts = PurePosixPath(row["Directory"].replace("\\", "/").lower()).parts
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


def _people(found: Sequence[tuple[str, Path]]) -> dict[str, str]:
    """Patient -> the first patient, by name, that files of the same bytes lead to."""
    names = sorted({patient for patient, _ in found})
    number = {name: place for place, name in enumerate(names)}
    alike = np.eye(len(names), dtype=bool)
    for (patient, _), first in zip(found, twins.identical([path for _, path in found]), strict=True):
        pair = number[patient], number[found[first][0]]
        alike[pair] = alike[pair[::-1]] = True
    shared = dict(zip(names, (names[root] for root in twins.groups(alike)), strict=True))
    again = len(names) - len(set(shared.values()))
    logging.info("NEH: %d of %d patients stand under another number too", again, len(names))
    return shared


class Neh(SampleBuilder):
    """NEH as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get the NEH data set from Mendeley (8kt969dhx6) and unpack it here."
    samples = staticmethod(samples)
