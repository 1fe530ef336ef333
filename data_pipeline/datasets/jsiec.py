"""JSIEC: 1000 colour fundus photographs in 39 folders, one a class ("1000images").

Layout and folder names: Cen et al. 2021 (Zenodo, Kaggle), not checked against the archive. DR1 to DR3 are the
publisher's own scale and no ICDR grades. Nothing is said of patients or eyes: every image counts as a patient
of its own, and the split goes by a hash of its name. The 35 classes that the paper keeps are not known: all
are listed here. FunBench and OmniMedVQA draw on this set: see `heldout`.
"""

from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout
from data_pipeline.datasets.base import Sample
from data_pipeline.datasets.builder import SampleBuilder

CLASSES = {
    "0.0.Normal": labels.NORMAL,
    "0.1.Tessellated fundus": labels.TESSELLATED,
    "0.2.Large optic cup": "Large optic cup",
    "0.3.DR1": "Diabetic retinopathy, stage 1 of 3",
    "1.0.DR2": "Diabetic retinopathy, stage 2 of 3",
    "1.1.DR3": "Diabetic retinopathy, stage 3 of 3",
    "2.0.BRVO": labels.BRVO,
    "2.1.CRVO": labels.CRVO,
    "3.RAO": labels.RAO,
    "4.Rhegmatogenous RD": "Rhegmatogenous retinal detachment",
    "5.0.CSCR": labels.CSC,
    "5.1.VKH disease": "Vogt-Koyanagi-Harada disease",
    "6.Maculopathy": "Maculopathy",
    "7.ERM": labels.ERM,
    "8.MH": labels.MACULAR_HOLE,
    "9.Pathological myopia": labels.PATHOLOGICAL_MYOPIA,
    "10.0.Possible glaucoma": "Possible glaucoma",
    "10.1.Optic atrophy": "Optic atrophy",
    "11.Severe hypertensive retinopathy": "Severe hypertensive retinopathy",
    "12.Disc swelling and elevation": "Disc swelling and elevation",
    "13.Dragged Disc": "Dragged disc",
    "14.Congenital disc abnormality": "Congenital disc abnormality",
    "15.0.Retinitis pigmentosa": labels.RP,
    "15.1.Bietti crystalline dystrophy": "Bietti crystalline dystrophy",
    "16.Peripheral retinal degeneration and break": "Peripheral retinal degeneration and break",
    "17.Myelinated nerve fiber": labels.MYELINATED,
    "18.Vitreous particles": "Vitreous particles",
    "19.Fundus neoplasm": "Fundus neoplasm",
    "20.Massive hard exudates": "Massive hard exudates",
    "21.Yellow-white spots-flecks": "Yellow-white spots or flecks",
    "22.Cotton-wool spots": "Cotton-wool spots",
    "23.Vessel tortuosity": labels.TORTUOUS,
    "24.Chorioretinal atrophy-coloboma": "Chorioretinal atrophy or coloboma",
    "25.Preretinal hemorrhage": "Preretinal haemorrhage",
    "26.Fibrosis": "Fibrosis",
    "27.Laser Spots": labels.LASER_SCARS,
    "28.Silicon oil in eye": "Silicone oil in the eye",
    "29.0.Blur fundus without PDR": "Blurred fundus without PDR",
    "29.1.Blur fundus with suspected PDR": "Blurred fundus with suspected PDR",
}
DISEASES = tuple(CLASSES.values())
COUNT = 1000
COPY = "1000images"  # Kaggle's archive has all classes a second time in a folder of this name


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List JSIEC.

    Args:
      source: the folder "1000images", or one above it.
      partial: accept another number of images than the publisher's.

    Raises DataError naming folders that are missing or unknown, or the count that is wrong.
    """
    found = layout.by_class(layout.root(source, "0.0.Normal"), CLASSES, ignored=(COPY,))
    layout.require_counts(source, Counter(all=len(found)), {"all": COUNT}, partial=partial)
    return [
        Sample(
            key=(key := f"{path.parent.name}/{path.stem}"),
            image=path,
            split=layout.hashed_split("jsiec", key.lower()),
            patient=key,
            modality="CFP",
            labels={"disease": disease},
        )
        for disease, path in found
    ]


class Jsiec(SampleBuilder):
    """JSIEC as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get 1000images of JSIEC from Zenodo or Kaggle and unpack it here."
    samples = staticmethod(samples)
