"""From records and images on disk to batches: what every loop and every evaluation reads with.

A stage directory of the pipeline is shards and a manifest; `read_stage` checks each shard against it. Images
are records of ArrayRecord files, opened on demand. Batches come from Grain, whose iterator state travels in
the checkpoint, so that a resumed run goes on with the very next batch. Neighbours: `records` (the formats),
`models.batch` (what a batch is).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from fundus_jax import hosts
from fundus_jax.records import ConfigError, DataError, Example, Findings, Knowledge, Trace, read_jsonl

R = TypeVar("R", Example, Findings, Trace, Knowledge)
THREADS = min(16, os.cpu_count() or 1)  # that make a batch each; 64 rows take one about a second
HELD = 2_000_000_000  # bytes of batches a process holds ahead; 64 rows of 448 x 448 pixels have 308 million
MAX_PIXELS = 100_000_000  # the largest fundus photographs in use have about 16 million
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int


def read_stage(directory: str | Path, cls: type[R]) -> Iterator[R]:
    """All records of a finished stage directory, in shard order.

    Raises DataError where there is no manifest, where a shard of the job was not published yet, or where one
    is missing or is not what was published.
    """
    directory = Path(directory)
    manifest, job = directory / "manifest.jsonl", directory / "job.json"
    if not manifest.is_file():
        raise DataError(f"{manifest} is missing: {directory} is no finished stage directory; run its job")
    published: dict[str, str] = {}
    for line in manifest.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            published[entry["name"]] = entry["files"][f"{entry['name']}.jsonl"]["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{manifest}: not a manifest line: {line[:80]!r}; run the job again") from error
    wanted = json.loads(job.read_text(encoding="utf-8"))["shards"] if job.is_file() else []
    if not published.keys() >= set(wanted):
        raise DataError(f"{directory} has {len(published)} of {len(wanted)} shards; run its job to the end")
    for name, sha256 in published.items():
        path = directory / f"{name}.jsonl"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise DataError(f"{path} is missing or not what {manifest.name} lists; run the job again")
        yield from read_jsonl(path, cls)


@functools.lru_cache(maxsize=64)
def _reader(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is missing, though an Example names it; run the ingest job again")
    return ArrayRecordReader(str(path))


def load_image(directory: str | Path, key: str) -> Image.Image:
    """The picture of `Example.image` ("FILE#INDEX") in the examples' stage directory; pixels are decoded when
    used."""
    name, _, index = key.partition("#")
    reader = _reader(Path(directory) / name)
    if not index.isdigit() or int(index) >= reader.num_records():
        raise DataError(
            f"{Path(directory) / name} has {reader.num_records()} images, none of number {index!r}"
        )
    return open_image(reader.read([int(index)])[0], key)


def open_image(data: bytes | Path, where: str) -> Image.Image:
    """A picture from its bytes, or from its file, of which the head alone is read. Raises DataError, naming
    `where`, for another type than FORMATS or more than MAX_PIXELS pixels."""
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable {', '.join(FORMATS)} image ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{where}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
    return image


def image_size(data: bytes | Path, where: str) -> Size:
    """The size of a picture without its pixels. Raises DataError as `open_image`."""
    with open_image(data, where) as image:
        return Size(*image.size)


def decoded(image: Image.Image, where: str) -> Image.Image:
    """The picture with its pixels in memory. Raises DataError, naming `where`, where they can not be read, as
    in a file that was cut off."""
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
        raise DataError(f"{where}: its pixels can not be read: {error}") from error
    return image


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The records of a workdir's data directory: examples of one split in order, and what is known about them
    by id."""

    directory: Path
    examples: tuple[Example, ...]
    findings: dict[str, Findings]
    traces: dict[str, Trace]
    knowledge: dict[tuple[str, str], Knowledge]
    seen: dict[str, Size] = field(default_factory=dict, compare=False)  # by key; shared by what is chosen

    def image(self, example: Example) -> Image.Image:
        """The example's picture."""
        return load_image(self.directory / "examples", example.image)

    def sizes(self, examples: Iterable[Example]) -> list[Size]:
        """The sizes of the examples' pictures. Each picture is read once by one of the processes, which call
        this together. Raises DataError for one that can not be had, ConfigError on the others."""
        keys = [example.image for example in examples]
        new = [key for key in dict.fromkeys(keys) if key not in self.seen]

        def measured(part: Sequence[str]) -> list[Size]:
            with ThreadPoolExecutor(THREADS) as threads:
                found = threads.map(lambda key: load_image(self.directory / "examples", key).size, part)
                return [Size(*size) for size in found]

        self.seen.update((key, Size(*size)) for key, size in zip(new, hosts.deal(new, measured), strict=True))
        return [self.seen[key] for key in keys]

    def choose(
        self, *, tasks: Sequence[str] = (), part: tuple[float, float] = (0.0, 1.0), salt: str = ""
    ) -> Pool:
        """The examples of some tasks (all if empty) whose patient falls into `part` of [0, 1) by its hash.

        Two disjoint parts share no patient, so one may be kept from the other's training. Parts by another
        `salt` are drawn independently.
        """
        low, high = (int(bound * 2**32) for bound in part)

        def place(patient: str) -> int:
            return int.from_bytes(hashlib.sha256((salt + patient).encode()).digest()[:4], "big")

        kept = tuple(
            e
            for e in self.examples
            if (not tasks or e.task in tasks) and low <= place(f"{e.dataset}/{e.patient}") < high
        )
        if not kept:
            raise ConfigError(
                f"no example of {len(self.examples)} has a task in {list(tasks)} and lies in part {part}"
            )
        return replace(self, examples=kept)


