"""The table of data sets: one row each, and the module that reads the publisher's folders.

A row only names its module, which is imported when the data set is asked for: the list can be shown, and a
phantom drawn in a worker, without TFDS and everything else that a builder needs. The order is that of the
paper's Table 2.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from data_pipeline.datasets.base import Sample
from fundus_jax.records import ConfigError

WIDTH = 100  # columns of `table`


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a user has to know before asking for a data set."""

    module: str  # in this package; has samples(source, *, partial) and DISEASES; "" for what is drawn
    title: str
    modalities: tuple[str, ...]
    images: str
    tasks: tuple[str, ...]
    pixel_labels: str
    licence: str
    citation: str
    where: str


_GRADED = ("disease", "dr_grade", "modality")
_LESIONS = ("lesion_presence", "lesion_location")
_NONE = "none"

DATASETS: dict[str, Row] = {
    "fgadr_143_9": Row(
        module="fgadr_143_9",
        title="FGADR-143-9: re-annotation of 143 images of FGADR",
        modalities=("CFP",),
        images="143 (no published split: by hash)",
        tasks=(*_GRADED, *_LESIONS),
        pixel_labels="nine lesions, as the user's table says (143 images)",
        licence="on request, no redistribution, non-commercial (FGADR); terms of the masks unknown",
        citation="Kheradfallah et al. 2022, SPIE 12033:502-511; FGADR: Zhou et al. 2021, IEEE TMI 40:818-828",
        where="the authors of both; layout unknown: the head of datasets/fgadr_143_9.py asks for a table",
    ),
    "idrid": Row(
        module="idrid",
        title="IDRiD: Indian Diabetic Retinopathy Image Dataset, parts A and B",
        modalities=("CFP",),
        images="516 graded (413 train, 103 test); 81 with masks (54 train, 27 test)",
        tasks=(*_GRADED, "dme_risk", *_LESIONS),
        pixel_labels="microaneurysm, haemorrhage, hard exudate, cotton-wool spot (81 images)",
        licence="CC BY 4.0",
        citation="Porwal et al. 2018, Data 3(3):25",
        where="IEEE DataPort, doi 10.21227/H25W98",
    ),
    "grape": Row(
        module="grape",
        title="GRAPE: follow-up of glaucoma with photographs and visual fields",
        modalities=("CFP",),
        images="631 of 263 eyes (no published split: patients by hash)",
        tasks=("progression", "modality", "laterality"),
        pixel_labels=_NONE,
        licence="CC BY 4.0 or CC0: sources differ, see the page of the download",
        citation="Huang et al. 2023, Scientific Data 10:520",
        where="figshare, collection 6406319",
    ),
    "jsiec": Row(
        module="jsiec",
        title="JSIEC: 39 classes of fundus photographs (1000images)",
        modalities=("CFP",),
        images="1000 (no published split: by hash)",
        tasks=("disease", "modality"),
        pixel_labels=_NONE,
        licence='no standard licence ("other, open")',
        citation="Cen et al. 2021, Nature Communications 12:4828",
        where="Zenodo 3477553, or Kaggle linchundan/fundusimage1000",
    ),
    "retinal_lesions": Row(
        module="retinal_lesions",
        title="Retinal-Lesions: images of EyePACS with lesion masks and new grades",
        modalities=("CFP",),
        images="1593 (no published split: patients by hash)",
        tasks=(*_GRADED, *_LESIONS),
        pixel_labels="eight lesions of diabetic retinopathy (1593 images)",
        licence="research only, on request",
        citation="Wei et al. 2020, ICPR",
        where="the form of github.com/WeiQijie/retinal-lesions",
    ),
    "rfmid": Row(
        module="rfmid",
        title="RFMiD: Retinal Fundus Multi-disease Image Dataset",
        modalities=("CFP",),
        images="3200 (1920 train, 640 val, 640 test)",
        tasks=("disease", "disease_presence", "modality"),
        pixel_labels=_NONE,
        licence="CC BY 4.0 (article); Kaggle's copy says CC BY-SA",
        citation="Pachade et al. 2021, Data 6(2):14",
        where="IEEE DataPort, doi 10.21227/s3g7-st65, or Kaggle andrewmvd/retinal-disease-classification",
    ),
    "odir": Row(
        module="odir",
        title="OIA-ODIR: Ocular Disease Intelligent Recognition, both eyes of 5000 patients",
        modalities=("CFP",),
        images="10000 before exclusions (7000 train, 1000 val, 2000 test)",
        tasks=(*_GRADED, "disease_presence", "laterality"),
        pixel_labels=_NONE,
        licence="research only",
        citation="Li et al. 2021, Bench 2020 (LNCS 12614), doi 10.1007/978-3-030-71058-3_11",
        where="the links of github.com/nkicsl/OIA-ODIR; training part also as ODIR-5K at Kaggle",
    ),
    "ddr": Row(
        module="ddr",
        title="DDR: diabetic retinopathy grades and lesion masks",
        modalities=("CFP",),
        images="12522 graded (6260 train, 2503 val, 3759 test); 757 with masks (383, 149, 225)",
        tasks=(*_GRADED, *_LESIONS),
        pixel_labels="microaneurysm, haemorrhage, hard exudate, cotton-wool spot (757 images)",
        licence="MIT (the repository's)",
        citation="Li et al. 2019, Information Sciences 501:511-522",
        where="the links of github.com/nkicsl/DDR-dataset",
    ),
    "octid": Row(
        module="octid",
        title="OCTID: Optical Coherence Tomography Image Database",
        modalities=("OCT",),
        images="572 (no published split: by hash)",
        tasks=("disease", "modality"),
        pixel_labels=_NONE,
        licence="sources differ, see the page of the download",
        citation="Gholami et al. 2020, Computers & Electrical Engineering 81:106532",
        where="Borealis Dataverse (University of Waterloo), five archives",
    ),
    "octdl": Row(
        module="octdl",
        title="OCTDL: B-scans of seven diagnoses",
        modalities=("OCT",),
        images="2064 of 820 patients (no published split: patients by hash)",
        tasks=("disease", "amd_grade", "modality"),
        pixel_labels=_NONE,
        licence="CC BY 4.0",
        citation="Kulyabin et al. 2024, Scientific Data 11:365",
        where="Mendeley Data sncdhf53xc",
    ),
    "oimhs": Row(
        module="oimhs",
        title="OIMHS: macular holes with masks",
        modalities=("OCT",),
        images="3859 of 125 eyes (no published split: patients by hash)",
        tasks=("modality", *_LESIONS),
        pixel_labels="macular hole, intraretinal fluid (3859 images)",
        licence="CC0",
        citation="Ye et al. 2023, Scientific Data 10:769",
        where="figshare 23508453",
    ),
    "retouch": Row(
        module="retouch",
        title="RETOUCH: fluid in volumes of three devices",
        modalities=("OCT",),
        images="6936 B-scans of 70 volumes (no published split with masks: volumes by hash)",
        tasks=("modality", *_LESIONS),
        pixel_labels="intraretinal fluid, subretinal fluid, pigment epithelial detachment (6936 B-scans)",
        licence="under the challenge's agreement",
        citation="Bogunovic et al. 2019, IEEE TMI 38:1858-1874",
        where="retouch.grand-challenge.org",
    ),
    "neh": Row(
        module="neh",
        title="NEH: B-scans of normal eyes, drusen and CNV",
        modalities=("OCT",),
        images="16822 of 441 patients (no published split: patients by hash)",
        tasks=("disease", "modality"),
        pixel_labels=_NONE,
        licence="CC BY 4.0",
        citation="Sotoudeh-Paima et al. 2022, Computers in Biology and Medicine 144:105368",
        where="Mendeley Data 8kt969dhx6",
    ),
    "ucsd": Row(
        module="ucsd",
        title="UCSD: Large Dataset of Labeled OCT Images (Kermany)",
        modalities=("OCT",),
        images="109309 (108309 train, 1000 test); Kaggle's version 84484 (83484, 32 val, 968)",
        tasks=("disease", "modality"),
        pixel_labels=_NONE,
        licence="CC BY 4.0",
        citation="Kermany et al. 2018, Cell 172:1122-1131",
        where="Mendeley Data rscbjbr9sj, or Kaggle paultimothymooney/kermany2018",
    ),
    "top": Row(
        module="top",
        title="TOP: Tsukazaki Optos Public",
        modalities=("UWF",),
        images="13047 (no published split: patients by hash)",
        tasks=("disease", "disease_presence", "modality", "laterality"),
        pixel_labels=_NONE,
        licence="none stated",
        citation="DateCazuki 2022, github.com/DateCazuki/Fundus_Diagnosis",
        where="github.com/DateCazuki/Fundus_Diagnosis",
    ),
    "deepdrid": Row(
        module="deepdrid",
        title="DeepDRiD: regular and ultra-widefield photographs with grades",
        modalities=("CFP", "UWF"),
        images="2000 CFP (1200 train, 400 val, 400 test); 256 UWF (154, 50, 52); less the ungradable",
        tasks=(*_GRADED, "laterality"),
        pixel_labels=_NONE,
        licence="no licence file; CC BY-SA by catalogues",
        citation="Liu et al. 2022, Patterns 3(6):100512",
        where="github.com/deepdrdoc/DeepDRiD",
    ),
    "mmc_amd": Row(
        module="mmc_amd",
        title="MMC-AMD: photographs and B-scans in four classes",
        modalities=("CFP", "OCT"),
        images="1094 CFP (934 train, 80 val, 80 test); 1289 OCT (1024, 134, 131)",
        tasks=("disease", "modality", "laterality"),
        pixel_labels=_NONE,
        licence="research only, on request",
        citation="Wang et al. 2022, IEEE JBHI 26:4111-4122",
        where="the form of github.com/li-xirong/mmc-amd",
    ),
    "phantom": Row(
        module="",
        title="Phantoms: retinas drawn by program, no patient's",
        modalities=("CFP", "UWF", "OCT"),
        images="as many as asked for",
        tasks=(*_GRADED, "laterality", *_LESIONS),
        pixel_labels="every finding that is drawn",
        licence="this project's",
        citation="this project",
        where="drawn here: needs no --source",
    ),
}


def row(name: str) -> Row:
    """The row of a data set. Raises ConfigError naming the known ones."""
    if name not in DATASETS:
        raise ConfigError(f"data set {name!r} is unknown; known are {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def lister(name: str) -> Callable[..., list[Sample]]:
    """The `samples` function of a data set that lies in files; ConfigError for unknown or drawn ones."""
    module = row(name).module
    if not module:
        raise ConfigError(f"data set {name!r} is not read from files")
    return import_module(f"data_pipeline.datasets.{module}").samples


def diseases(name: str) -> tuple[str, ...]:
    """The answers that questions about the disease choose from; () where they depend on the modality."""
    module = row(name).module
    return import_module(f"data_pipeline.datasets.{module}").DISEASES if module else ()


def table() -> str:
    """All rows as text for a terminal of `WIDTH` columns."""
    blocks = []
    for name, one in DATASETS.items():
        fields = {
            "size": one.images,
            "tasks": ", ".join(one.tasks),
            "masks": one.pixel_labels,
            "licence": one.licence,
            "cite": one.citation,
            "from": one.where,
        }
        lines = [f"{name} ({', '.join(one.modalities)})  {one.title}"]
        for label, text in fields.items():
            lines += textwrap.wrap(
                f"  {label:8}{text}", WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
