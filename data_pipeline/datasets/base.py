"""What every data set tells about an image, before any question is asked: the `Sample`.

A builder's `samples(source)` only lists: names and label tables, no full-size pixels, so it takes seconds.
Masks are read where the images are, in the worker that writes their shard, by `annotated`. Users: `ingest`,
and `builder`, which shows the same samples as a TFDS data set.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_pipeline import files
from data_pipeline.datasets import masks
from data_pipeline.datasets.cut import Cut
from fundus_jax.records import Box, DataError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and what its publisher says of it.

    Attributes:
      key: unique in its split and stable, e.g. "B/IDRiD_001".
      image: the image file, or a part of one; or encoded bytes, for images that this program draws.
      split: "train", "val" or "test", as published.
      patient: the same for all images of one patient (or of one eye, where no more is known), whatever their
        split; no two patients share it.
      eye: "OD", "OS", or "" where it is not known.
      modality: "CFP", "OCT" or "UWF".
      labels: task -> answer, e.g. {"disease": "Moderate NPDR", "dr_grade": "Moderate NPDR"}.
      diseases: all that the publisher states of this image, where several can be; `labels` has `disease` only
        if it is one.
      searched: the findings that the publisher looked for in this image, present or not; after `annotated`
        without those of which nothing is said.
      masks: finding -> its mask files, or parts of files (none: the publisher says it is absent); None where
        there are no masks.
      excluded: the value of pixels in mask files about which the publisher says nothing; 0: there are none.
      findings: names of the pixel findings, sorted; None without masks, or before `annotated` read them.
      boxes: where they are, the largest of each finding first.
    """

    key: str
    image: Path | bytes | Cut
    split: str
    patient: str
    modality: str
    eye: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    diseases: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()
    masks: Mapping[str, tuple[Path | Cut, ...]] | None = None
    excluded: int = 0
    findings: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] = ()


def picture(sample: Sample) -> Path | bytes:
    """The image of a sample as a file or as encoded bytes: a part of a file is cut out and encoded."""
    return sample.image.encoded() if isinstance(sample.image, Cut) else sample.image


def annotated(sample: Sample) -> Sample:
    """The sample with its image cut out (if it is a part of a file), findings and boxes read from its masks.

    Raises DataError if image or mask can not be read, or a mask is of another size than the image.
    """
    image = picture(sample)
    sample = replace(sample, image=image)
    if sample.masks is None or sample.findings is not None:
        return sample
    boxes: list[Box] = []
    for name, paths in sorted(sample.masks.items()):
        if paths:
            boxes += masks.boxes(name, masks.union(paths, image))
    found = {box.finding for box in boxes}
    searched = tuple(name for name in sample.searched if name in found or not _open(sample, name))
    return replace(sample, searched=searched, findings=tuple(sorted(found)), boxes=tuple(boxes))


def _open(sample: Sample, finding: str) -> bool:
    """Whether a mask of a finding has pixels about which the publisher says nothing."""
    paths = (sample.masks or {})[finding] if sample.excluded else ()
    return any(isinstance(path, Path) and masks.holds(path, sample.excluded) for path in paths)


def fingerprint(samples: Iterable[Sample]) -> str:
    """Hash of a list of samples as they are on disk: keys, labels, splits, and names and sizes of the files.

    File contents are not read: a file replaced by another of the same size goes unnoticed.
    """

    def of(image: Path | bytes | Cut) -> list[object]:
        if isinstance(image, Cut):
            return [*of(image.file), image.draw.__qualname__, *image.part]
        return [image.name, image.stat().st_size] if isinstance(image, Path) else [image.hex()]

    return files.digest(
        [
            [s.key, s.split, s.patient, s.modality, s.eye, s.labels, *s.diseases, of(s.image)]
            + [[name, [of(path) for path in paths]] for name, paths in sorted((s.masks or {}).items())]
            + ([s.excluded] if s.excluded else [])
            for s in samples
        ]
    )


def by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by lower-case name without suffix. Raises DataError if two share one."""
    return stems(files.listing(folder, suffixes), folder)


def stems(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Files by lower-case name without suffix. Raises DataError naming two of `folder` that share one."""
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.stem.lower(), path)
        if other != path:
            raise DataError(f"{folder}: {other.name} and {path.name} have the same name; remove one of them")
    return found


def subfolder(parent: Path, start: str) -> Path:
    """The folder in `parent` whose name begins with `start` in any case; DataError for none or several."""
    inside = sorted(parent.iterdir()) if parent.is_dir() else []
    found = [path for path in inside if path.is_dir() and path.name.lower().startswith(start.lower())]
    if len(found) != 1:
        what = "no folder" if not found else f"{len(found)} folders"
        raise DataError(f"{parent}: {what} named {start}...; check --source against the publisher's layout")
    return found[0]
