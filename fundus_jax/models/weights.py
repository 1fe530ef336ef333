"""Safetensors directories, read lazily and written atomically. Knows tensors by
name; `params` tables say what they mean.

Only safetensors and JSON are opened: a pickle in the directory is never touched.
Reading takes slices, so that a sharded model reads only what each device holds. Of what is read one tensor
is in memory at a time, mapped pages of the files included; of what is written two pieces (`files.pieces`),
and what their source holds: of a model's parameters two whole tensors.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from fundus_jax import files
from fundus_jax.files import Piece
from fundus_jax.records import ConfigError, DataError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MAX_SHARD = 5 * 10**9  # bytes, as on the hub
T = TypeVar("T")


class Entry(NamedTuple):
    """Where a tensor lies, from byte `start` of its file, and its shape and dtype as stored."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The safetensors of a Hugging Face directory: one file, or shards with an index.

    Where both are there the single file is read, as transformers does.

    Attributes:
        entries: every stored name and its Entry.
        faults: what is wrong with the tensors by themselves, whatever model they are for: stored in two
            shards, in another shard than the index says, or of a dtype other than bf16, f16 and f32. The
            caller reports them together with its own.

    Raises ConfigError where there is no safetensors file, DataError for unreadable files and for shards that
    the index names and the directory lacks.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        listed = self._listed()
        self.entries: dict[str, Entry] = {}
        self.faults: list[str] = []
        for file in sorted(set(listed.values())) or [SINGLE]:
            for name, entry in _entries(self.directory / file).items():
                if entry.dtype not in DTYPES.values():
                    self.faults.append(
                        f"unreadable: {name} is {entry.dtype}; weights must be bf16, f16 or f32"
                    )
                if name in self.entries:
                    self.faults.append(f"stored twice: {name} in {self.entries[name].file} and {file}")
                self.entries[name] = entry
        for name, file in listed.items():
            if name in self.entries and self.entries[name].file != file:
                self.faults.append(f"misplaced: {name} is not in {file}, where {INDEX} says it is")

    def _listed(self) -> dict[str, str]:
        """Tensor name -> shard, as the index says; empty for a single file."""
        index = self.directory / INDEX
        if (self.directory / SINGLE).is_file():
            return {}
        if not index.is_file():
            raise ConfigError(
                f"{self.directory} has neither {SINGLE} nor {INDEX}. Other formats are never opened, since "
                "they may run code: where you trust such a checkpoint, load it with transformers and "
                "write it with save_pretrained"
            )
        listed = read_json(index).get("weight_map")
        if (
            not isinstance(listed, dict)
            or not listed
            or not all(type(file) is str for file in listed.values())
        ):
            raise DataError(f"{index} has no weight_map from tensor names to files; download it again")
        missing = sorted(
            {
                file
                for file in listed.values()
                if Path(file).name != file or not (self.directory / file).is_file()
            }
        )
        if missing:
            raise DataError(
                f"{self.directory} lacks the shards {', '.join(missing)} that {INDEX} names; "
                "download them again"
            )
        return listed

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor `name`, or the slice `index` of it, in its stored dtype."""
        file, start, shape, stored = self.entries[name]
        path, dtype = self.directory / file, np.dtype(stored)
        if index:  # the mapping goes with the view, and its pages with it
            return np.array(np.memmap(path, dtype, "r", start, shape)[index])
        size = math.prod(shape) * dtype.itemsize
        return np.fromfile(path, np.uint8, size, offset=start).view(dtype).reshape(shape)

    def map(self, name: str, piece: Piece) -> np.ndarray:
        """Consecutive rows of the tensor `name`, as they lie in the file: pages are read when they are
        touched, and let go with the array."""
        file, start, shape, stored = self.entries[name]
        dtype = np.dtype(stored)
        for rows in piece:
            start += rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape = (rows.stop - rows.start, *shape[1:])
        return np.memmap(self.directory / file, dtype, "r", start, shape)


def _entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by name, in the order of their bytes."""
    try:
        with safe_open(path, framework="np"):  # checks the header's size, its offsets and the file's length
            pass
    except SafetensorError as error:
        raise DataError(f"{path} is not a readable safetensors file ({error}); download it again") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start = 8 + length + facts["data_offsets"][0]
        dtype = str(DTYPES.get(facts["dtype"], facts["dtype"]))
        found[name] = Entry(path.name, start, tuple(facts["shape"]), dtype)
    return found


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
        raise ConfigError(
            f"{target} already exists; exports never overwrite: choose another directory or remove it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        files.flush(scratch)
        scratch.rename(target)
        files.sync(target.parent)  # the new name has to survive a power cut too
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_tensors(
    directory: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    fetch: Callable[[str, Piece], np.ndarray],
    max_shard: int = MAX_SHARD,
) -> None:
    """Write tensors, name -> (dtype, shape), into one file, or into shards of at most `max_shard` bytes with
    an index.

    `fetch(name, piece)` is called in a thread of its own while the piece before is written, in their order
    (wider dtypes first within a shard), so that two are in memory at a time.
    """
    sizes = {name: _size(*tensor) for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    room = max_shard
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard
        shards[-1].append(name)
        room -= size
    called = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, names in zip(called, shards, strict=True):
        write_file(directory / file, {name: tensors[name] for name in names}, fetch)
    if len(called) > 1:
        weight_map = {name: file for file, names in zip(called, shards, strict=True) for name in names}
        write_json(
            directory / INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        )


def write_file(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], fetch: Callable[[str, Piece], np.ndarray]
) -> None:
    """Write one safetensors file, piece by piece; the library's own writer wants all of it at once.

    The format: the header's length in 8 bytes, the header as JSON, padded to whole 8 bytes, then the tensors
    without a gap. Wider ones come first, so that each lies at a multiple of its item's size.
    """
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name][0]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    codes, end = {name: code for code, name in DTYPES.items()}, 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + _size(dtype, shape)
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, piece), found in ahead(fetch, pieces({name: tensors[name] for name in order})):
            value, (dtype, shape) = np.asarray(found, order="C"), tensors[name]
            announced = (dtype, (*(rows.stop - rows.start for rows in piece), *shape[1:]))
            if (value.dtype.name, value.shape) != announced:
                raise ValueError(f"{name} is {value.dtype} {value.shape}, announced as {announced}")
            file.write(value.reshape(-1).view(np.uint8).data)


def pieces(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[tuple[str, Piece]]:
    """The pieces of tensors, name -> (dtype, shape), in their order."""
    return [
        (name, piece)
        for name, (dtype, shape) in tensors.items()
        for piece in files.pieces(shape, np.dtype(dtype).itemsize)
    ]


def ahead(
    read: Callable[[str, Piece], T], wanted: Iterable[tuple[str, Piece]], threads: int = 1
) -> Iterator[tuple[tuple[str, Piece], T]]:
    """Every piece and what is read of it, in order; the next `threads` are read while the caller works."""
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[tuple[tuple[str, Piece], Future[T]]] = deque()
        for piece in wanted:
            coming.append((piece, pool.submit(read, *piece)))
            if len(coming) > threads:
                done, found = coming.popleft()
                yield done, found.result()
        for piece, found in coming:
            yield piece, found.result()


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
