"""Arrays that are made when Orbax writes them, so that a state larger than memory can be written.

Orbax takes a state as a whole. Here its leaves are promises, kept one after the other: each is made, written
and let go before the next. What lies on disk is what Orbax makes of numpy arrays, and is restored as such.
Neighbour: `convert` writes its bundles through here.
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

CHUNK = 2**25  # bytes of an array that are encoded at a time: what is copied is never more than a few of these


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
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


def save_later(path: Path, arrays: dict[str, Later]) -> None:
    """Write the arrays by name into the new directory `path`, in Orbax's layout, uncompressed: weights shrink
    little, and slowly."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Later, _OneByOne(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but Orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK) for name in arrays}
    with ocp.Checkpointer(handler) as orbax:
        orbax.save(path, args=ocp.args.PyTreeSave(arrays, save_args=chunks))
