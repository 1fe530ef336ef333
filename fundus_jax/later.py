"""Arrays that are made when Orbax writes them, and read in parts: a state that never is in memory as a whole.

Orbax takes a state as a whole. Here its leaves are promises, kept one after the other and piece by piece:
each is made, written and let go. What lies on disk is what Orbax makes of numpy arrays, and is restored as
such. Neighbour: `convert` writes and reads bundles through here.
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

from fundus_jax import files

FILE = 2**26  # bytes of a file, about: TensorStore holds back what goes into one
AHEAD = 1  # pieces that are made while another is written


@dataclass(frozen=True)
class Later:
    """An array of which `make(0, piece)` gives a piece (`files.pieces`) when it is wanted; if it is `stacked`
    along its first axis, layer upon layer, `make(i, piece)` gives that piece of layer i."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[int, files.Piece], np.ndarray]
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
        """What NumpyHandler does with one array and Orbax's description of its place, here in pieces, each of
        which is a chunk: TensorStore reads and writes whole ones."""
        del ts_context
        layer = value.shape[value.stacked :]
        pieces = files.pieces(layer, value.dtype.itemsize)
        chunk = [*(1,) * value.stacked, *(part.stop for part in pieces[0]), *layer[1:]]
        tspec = tspec | {"metadata": tspec["metadata"] | {"chunks": chunk}}
        array = await tensorstore.open(tspec, create=True, open=True, context=self.context)
        under_way: deque[Any] = deque()
        for i in range(value.shape[0] if value.stacked else 1):
            for piece in pieces:
                place = array[(*(i,) * value.stacked, *piece)]
                made = value.make(i, piece)
                under_way.append(place.write(made, can_reference_source_data_indefinitely=True))
                del made
                if len(under_way) > AHEAD:
                    await under_way.popleft()
        for write in under_way:
            await write


def save_later(path: Path, arrays: dict[str, Later]) -> None:
    """Write the arrays by name into the new directory `path`, in Orbax's layout; the caller flushes it.

    Uncompressed, since weights shrink little and slowly; in chunks, so that a piece can be read alone.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Later, _OneByOne()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but Orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as orbax:
        orbax.save(path, args=ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=FILE))


def open_array(path: Path, name: str) -> Any:
    """The array `name` of a directory that Orbax wrote: what is sliced and then read, where it lies in plain
    chunks; its values where it lies in one or is compressed, as a training run's is: slices would read and
    unpack its chunks again and again."""
    base = {"driver": "file", "path": f"{path}/"}  # as a URL a name with % or # would be another
    place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
    packed = array.spec().to_json()["metadata"]["compressor"] is not None
    return array.read().result() if packed or array.chunk_layout.read_chunk.shape == array.shape else array


def read(array: Any) -> np.ndarray:
    """The values of what `open_array` gave, or of a slice of it."""
    return array.read().result() if isinstance(array, tensorstore.TensorStore) else np.asarray(array)
