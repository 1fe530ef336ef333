"""Arrays that are made when Orbax writes them, and read in parts: a state that never is in memory as a whole.

Orbax takes a state as a whole. Here its leaves are promises, kept one after the other and row by row: each is
made, written and let go. What lies on disk is what Orbax makes of numpy arrays, and is restored as such.
Neighbour: `convert` writes and reads bundles through here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

PIECE = 2**24  # bytes of a chunk at most; TensorStore reads and writes whole ones
FILE = 2**26  # bytes of a file, about: TensorStore holds back what goes into one
AHEAD = 2  # rows that are made while others are written


@dataclass(frozen=True)
class Later:
    """An array that `make(0)` gives when it is wanted, or, if `stacked`, its row i `make(i)`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[int], np.ndarray]
    stacked: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes promised arrays as numpy arrays, in turn, and leaves it to the caller to flush the files: after
    every chunk it would take longer than the writing."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        pool = {"cache_pool#ocdbt": {"total_bytes_limit": 10**8}}  # which Orbax refers to
        self.context = tensorstore.Context({"file_io_sync": False, **pool})

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value], [info], [arg]):
                written.result()
        return []

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        """What NumpyHandler does with one array and Orbax's description of its place, here row by row."""
        del ts_context
        array = await tensorstore.open(tspec, create=True, open=True, context=self.context)
        under_way: deque[Any] = deque()
        for i in range(value.shape[0] if value.stacked else 1):
            place = array[i] if value.stacked else array
            under_way.append(place.write(value.make(i), can_reference_source_data_indefinitely=True))
            if len(under_way) > AHEAD:
                await under_way.popleft()
        for write in under_way:
            await write


def save_later(path: Path, arrays: dict[str, Later]) -> None:
    """Write the arrays by name into the new directory `path`, in Orbax's layout; the caller flushes it.

    Uncompressed, since weights shrink little and slowly; in chunks, so that a layer can be read alone.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Later, _OneByOne()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but Orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    chunks = {
        name: ocp.SaveArgs(chunk_byte_size=PIECE, shard_axes=(0,) if array.stacked else ())
        for name, array in arrays.items()
    }
    with ocp.Checkpointer(handler) as orbax:
        save = ocp.args.PyTreeSave(arrays, save_args=chunks, ocdbt_target_data_file_size=FILE)
        orbax.save(path, args=save)


def open_array(path: Path, name: str) -> Any:
    """The array `name` of a directory that Orbax wrote: what is sliced and then read, where it lies in
    chunks; else its values, since every slice would have to read and unpack all of it."""
    place = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
    whole = array.chunk_layout.read_chunk.shape == array.shape
    return array.read().result() if whole else array


def read(array: Any) -> np.ndarray:
    """The values of what `open_array` gave, or of a slice of it."""
    return array.read().result() if isinstance(array, tensorstore.TensorStore) else np.asarray(array)
