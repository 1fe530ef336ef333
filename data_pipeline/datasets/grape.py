"""GRAPE: 631 colour fundus photographs of 263 glaucomatous eyes, followed up, with visual fields.

Layout and columns after Huang et al. 2023 (figshare) and loaders of others, not checked against the archive.
The workbook has two header rows; both its sheets name the photographs of visits ("/" where there is none),
and "Baseline" says of each eye whether it progressed, by three criteria. No split is published: patients are
split by a hash; the paper trains on all 631 images.
"""

import re
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

DISEASES = ()  # every eye has glaucoma: no question
PROGRESSION = {"PLR2": "progression_plr2", "PLR3": "progression_plr3", "MD": "progression_md"}
ANSWERS = {str(code): answer for code, answer in enumerate(labels.PROGRESSION)}
EYES = {"OD": "OD", "OS": "OS"}
COUNT = 631
TABLE = "VF and clinical information.xlsx"
_NAME = re.compile(r"([0-9]+)_(OD|OS)_[0-9]+", re.IGNORECASE)


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List GRAPE.

    Args:
      source: the folder with the workbook and the folder CFPs (which may hold another CFPs), or one above
        both.
      partial: accept a copy that lacks images.

    Returns:
      Samples with `progression_plr2`, `progression_plr3` and `progression_md`, which are labels of the eye's
      course: the paper's task is to predict them.

    Raises DataError naming all bad rows, all missing files, or the count that is wrong.
    """
    table = layout.entry(layout.root(source, TABLE), TABLE)
    folder = layout.entry(layout.root(source, "CFPs"), "CFPs")
    columns = ("Subject Number", "Laterality")
    status = [f"Progression Status/{name}" for name in PROGRESSION]
    lines = tables.read(table, (*columns, *status), sheet="Baseline", headers=2)
    courses = tables.keyed(table, lines, _eye, _course)
    visits = tables.read(table, (*columns, "Corresponding CFP"), sheet="Follow-up", headers=2)
    visits += [(number, row) for number, row in lines if "Corresponding CFP" in row]
    seen = [(number, row) for number, row in visits if row["Corresponding CFP"] not in ("", "/")]
    seen = tables.distinct(seen, (*columns, "Corresponding CFP"))
    rows = tables.keyed(table, seen, lambda row: Path(row["Corresponding CFP"]).stem, _visit)
    if lost := sorted({eye for _, _, eye in rows.values()} - courses.keys()):
        raise DataError(f"{table}: {len(lost)} eyes are not in Baseline: {', '.join(lost)}")
    found = layout.joined(rows, layout.deep_stems(folder), table=table, folder=folder, partial=partial)
    layout.require_counts(source, {"all": len(found)}, {"all": COUNT}, partial=partial)
    return [
        Sample(
            key=name,
            image=path,
            split=layout.hashed_split("grape", patient),
            patient=patient,
            eye=side,
            modality="CFP",
            labels=courses[eye],
            diseases=(labels.GLAUCOMA,),
        )
        for name, (patient, side, eye), path in found
    ]


def _eye(row: tables.Row) -> str:
    return f"{row['Subject Number']}_{row['Laterality'].upper()}" if row["Subject Number"] else ""


def _course(row: tables.Row) -> dict[str, str]:
    tables.code(row, "Laterality", EYES)
    return {
        task: tables.code(row, f"Progression Status/{name}", ANSWERS) for name, task in PROGRESSION.items()
    }


def _visit(row: tables.Row) -> tuple[str, str, str]:
    side = tables.code(row, "Laterality", EYES)
    name = _NAME.fullmatch(Path(row["Corresponding CFP"]).stem)
    if name is None or name[1] != row["Subject Number"] or name[2].upper() != side:
        raise DataError(f"the photograph of eye {_eye(row)}")
    return row["Subject Number"], side, _eye(row)


class Grape(SampleBuilder):
    """GRAPE as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get CFPs and the workbook of GRAPE from figshare and unpack them here."
    samples = staticmethod(samples)
