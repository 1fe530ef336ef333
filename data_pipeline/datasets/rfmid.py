"""RFMiD: 3200 colour fundus photographs with 45 flags, in three published parts.

Layout and codes: Pachade et al. 2021 (IEEE DataPort) and Kaggle's copy of it; the header of the table is read
off the real training table. Numbers restart in each part, so a patient is named by both. MH is media haze,
MHL the macular hole. Nothing is said of patients or eyes: every image counts as a patient of its own. The
testing part is never in "train": FunBench draws on it.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout, tables
from data_pipeline.datasets.base import Sample, by_stem, subfolder
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

CODES = {
    "DR": labels.DR,
    "ARMD": labels.AMD,
    "MH": "Media haze",
    "DN": labels.DRUSEN,
    "MYA": "Myopia",
    "BRVO": labels.BRVO,
    "TSLN": labels.TESSELLATED,
    "ERM": labels.ERM,
    "LS": labels.LASER_SCARS,
    "MS": "Macular scar",
    "CSR": labels.CSC,
    "ODC": "Optic disc cupping",
    "CRVO": labels.CRVO,
    "TV": labels.TORTUOUS,
    "AH": "Asteroid hyalosis",
    "ODP": "Optic disc pallor",
    "ODE": "Optic disc oedema",
    "ST": "Optociliary shunt",
    "AION": "Anterior ischaemic optic neuropathy",
    "PT": "Parafoveal telangiectasia",
    "RT": "Retinal traction",
    "RS": "Retinitis",
    "CRS": "Chorioretinitis",
    "EDN": "Exudation",
    "RPEC": "Retinal pigment epithelium changes",
    "MHL": labels.MACULAR_HOLE,
    "RP": labels.RP,
    "CWS": "Cotton-wool spots",
    "CB": "Coloboma",
    "ODPM": "Optic disc pit maculopathy",
    "PRH": "Preretinal haemorrhage",
    "MNF": labels.MYELINATED,
    "HR": "Haemorrhagic retinopathy",
    "CRAO": labels.CRAO,
    "TD": "Tilted disc",
    "CME": "Cystoid macular oedema",
    "PTCR": "Post-traumatic choroidal rupture",
    "CF": "Choroidal folds",
    "VH": "Vitreous haemorrhage",
    "MCA": "Macroaneurysm",
    "VS": "Vasculitis",
    "BRAO": labels.BRAO,
    "PLQ": "Plaque",
    "HPED": "Haemorrhagic pigment epithelial detachment",
    "CL": "Collateral vessels",
}
DISEASES = (labels.NORMAL, *CODES.values())
COUNTS = {"train": 1920, "val": 640, "test": 640}
# Part -> how its table is named, start of its folder at IEEE, its folder at Kaggle.
PARTS = {
    "train": ("rfmid_training_labels", "a.", "Training"),
    "val": ("rfmid_validation_labels", "b.", "Validation"),
    "test": ("rfmid_testing_labels", "c.", "Test"),
}


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List RFMiD.

    Args:
      source: the folder with "1. Original Images" and "2. Groundtruths", or with Kaggle's Training_Set,
        Evaluation_Set and Test_Set.
      partial: accept a copy that lacks images, or whole parts.

    Returns:
      Samples with all their `diseases`, and with `disease` where there is only one, or none.

    Raises DataError naming all bad rows, all missing files, or the counts that are wrong.
    """
    tables_ = layout.tree(source, [".csv"])
    found: list[Sample] = []
    for split, (name, letter, kaggle) in PARTS.items():
        fitting = [path for path in tables_ if name in path.stem.lower()]
        if len(fitting) > 1 or not fitting and not partial:
            raise DataError(f"{source}: {len(fitting)} tables named ...{name}.csv; one is expected")
        for table in fitting:
            home = table.parent
            ieee = home.name.startswith("2.")
            folder = subfolder(subfolder(home.parent, "1."), letter) if ieee else layout.entry(home, kaggle)
            found += _part(table, folder, split, partial)
    if not found:
        raise DataError(f"{source}: no tables named RFMiD_Training_Labels.csv and so on are here")
    counts = {split: sum(one.split == split for one in found) for split in PARTS}
    layout.require_counts(source, counts, COUNTS, partial=partial)
    return found


def _part(table: Path, folder: Path, split: str, partial: bool) -> list[Sample]:
    rows = tables.keyed(table, tables.read(table, ("ID", "Disease_Risk", *CODES)), "ID", _row)
    files = by_stem(folder, layout.PICTURES)
    return [
        Sample(
            key=name,
            image=path,
            split=split,
            patient=f"{split}/{name}",
            modality="CFP",
            labels=labels.one_of_many(diseases),
            diseases=diseases,
        )
        for name, diseases, path in layout.joined(rows, files, table=table, folder=folder, partial=partial)
    ]


def _row(row: tables.Row) -> tuple[str, ...]:
    found = tables.flagged(row, CODES)
    if tables.code(row, "Disease_Risk", {"0": False, "1": True}) != bool(found):
        raise DataError(f"Disease_Risk {row['Disease_Risk']} with {len(found)} diseases")
    return found or (labels.NORMAL,)


class Rfmid(SampleBuilder):
    """RFMiD as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get RFMiD from IEEE DataPort or Kaggle and unpack it here."
    samples = staticmethod(samples)
