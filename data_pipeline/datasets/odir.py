"""OIA-ODIR: 10,000 colour fundus photographs of 5000 patients, both eyes of each, with diagnoses in words.

Layout after Li et al. 2021 (github.com/nkicsl/OIA-ODIR) and loaders of others, not checked against the
archive; also Kaggle's ODIR-5K, whose "Testing Images" have no labels and are left out. The eight flags of a
row are the patient's, so the labels of an eye come from its keywords, which a full-width comma parts: a word
that belongs to none of seven diseases makes the eighth, "other". On 302 rows of the publisher's table (those
with remarks on the photograph) the words of both eyes give the patient's flags in all but two. What is no
fundus photograph, or of low quality, is left out; remarks such as "lens dust" are no diagnosis. "Suspected"
counts as the disease, as in the flags, but gives no grade.

The off-site test set is "val" (the paper trains on it), the on-site test set "test": FunBench draws on the
latter.
"""

import re
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample, by_stem, subfolder
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

OTHER = "Other disease"
WORDS = (  # the first that a keyword contains decides
    ("normal fundus", labels.NORMAL),
    ("diabetic retinopathy", labels.DR),
    ("proliferative retinopathy", labels.DR),
    ("glaucoma", labels.GLAUCOMA),
    ("cataract", "Cataract"),
    ("macular degeneration", labels.AMD),
    ("hypertensive retinopathy", "Hypertensive retinopathy"),
    ("myopi", labels.PATHOLOGICAL_MYOPIA),
)
DISEASES = (*dict.fromkeys(disease for _, disease in WORDS), OTHER)
GRADES = (  # of diabetic retinopathy, without blanks and hyphens, as keywords spell it in several ways
    ("suspect", None),
    ("mildnonproliferative", 1),
    ("moderatenonproliferative", 2),
    ("severenonproliferative", 3),
    ("nonproliferative", None),
    ("proliferative", 4),
)
REMARKS = {"lens dust", "optic disk photographically invisible", "image offset"}
USELESS = {"anterior segment image", "no fundus image", "low image quality"}
FLAGS = ("N", "D", "G", "C", "A", "H", "M", "O")
SETS = {"train": "Training Set", "val": "Off-site Test Set", "test": "On-site Test Set"}
COUNTS = {"train": 7000, "val": 1000, "test": 2000}  # two images a patient, before any is left out
SIDES = {"Left": "OS", "Right": "OD"}


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List OIA-ODIR.

    Args:
      source: the folder with the three sets, or Kaggle's with "Training Images" and data.xlsx.
      partial: accept a copy that lacks images.

    Returns:
      Samples with all their `diseases`, with `disease` where there is only one, and with `dr_grade` where the
      words give one.

    Raises DataError naming all bad rows, all missing files, or the counts that are wrong.
    """
    found: list[Sample] = []
    for split, table, folder in _parts(source):
        rows = _eyes(table)
        layout.require_counts(table, {split: len(rows)}, {split: COUNTS[split]}, partial=partial)
        files = by_stem(folder, layout.PICTURES)
        for name, (patient, eye, words), path in layout.joined(
            rows, files, table=table, folder=folder, partial=partial
        ):
            if diseases := _diseases(words):
                found.append(
                    Sample(
                        key=name,
                        image=path,
                        split=split,
                        patient=patient,
                        eye=eye,
                        modality="CFP",
                        labels={**labels.one_of_many(diseases), **_grade(words)},
                        diseases=diseases,
                    )
                )
    return layout.reported("OIA-ODIR", found)


def _parts(source: Path) -> list[tuple[str, Path, Path]]:
    """(split, table, folder of images) of the publisher's layout, or of Kaggle's."""
    try:
        kaggle = layout.root(source, "Training Images", "data.xlsx")
        return [("train", layout.entry(kaggle, "data.xlsx"), layout.entry(kaggle, "Training Images"))]
    except DataError:
        root = layout.root(source, *SETS.values())
    parts = []
    for split, name in SETS.items():
        home = layout.entry(root, name)
        tables_ = layout.tree(subfolder(home, "Annotation"), [".xlsx"])
        english = [path for path in tables_ if "english" in path.stem.lower()] or tables_
        if len(english) != 1:
            raise DataError(f"{home}: {len(english)} tables in English under Annotation; one is expected")
        parts.append((split, english[0], layout.entry(home, "Images")))
    return parts


def _eyes(table: Path) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Stem of an image -> patient, eye, keywords."""
    columns = [f"{side}-{what}" for side in SIDES for what in ("Fundus", "Diagnostic Keywords")]
    lines = tables.read(table, ("ID", *columns, *FLAGS))
    sides = [(n, {**row, "side": side, "file": row[f"{side}-Fundus"]}) for n, row in lines for side in SIDES]
    return tables.keyed(table, sides, lambda row: Path(row["file"]).stem, _eye)


def _eye(row: tables.Row) -> tuple[str, str, tuple[str, ...]]:
    tables.flagged(row, dict(zip(FLAGS, FLAGS, strict=True)))
    side = row["side"]
    if row["file"].lower().rpartition(".")[0] != f"{row['ID']}_{side.lower()}":
        raise DataError(f"file {row['file']} of patient {row['ID']}, {side.lower()} eye")
    words = re.split("[，,]", row[f"{side}-Diagnostic Keywords"])
    words = tuple(word.strip().lower() for word in words if word.strip())
    if not words:
        raise DataError("no keyword")
    return row["ID"], SIDES[side], words


def _diseases(words: tuple[str, ...]) -> tuple[str, ...]:
    """The diseases of an eye in the order of `DISEASES`; none for an image that is to be left out."""
    if USELESS.intersection(words):
        return ()
    found = {
        next((disease for part, disease in WORDS if part in word), OTHER)
        for word in words
        if word not in REMARKS
    }
    if len(found) > 1:
        found.discard(labels.NORMAL)  # "normal fundus" beside a disease speaks of the rest
    return tuple(disease for disease in DISEASES if disease in found)


def _grade(words: tuple[str, ...]) -> dict[str, str]:
    plain = [re.sub(r"[\s-]", "", word) for word in words if "retinopathy" in word and "hyper" not in word]
    grades = {next((grade for part, grade in GRADES if part in word), None) for word in plain}
    grade = grades.pop() if len(grades) == 1 else None
    return {} if grade is None else {"dr_grade": labels.GRADES[grade]}


class Odir(SampleBuilder):
    """OIA-ODIR as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get OIA-ODIR by the links of github.com/nkicsl/OIA-ODIR and unpack it here."
    )
    samples = staticmethod(samples)