def open_pool(directory: str | Path, split: str) -> Pool:
    """Read `directory`/{examples,findings,traces,knowledge}; only `split` of the examples, and where they
    were decontaminated (`directory`/clean) only what was left of them; where traces were reviewed
    (`directory`/reviewed), those that held."""
    directory = Path(directory)
    traces = directory / ("reviewed" if (directory / "reviewed").is_dir() else "traces")
    source = directory / ("clean" if (directory / "clean").is_dir() else "examples")
    examples = tuple(e for e in read_stage(source, Example) if e.split == split)
    if not examples:
        raise DataError(f"{source} has no example of split {split!r}")
    return Pool(
        directory=directory,
        examples=examples,
        findings={record.example: record for record in read_stage(directory / "findings", Findings)},
        traces={record.example: record for record in read_stage(traces, Trace)},
        knowledge={
            (record.label, record.modality): record
            for record in read_stage(directory / "knowledge", Knowledge)
        },
    )


def batches(
    count: int,
    size: int,
    build: Callable[[np.ndarray], Any],
    *,
    seed: int,
    groups: Sequence[Sequence[int]] | None = None,
    ahead: int = 2,
) -> Any:
    """An endless Grain iterator of `build(indices [size])` over [0, count), reshuffled every epoch; batches
    may straddle epochs. `ahead` of them are made ahead, side by side, and so many are held at most.

    groups: the same indices in parts (see `ladder`); then a batch comes from one part, and the parts take
    turns in proportion to their size. `get_state`/`set_state` of the iterator name its place exactly. Raises
    ConfigError when there is less than one batch.
    """
    if count < size:
        raise ConfigError(
            f"a batch of {size} rows needs at least as many records, there are {count}; lower the batch size"
        )
    parts = [range(count)] if groups is None else [np.asarray(group).tolist() for group in groups]
    orders = [grain.MapDataset.source(part).seed(seed).shuffle().repeat().batch(size) for part in parts]
    order = grain.MapDataset.mix(orders, weights=[len(part) for part in parts])
    options = grain.ReadOptions(num_threads=min(THREADS, ahead), prefetch_buffer_size=ahead)
    return iter(order.map(build).to_iter_dataset(options))


def ahead_of(size: int) -> int:
    """How many batches of `size` bytes to make ahead: one a thread, as far as they fit into HELD; at least
    two, so that one is made while another waits."""
    return max(2, min(THREADS, HELD // max(1, size)))


def ladder(lengths: Sequence[int], most: int, least: int) -> list[list[int]]:
    """Records in at most `most` groups of like length, ascending, about equally many in each and no fewer
    than `least` (a batch); one group where there are not so many, or all are of one length."""
    order = np.argsort(lengths, kind="stable")
    groups: list[list[int]] = []
    for part in np.array_split(order, max(1, min(most, len(order) // least))):
        if groups and lengths[groups[-1][-1]] == lengths[part[-1]]:
            groups[-1] += part.tolist()
        else:
            groups.append(part.tolist())
    return groups


def pack(sizes: Sequence[tuple[int, int]], capacity: tuple[int, int], *, seed: int) -> list[list[int]]:
    """Which records of (tokens, patches) share a row of this `capacity`: indices by row, each record once.

    Longest first, each into the fullest row that still holds it ("best fit decreasing"), equal lengths in an
    order of the seed. A function of its arguments alone, so a resumed run packs as before; what an epoch
    shuffles is the rows. Raises ConfigError for a record that no row holds.
    """
    for record in sizes:
        if record[0] > capacity[0] or record[1] > capacity[1]:
            raise ConfigError(f"a record of {record} tokens and patches fits into no row of {capacity}")
    rows: list[list[int]] = []
    patches: list[int] = []  # left in each row
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    mixed = np.random.default_rng(seed).permutation(len(sizes)).tolist()
    for record in sorted(mixed, key=lambda index: -sizes[index][0]):
        tokens, slots = sizes[record]
        place = bisect.bisect_left(free, (tokens, 0))
        while place < len(free) and patches[free[place][1]] < slots:
            place += 1
        if place == len(free):
            left, row = capacity[0], len(rows)
            rows.append([])
            patches.append(capacity[1])
        else:
            left, row = free.pop(place)
        rows[row].append(record)
        patches[row] -= slots
        bisect.insort(free, (left - tokens, row))
    return rows


def round_up(size: int, step: int) -> int:
    """`size` rounded up to a multiple of `step`, at least one."""
    return max(1, -(-size // step)) * step
