"""What the publishers' folders have in common: where their root is, a folder a class, files that rows name.

Neighbours: `base` has the plain listings, `tables` the label tables; the builders put them together.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from absl import logging

from data_pipeline import files
from data_pipeline.datasets.base import Sample, stems
from fundus_jax.records import DataError

T = TypeVar("T")
PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
TRAIN_SHARE = 0.8  # of the patients, where no split is published; FunBench took about a fifth for itself
MOST_FILES = 1_000_000


def root(source: Path, *names: str) -> Path:
    """The folder, `source` or up to three levels below it, that has an entry for each of `names` (any case).

    Archives unpack into folders of their own name, three deep where UCSD comes from Mendeley, and people
    point at any of them. DataError if there is none.
    """
    level = [source]
    for _ in range(4):
        level = [folder for folder in level if folder.is_dir()]
        for folder in level:
            here = {path.name.lower() for path in folder.iterdir()}
            if all(name.lower() in here for name in names):
                return folder
        level = sorted(path for folder in level for path in folder.iterdir() if _visible(path.name))
    wanted = " and ".join(map(repr, names))
    raise DataError(f"{source}: no folder here has {wanted}; check --source against the publisher's layout")


def _visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))  # archives made on a Mac hold a shadow of every file


def entry(folder: Path, name: str) -> Path:
    """The entry of a folder with this name in any case; DataError if there is none."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.lower() == name.lower():
            return path
    raise DataError(f"{folder}: no {name!r} here; check --source against the publisher's layout")


def by_class(
    folder: Path, classes: Mapping[str, T], *, ignored: Sequence[str] = (), suffixes: Sequence[str] = PICTURES
) -> list[tuple[T, Path]]:
    """The files of a tree with one folder a class, each with what `classes` says of its folder (any case).

    `ignored` folders (lower case) are not looked into. Raises DataError naming all folders that are missing,
    and all that the publisher does not have.
    """
    here = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    known = {name.lower(): meaning for name, meaning in classes.items()}
    missing = [name for name in classes if name.lower() not in here]
    others = here.keys() - known.keys() - set(ignored)
    strange = sorted(here[name].name for name in others if _visible(here[name].name))
    if missing or strange:
        raise DataError(f"{folder}: folders missing: {missing}; folders that are no class: {strange}")
    return [(known[name], path) for name in known for path in files.listing(here[name], suffixes)]


def tree(folder: Path, suffixes: Sequence[str] = PICTURES) -> list[Path]:
    """All files below `folder` with one of `suffixes` (any case), sorted; links to folders are left out."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check --source against the publisher's layout")
    wanted, found = {suffix.lower() for suffix in suffixes}, []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if _visible(name)]
        if any(Path(name).suffix.lower() in wanted for name in names):
            found += files.listing(Path(parent), suffixes)
        if len(found) > MOST_FILES:
            raise DataError(f"{folder}: more than {MOST_FILES} files; this is not the publisher's layout")
    return sorted(found)


def deep_stems(folder: Path, suffixes: Sequence[str] = PICTURES) -> dict[str, Path]:
    """The files below `folder` by lower-case name without suffix. Raises DataError if two share one."""
    return stems(tree(folder, suffixes), folder)


def joined(
    rows: Mapping[str, T], found: Mapping[str, Path], *, table: Path, folder: Path, partial: bool
) -> list[tuple[str, T, Path]]:
    """(name, what its row says, file) for each row of a table, in its order.

    `found` has files by lower-case name. Raises DataError that lists all rows without a file, or all files
    without a row; in a copy that is known to be partial, rows without a file are left out, and logged.
    """
    if missing := [name for name in rows if name.lower() not in found]:
        text = f"{folder}: {len(missing)} files are missing: {', '.join(missing)}"
        if not partial:
            raise DataError(f"{text}; get the archive again, or say that the copy is partial")
        logging.warning("%s", text)
    if unlabelled := sorted(set(found) - {name.lower() for name in rows}):
        raise DataError(f"{table}: {len(unlabelled)} images have no row: {', '.join(unlabelled)}")
    return [(name, row, found[name.lower()]) for name, row in rows.items() if name.lower() in found]


def require_counts(
    source: Path, found: Mapping[str, int], published: Mapping[str, int | Sequence[int]], *, partial: bool
) -> None:
    """Raise DataError naming all parts that have another number of images than the publisher's.

    `published` may give several numbers, where archive and article differ. A partial copy may have any.
    """
    bad = []
    for part, numbers in published.items():
        allowed = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        if found.get(part, 0) not in allowed:
            bad.append(
                f"{part} has {found.get(part, 0)} images, published are {' or '.join(map(str, allowed))}"
            )
    if bad and not partial:
        raise DataError(f"{source}: {'; '.join(bad)}; get the archive again, or say that the copy is partial")


def hashed_split(dataset: str, patient: str) -> str:
    """ "train" or "test" for all images of a patient, where the publisher gives no split: by a hash alone.

    So the split needs no list and no seed, and it stays when images are added or left out.
    """
    digest = hashlib.sha256(f"{dataset}\n{patient}".encode()).digest()
    return "train" if int.from_bytes(digest[:6], "big") < TRAIN_SHARE * 2**48 else "test"


def reported(title: str, samples: Iterable[Sample]) -> list[Sample]:
    """The samples, after a line in the log: images, patients, patients on both sides of a published split."""
    listed, splits = list(samples), {}
    for sample in listed:
        splits.setdefault(sample.patient, set()).add(sample.split)
    logging.info(
        "%s: %d images of at most %d patients; %d patients stand in more than one split",
        title, len(listed), len(splits), sum(len(one) > 1 for one in splits.values()),
    )  # fmt: skip
    return listed
