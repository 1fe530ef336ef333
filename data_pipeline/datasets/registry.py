"""The table of data sets: one row each, and the module that reads the publisher's folders.

A row only names its module, which is imported when the data set is asked for: the list can be shown, and a
phantom drawn in a worker, without TFDS and everything else that a builder needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from data_pipeline.datasets.base import Sample
from fundus_jax.records import ConfigError


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a user has to know before asking for a data set, and the answers its questions choose from."""

    module: str  # in this package; has samples(source, *, partial) -> list[Sample]; "" for what is drawn
    title: str
    modalities: tuple[str, ...]
    images: str
    tasks: tuple[str, ...]
    pixel_labels: str
    licence: str
    where: str
    diseases: tuple[str, ...]  # options of the task `disease`; () where they depend on the modality


_DR = ("Normal", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")

DATASETS: dict[str, Row] = {
    "idrid": Row(
        module="idrid",
        title="Indian Diabetic Retinopathy Image Dataset, parts A and B",
        modalities=("CFP",),
        images="516 graded (413 train, 103 test); 81 with masks (54 train, 27 test)",
        tasks=("disease", "dr_grade", "modality", "lesion_presence", "lesion_location"),
        pixel_labels="microaneurysm, haemorrhage, hard exudate, cotton-wool spot (81 images)",
        licence="CC BY 4.0",
        where="IEEE DataPort, doi 10.21227/H25W98",
        diseases=_DR,
    ),
    "phantom": Row(
        module="",
        title="Phantoms: retinas drawn by program, no patient's",
        modalities=("CFP", "UWF", "OCT"),
        images="as many as asked for",
        tasks=("disease", "dr_grade", "modality", "laterality", "lesion_presence", "lesion_location"),
        pixel_labels="every finding that is drawn",
        licence="this project's",
        where="drawn here: needs no --source",
        diseases=(),
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


def table() -> str:
    """All rows as text for a terminal."""
    lines = []
    for name, one in sorted(DATASETS.items()):
        lines += [f"{name}: {one.title}", f"  {', '.join(one.modalities)}; {one.images}"]
        lines += [f"  tasks: {', '.join(one.tasks)}", f"  pixel labels: {one.pixel_labels}"]
        lines += [f"  licence: {one.licence}; get it from: {one.where}", ""]
    return "\n".join(lines)
