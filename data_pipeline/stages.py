"""Reads the shards of one stage as the input of the next.

The stages after ingest go shard by shard and keep the names, so that findings/x.jsonl and traces/x.jsonl
belong to examples/x.jsonl and each can be made again alone. Neighbours: `jobs.py` runs shards, `manifest.py`
lists them.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from data_pipeline import manifest
from data_pipeline.jobs import ShardInput
from fundus_jax import records
from fundus_jax.records import DataError

LABEL_TASKS = ("disease", "dr_grade")  # the tasks whose answer is a label that knowledge is about

R = TypeVar("R", records.Example, records.Findings, records.Knowledge, records.Trace)


def hashes(directory: Path) -> dict[str, str]:
    """Name -> sha256 of the records of each shard of a finished directory. Raises DataError if it is not."""
    return {
        entry.name: str(entry.files[f"{entry.name}.jsonl"]["sha256"])
        for entry in manifest.complete(directory)
    }


@functools.lru_cache(maxsize=8)
def _entries(directory: Path, changed: int, size: int) -> dict[str, manifest.Entry]:
    """The manifest as it was when it was `size` bytes long: read once, not once a shard."""
    del changed, size
    return manifest.load(directory)


def shards(directory: Path, cls: type[R]) -> list[ShardInput]:
    """One input a shard; its records are loaded where it is processed, and its key is their hash."""
    return [
        ShardInput(name, key, functools.partial(load, directory, name, cls))
        for name, key in hashes(directory).items()
    ]


def load(directory: Path, name: str, cls: type[R]) -> Sequence[R]:
    """The records of one shard, after its hash was checked."""
    stamp = (directory / manifest.MANIFEST).stat()
    entry = _entries(directory, stamp.st_mtime_ns, stamp.st_size).get(name)
    if entry is None:
        raise DataError(f"{directory}: has no shard {name}; run the stage before this one again")
    manifest.check(directory, entry, f"{name}.jsonl")
    return list(records.read_jsonl(directory / f"{name}.jsonl", cls))
