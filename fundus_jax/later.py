"""Arrays that are made when Orbax writes them, and read in parts: a state that never is in memory as a whole.

Orbax takes a state as a whole. Here its leaves are promises, kept one after the other: each is made, written
and let go before the next. What lies on disk is what Orbax makes of numpy arrays, and is restored as such.
Neighbour: `convert` writes and reads bundles through here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

PIECE = 2**24  # bytes read at a time


@dataclass(frozen=True)
class Later:
    """An array that `make` gives when it is wanted."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes promised arrays as numpy arrays, in turn."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            await self._write(value, info, arg)
        return []

    async def _write(self, value: Later, info: Any, arg: Any) -> None:
        """Make one array and write it; with this call's end nothing refers to it any more."""
        for written in await super().serialize([value.make()], [info], [arg]):
            written.result()


def save_later(path: Path, arrays: dict[str, Later]) -> None:
    """Write the arrays by name into the new directory `path`, in Orbax's layout.

    Uncompressed: weights shrink little and slowly, and then nothing is copied, and a part can be read alone.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Later, _OneByOne(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but Orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as orbax:
        orbax.save(path, args=ocp.args.PyTreeSave(arrays))


def open_array(path: Path, name: str) -> Any:
    """The array `name` of a directory that Orbax wrote: what is sliced and then read, where it lies
    uncompressed; else its values, since every slice would have to unpack all of it."""
    place = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
    codec = array.codec  # of zarr, there always is one
    return array if codec and codec.to_json().get("compressor") is None else array.read().result()


def read(array: Any) -> np.ndarray:
    """The values of what `open_array` gave, or of a slice of it; in pieces, since each is copied once."""
    if not isinstance(array, tensorstore.TensorStore) or not array.rank:
        return np.asarray(array)
    out = np.empty(array.shape, array.dtype.numpy_dtype)
    rows = max(1, PIECE * len(out) // max(1, out.nbytes))
    for start in range(0, len(out), rows):
        part = slice(start, min(start + rows, len(out)))  # past the end is an error here
        out[part] = array[part].read().result()
    return out
