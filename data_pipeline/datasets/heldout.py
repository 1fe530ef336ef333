"""Keeps the images of benchmarks out of "train", by the names that the benchmarks' own files give.

FunBench and OmniMedVQA say of every question which image it is about, by the publisher's name. From a user's
own copy of them `names` takes these, and `moved` puts the images, and all others of the same patients, into
"test". Where a benchmark draws on a published test part this changes nothing: no builder lists one as
"train". It matters for sets without a published split: JSIEC, Retinal-Lesions, OCTID, OCTDL, RETOUCH, NEH and
TOP. Without the benchmarks' files nobody can tell which images these are, so `ingest` stops until they are
given, or the user says "none".

What names can not tell: GMAI-MMBench gives pictures without names, and a benchmark may show an image under
another set's name. Both are for `decontaminate`, which compares pixels.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from absl import logging

from data_pipeline.datasets.base import Sample
from fundus_jax.records import ConfigError, DataError

MOST_BYTES = 1 << 30
SOURCES = {  # first folder of an image's path in a benchmark -> our data set
    "JSIEC": "jsiec",
    "Retinal-Lesions": "retinal_lesions",
    "Diabetic Retinopathy": "retinal_lesions",  # OmniMedVQA's EyePACS, whose names Retinal-Lesions keeps
    "OCTID": "octid",
    "OCTDL": "octdl",
    "RETOUCH": "retouch",
    "NEH": "neh",
    "UCSD": "ucsd",
    "OCT & X-Ray 2017": "ucsd",
    "TOP": "top",
    "DDR": "ddr",
    "OIA-ODIR": "odir",
    "DeepDRiD": "deepdrid",
    "MMC-AMD": "mmc_amd",
}
NONE = "none"
# How many parts of its path name an image; one does in the others. Numbers restart in IDRiD and RFMiD, which
# are not in SOURCES: their test parts are published.
PARTS = {"neh": 3, "octid": 2}


def folders(words: Sequence[str]) -> list[Path] | None:
    """The folders that a user gives; [] for "none", and None where nothing is said."""
    return [] if [*words] == [NONE] else [Path(word) for word in words] or None


def require_said(dataset: str, benchmarks: Sequence[Path] | None) -> None:
    """Raise ConfigError where a benchmark draws on the data set and nothing is said of benchmarks (None)."""
    if benchmarks is None and dataset in SOURCES.values():
        raise ConfigError(
            f"{dataset}: benchmarks ask about images of this data set, which would be trained on; give "
            "--benchmarks (in a run data.benchmarks) the folders of your FunBench and OmniMedVQA, or "
            f"{NONE!r} where neither will be measured"
        )


def names(folders: Iterable[Path]) -> dict[str, frozenset[str]]:
    """Data set -> the names of its images in the benchmarks below `folders` (FunBench's tree, OmniMedVQA's).

    Raises DataError for a folder without such a file, and for one that is not JSON.
    """
    found: dict[str, set[str]] = {}
    for folder in folders:
        paths = [path for file in sorted(folder.rglob("*.json")) for path in _paths(file)]
        if not paths:
            raise DataError(f"{folder}: no file of FunBench or OmniMedVQA here")
        for text in paths:
            source, *_ = parts = text.removeprefix("Images/").split("/")
            if source in SOURCES:
                name = SOURCES[source]
                found.setdefault(name, set()).add(_name(name, PurePosixPath(*parts)))
    return {name: frozenset(images) for name, images in found.items()}


def _paths(file: Path) -> list[str]:
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file}: more than {MOST_BYTES} bytes")
    try:
        data = json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("data"), dict):  # FunBench: the keys are the paths
        return [str(key) for key in data["data"]]
    if isinstance(data, list):  # OmniMedVQA: a question has its path
        return [str(one["image_path"]) for one in data if isinstance(one, dict) and "image_path" in one]
    return []


def _name(dataset: str, path: PurePosixPath | Path) -> str:
    name = "/".join(path.with_suffix("").parts[-PARTS.get(dataset, 1) :]).lower()
    # its wide-field photographs are numbered anew
    wide = dataset == "deepdrid" and any("ultra-widefield" in part.lower() for part in path.parts)
    return f"wide/{name}" if wide else name


def moved(dataset: str, samples: Sequence[Sample], held: Mapping[str, frozenset[str]]) -> list[Sample]:
    """The samples, those of `held` and all others of their patients in "test"."""
    wanted = held.get(dataset, frozenset())

    def is_held(sample: Sample) -> bool:
        path = sample.image if isinstance(sample.image, Path) else Path(f"{sample.key}.png")
        return _name(dataset, path) in wanted

    patients = {sample.patient for sample in samples if is_held(sample)}
    listed = [replace(one, split="test") if one.patient in patients else one for one in samples]
    many = sum(one is not other for one, other in zip(listed, samples, strict=True))
    changed = sum(one.split != other.split for one, other in zip(listed, samples, strict=True))
    logging.info(
        "%s: the benchmarks name %d images; %d images of %d patients are in test, %d of them were not",
        dataset, len(wanted), many, len(patients), changed,
    )  # fmt: skip
    return listed
