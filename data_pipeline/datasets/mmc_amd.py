"""MMC-AMD: colour fundus photographs and OCT B-scans in four classes of macular degeneration.

Layout: github.com/li-xirong/mmc-amd, its notebooks and scripts read there; the archive comes on request and
was not checked. Of the two published splits the one by patients is taken (splitAP). A name says everything:
modality, class, person, eye, as in "f-d-ICG-5579-r"; where the annotations are there too (class 0 to 3), both
have to agree. Raw images are preferred to those with CLAHE or a median filter, and of them those of 448 x
448 pixels, which FunBench shows. The README counts one image of each modality less than the image sets name:
where the archive lacks it, say `partial`. The test part is never in "train": FunBench draws on it.
"""

import re
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipeline.datasets import labels, layout
from data_pipeline.datasets.base import Sample, by_stem
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.records import DataError

CLASSES = {"h": labels.NORMAL, "n": labels.NORMAL, "d": labels.AMD_DRY, "p": labels.PCV, "w": labels.AMD_WET}
DISEASES = (labels.NORMAL, labels.AMD_DRY, labels.PCV, labels.AMD_WET)  # in the order of the codes 0 to 3
MODALITIES = {"cfp": ("f", "CFP"), "oct": ("o", "OCT")}
COUNTS = {
    ("cfp", "train"): 934,
    ("cfp", "val"): 80,
    ("cfp", "test"): 80,
    ("oct", "train"): 1024,
    ("oct", "val"): 134,
    ("oct", "test"): 131,
}
EYES = {"r": "OD", "l": "OS", None: ""}
_NAME = re.compile(r"([fo])-([hndpw])-(.+?)(?:-([lr]))?(?:_[^_]*)*", re.IGNORECASE)


def samples(source: Path, *, partial: bool = False) -> list[Sample]:
    """List MMC-AMD.

    Args:
      source: the folder with "mmc-amd-splitAP-train" and so on and, in it or in "mmc-amd", "ImageData".
      partial: accept a copy that lacks images.

    Raises DataError naming all names that are none of the publisher's, or that contradict the annotations,
    all missing files, or the counts that are wrong.
    """
    root = layout.root(source, "mmc-amd-splitAP-train")
    found: list[Sample] = []
    counts: dict[str, int] = {}
    for kind, (letter, modality) in MODALITIES.items():
        folder = _images(source, kind)
        files = by_stem(folder, layout.PICTURES)
        names: dict[str, str] = {}
        for split in ("train", "val", "test"):
            table = root / f"mmc-amd-splitAP-{split}" / "ImageSets" / f"{kind}.txt"
            here = _listed(table, letter)
            counts[f"{kind} {split}"] = len(here)
            names |= dict.fromkeys(here, split)
        files = {stem: path for stem, path in files.items() if stem in {name.lower() for name in names}}
        for name, split, path in layout.joined(names, files, table=root, folder=folder, partial=partial):
            _, letter_, person, eye = _parts(name)
            found.append(
                Sample(
                    key=name,
                    image=path,
                    split=split,
                    patient=f"{letter_}-{person}",
                    eye=EYES[eye],
                    modality=modality,
                    labels={"disease": CLASSES[letter_]},
                )
            )
    published = {f"{kind} {split}": n for (kind, split), n in COUNTS.items()}
    layout.require_counts(source, counts, published, partial=partial)
    return layout.reported("MMC-AMD", found)


def _images(source: Path, kind: str) -> Path:
    home = layout.entry(layout.root(source, "ImageData"), "ImageData")
    folders = sorted(path for path in home.iterdir() if path.name.lower().startswith(kind))
    raw = [path for path in folders if not re.search("clahe|median", path.name.lower())] or folders
    shown = [path for name in (f"{kind}-448x448", kind) for path in raw if path.name.lower() == name]
    if not shown and len(raw) != 1:
        raise DataError(
            f"{home}: {len(raw)} folders named {kind}..., none of them {kind} or "
            f"{kind}-448x448; leave one of them there"
        )
    return (shown or raw)[0]


def _parts(name: str) -> tuple[str, str, str, str | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError("no name of the publisher's")
    kind, letter, person, eye = match.groups()
    return kind.lower(), letter.lower(), person, eye.lower() if eye else None


def _listed(table: Path, letter: str) -> list[str]:
    """The names in an image set, checked against themselves and against the annotations line by line."""
    names, bad = _lines(table), []
    notes = table.parent.parent / "annotations" / table.name
    codes = [line.split()[-1] for line in _lines(notes)] if notes.is_file() else [""] * len(names)
    if len(codes) != len(names):
        raise DataError(f"{notes}: {len(codes)} lines, but {table} has {len(names)}")
    for number, (name, noted) in enumerate(zip(names, codes, strict=True), 1):
        try:
            kind, code, _, _ = _parts(name)
        except DataError as error:
            bad.append(f"line {number} ({name}: {error})")
            continue
        said = str(DISEASES.index(CLASSES[code]))
        if kind != letter or noted not in ("", said) or names.index(name) < number - 1:
            bad.append(
                f"line {number} ({name}: other modality, there twice, or class {noted} in annotations)"
            )
    if bad:
        raise DataError(f"{table}: {len(bad)} bad rows: {', '.join(bad)}")
    return names


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; check --source against the publisher's layout")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


class MmcAmd(SampleBuilder):
    """MMC-AMD as a TFDS data set; `manual_dir` is the folder that `samples` takes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Ask for MMC-AMD by the form of github.com/li-xirong/mmc-amd and unpack it here."
    )
    samples = staticmethod(samples)
