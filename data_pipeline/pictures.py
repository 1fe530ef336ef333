"""Every picture once, in shards: of a finished directory of Examples, or of a folder of image files.

Several Examples ask about one picture; here it goes by the id of the first of them. A file goes by its path.
Users: `decontaminate`, and `votes`.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore

from data_pipeline import files, manifest, stages
from data_pipeline.jobs import ShardInput
from fundus_jax.records import DataError, Example

SHARD_SIZE = 500
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
BENCHMARK = "benchmark"  # the split of a folder's images


@dataclass(frozen=True)
class Picture:
    """Where the bytes of a picture are: a file, or one record of an ArrayRecord file."""

    name: str
    split: str
    file: Path
    index: int | None = None

    def read(self) -> bytes | Path:
        """What `images.decode` takes. Raises DataError if there is no such record."""
        if self.index is None:
            return self.file
        if not self.file.is_file():
            raise DataError(f"{self.file.name} is missing; run the ingest job again")
        reader = ArrayRecordReader(str(self.file))
        if self.index >= reader.num_records():
            raise DataError(
                f"{self.file.name} has {reader.num_records()} images, none of number {self.index}"
            )
        return reader.read([self.index])[0]


def shards(source: Path, prefix: str) -> list[ShardInput]:
    """The pictures of a folder or of a directory of Examples; `prefix` makes the shards' names unique."""
    return _of_stage(source, prefix) if is_stage(source) else _of_folder(source, prefix)


def is_stage(source: Path) -> bool:
    """Whether a directory is a job's."""
    return (source / manifest.JOB).is_file()


def named(directory: Path, examples: Sequence[Example], *, foreign: bool = False) -> dict[str, Example]:
    """Name of each picture -> the first of some Examples that asks about it. With `foreign` the directory is
    part of the name, as two directories may hold the same ids."""
    first: dict[str, Example] = {}
    for one in examples:
        first.setdefault(one.image, one)
    return {f"{directory}/{one.id}" if foreign else one.id: one for one in first.values()}


def of(directory: Path, example: Example, name: str = "") -> Picture:
    """The picture that an Example of a directory asks about; it goes by the Example's id, or by `name`."""
    file, _, index = example.image.partition("#")
    return Picture(name or example.id, example.split, directory / file, int(index))


def _of_stage(directory: Path, prefix: str) -> list[ShardInput]:
    """The key of each shard hashes its records and its images."""
    return [
        ShardInput(
            f"{prefix}-{entry.name}",
            files.digest(sorted((name, facts["sha256"]) for name, facts in entry.files.items())),
            functools.partial(_recorded, directory, entry.name, prefix != "0"),
        )
        for entry in manifest.complete(directory)
    ]


def _recorded(directory: Path, shard: str, foreign: bool) -> list[Picture]:
    found = named(directory, stages.load(directory, shard, Example), foreign=foreign)
    return [of(directory, one, name) for name, one in found.items()]


def _of_folder(folder: Path, prefix: str) -> list[ShardInput]:
    """The key of each shard hashes names and sizes: a file replaced by one of the same size goes
    unnoticed."""
    found = [Picture(str(path), BENCHMARK, path) for path in _walk(folder)]
    if not found:
        raise DataError(f"{folder}: no image ({', '.join(SUFFIXES)}) is in this folder or below it")
    return [
        ShardInput(
            f"{prefix}-{number:05d}",
            files.digest([[one.name, one.file.stat().st_size] for one in found[start : start + SHARD_SIZE]]),
            found[start : start + SHARD_SIZE],
        )
        for number, start in enumerate(range(0, len(found), SHARD_SIZE))
    ]


def _walk(folder: Path) -> Iterator[Path]:
    """The image files in a folder and below, in order; hidden ones and links to folders are left out."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for inner, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from files.listing(Path(inner), SUFFIXES)
