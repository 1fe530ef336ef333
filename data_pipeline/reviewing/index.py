"""Where each trace stands in its file, and what it can be chosen by; the records themselves stay on the disk.

Very many traces are reviewed, so a row of the index is a few numbers, and a case is read when it is looked
at. Neighbours: `cases.py` shows a row, `server.py` asks for rows.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline import jobs, manifest, quality
from fundus_jax import records
from fundus_jax.records import DataError, Example, Findings, Knowledge, Trace

STAGES = ("examples", "findings", "traces")
FACETS = ("dataset", "modality", "task", "label", "split", "check")  # what traces can be chosen by
KEPT = "kept"
R = TypeVar("R", Example, Findings, Trace)


@dataclass(frozen=True)
class Case:
    """What is known about a row; None for what there is not."""

    example: Example
    trace: Trace
    found: Findings | None
    knowledge: Knowledge | None


@dataclass
class Index:
    """The rows of a data folder, in the order of its shards.

    Attributes:
        folder: holds examples/, findings/, traces/ and knowledge/, finished. ids: of the examples. rows: the
        other way round. places: [rows, 4] shard, and byte of the line in each file of STAGES; -1 where there
        is no line. facets: FACET -> ([rows] number of the value, values). A row's check is "kept", or the
        kind of its first
            reason.
    """

    folder: Path
    ids: list[str]
    rows: dict[str, int]
    places: NDArray[np.int64]
    facets: dict[str, tuple[NDArray[np.int32], list[str]]]
    knowledge: Mapping[tuple[str, str], Knowledge]
    shards: list[str]
    stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def case(self, row: int) -> Case:
        """The records of a row. Raises DataError where they are damaged, or not those that were indexed."""
        example, trace = self._read(row, "examples", Example), self._read(row, "traces", Trace)
        if example is None or trace is None:
            raise DataError(f"{self.ids[row]}: has no example; run the stage traces again")
        found = self._read(row, "findings", Findings)
        about = self.knowledge.get((example.answer, example.modality))
        return Case(example, trace, found, about)

    def chosen(self, filters: Mapping[str, str]) -> NDArray[np.bool_]:
        """Which rows [rows] have these values of facets; "" chooses all. Check "rejected" is any but kept."""
        mask = np.ones(len(self), bool)
        for facet, value in filters.items():
            if facet not in self.facets or not value:
                continue
            numbers, values = self.facets[facet]
            if facet == "check" and value == "rejected":
                mask &= numbers != values.index(KEPT) if KEPT in values else True
            else:
                mask &= numbers == values.index(value) if value in values else False
        return mask

    def _read(self, row: int, stage: str, cls: type[R]) -> R | None:
        at = int(self.places[row, 1 + STAGES.index(stage)])
        if at < 0:
            return None
        path = self.folder / stage / f"{self.shards[self.places[row, 0]]}.jsonl"
        if _stamp(path) != self.stamps[path]:
            raise DataError(f"{path} has changed since this page was started; start it again")
        with path.open("rb") as stream:
            stream.seek(at)
            line = stream.readline()
        return records.from_json(cls, line.decode("utf-8"), f"{path} at byte {at}")


def build(folder: Path) -> Index:
    """Read where everything stands in a folder of finished stages.

    Raises DataError for a stage that is missing, unfinished, or not what its manifest lists.
    """
    absent = [name for name in (*STAGES, "knowledge") if not (folder / name / manifest.JOB).is_file()]
    if absent:
        raise DataError(
            f"{folder}: has no finished {', '.join(absent)}; give the folder in which the jobs' directories "
            "examples, knowledge, findings and traces lie, as WORKDIR/data"
        )
    shards = [entry.name for entry in manifest.complete(folder / "traces")]
    ids: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    tables: dict[str, dict[str, int]] = {facet: {} for facet in FACETS}
    columns: dict[str, list[int]] = {facet: [] for facet in FACETS}
    stamps: dict[Path, tuple[int, int]] = {}
    listed = {stage: manifest.load(folder / stage) for stage in STAGES}
    for number, shard in enumerate(shards):
        lines = {
            stage: dict(_lines(folder / stage, listed[stage], shard, stamps))
            for stage in ("examples", "findings")
        }
        for name, (at, trace) in _lines(folder / "traces", listed["traces"], shard, stamps):
            known = lines["examples"].get(name)
            if known is None:
                raise DataError(f"{folder}/traces/{shard}.jsonl: there is no example {name!r}")
            seen = lines["findings"].get(name)
            ids.append(name)
            places.append((number, known[0], seen[0] if seen else -1, at))
            for facet, value in _facets(known[1], trace).items():
                columns[facet].append(tables[facet].setdefault(value, len(tables[facet])))
    if not ids:
        raise DataError(f"{folder}/traces: holds no trace")
    return Index(
        folder=folder,
        ids=ids,
        rows={name: row for row, name in enumerate(ids)},
        places=np.array(places, np.int64),
        facets={name: (np.array(columns[name], np.int32), list(tables[name])) for name in FACETS},
        knowledge={(one.label, one.modality): one for one in jobs.read(folder / "knowledge", Knowledge)},
        shards=shards,
        stamps=stamps,
    )


def _lines(
    directory: Path, listed: Mapping[str, manifest.Entry], shard: str, stamps: dict[Path, tuple[int, int]]
) -> Iterator[tuple[str, tuple[int, dict[str, Any]]]]:
    """(example, (byte, fields)) of every line of a shard, whose hash is checked."""
    if shard not in listed:
        raise DataError(f"{directory}: has no shard {shard}; run its job again")
    path = directory / f"{shard}.jsonl"
    stamps[path] = _stamp(path)
    manifest.check(directory, listed[shard], path.name)
    at = 0
    with path.open("rb") as stream:
        for line in stream:
            try:
                fields = json.loads(line)
                name = str(fields["id"] if directory.name == "examples" else fields["example"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} at byte {at}: not a record ({error}); run its job again") from error
            yield name, (at, fields)
            at += len(line)


def _facets(example: Mapping[str, Any], trace: Mapping[str, Any]) -> dict[str, str]:
    reasons = trace.get("reasons") or []
    return {
        "dataset": str(example.get("dataset")),
        "modality": str(example.get("modality")),
        "task": str(example.get("task")),
        "label": str(example.get("answer")),
        "split": str(example.get("split")),
        "check": quality.kind(str(reasons[0])) if reasons else KEPT,
    }


def _stamp(path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise DataError(f"{path} is missing; run its job again")
    found = path.stat()
    return found.st_mtime_ns, found.st_size
