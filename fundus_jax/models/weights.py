"""Safetensors directories, read lazily and written atomically. Knows tensors by name; `params` tables say what they mean.

Only safetensors and JSON are opened: a pickle in the directory is never touched. Reading takes slices, so that a sharded model
reads only what each device holds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fundus_jax.records import ConfigError, DataError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MAX_SHARD = 5 * 10**9  # bytes, as on the hub


class Entry(NamedTuple):
    """Where a tensor lies, and its shape and dtype as stored."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The safetensors of a Hugging Face directory: one file, or shards with an index.

    `entries` maps every stored name to its Entry. Raises DataError for unreadable files, shards that the index names and the
    directory lacks, tensors that the index and the files disagree about, and dtypes other than bf16, f16 and f32.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._open: dict[str, Any] = {}
        index = self.directory / INDEX
        if index.exists():
            listed: dict[str, str] = read_json(index)["weight_map"]
            files = sorted(set(listed.values()))
        elif (self.directory / SINGLE).exists():
            listed, files = {}, [SINGLE]
        else:
            raise ConfigError(f"{self.directory} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")
        missing = [name for name in files if Path(name).name != name or not (self.directory / name).is_file()]
        if missing:
            raise DataError(f"{self.directory} lacks the shards {', '.join(missing)} that {INDEX} names; download them again")
        self.entries: dict[str, Entry] = {}
        for file in files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                view = handle.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise DataError(f"{self.directory / file}: {name} is {view.get_dtype()}; weights must be bf16, f16 or f32")
                self.entries[name] = Entry(file, tuple(view.get_shape()), DTYPES[view.get_dtype()])
        wrong = sorted(name for name in listed if name not in self.entries or self.entries[name].file != listed[name])
        if wrong:
            raise DataError(f"{index}: {len(wrong)} tensors are not in the shard it names, first {wrong[:3]}")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor `name`, or the slice `index` of it, in its stored dtype."""
        handle = self._handle(self.entries[name].file)
        return handle.get_slice(name)[index] if index else handle.get_tensor(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.directory / file, framework="np").__enter__()
            except SafetensorError as error:
                raise DataError(f"{self.directory / file} is not a readable safetensors file ({error}); download it again") from error
        return self._open[file]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; DataError names the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Pretty JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` when the block ends without an error, and vanishes otherwise.

    Raises ConfigError if `target` already exists: an export never overwrites.
    """
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} already exists; exports never overwrite: choose another directory or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_tensors(
    directory: Path, sizes: Sequence[tuple[str, int]], fetch: Callable[[str], np.ndarray], max_shard: int = MAX_SHARD
) -> None:
    """Write tensors (name, bytes) into one file or into shards of at most `max_shard` bytes with an index.

    `fetch(name)` is called shard by shard, so that at most one shard is in memory.
    """
    shards: list[list[str]] = [[]]
    room = max_shard
    for name, size in sizes:
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard
        shards[-1].append(name)
        room -= size
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        save_file({name: np.ascontiguousarray(fetch(name)) for name in names}, directory / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(size for _, size in sizes)}, "weight_map": weight_map})
