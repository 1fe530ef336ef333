"""Which pictures of very many are worth comparing: those whose keypoints are each other's neighbours.

The keypoints of all pictures are sorted into cells around a sample of themselves. A picture's keypoints,
and those of its mirror image, look for their nearest neighbours in the cells they lie closest to, and
vote for the pictures that these belong to; the pictures with most votes are its candidates. The table
lies on disk in the order of the cells, so that memory stays flat: one cell of it, and one shard of
pictures, at a time. Neighbours: `near` makes prints and compares candidates, `decontaminate` runs both.

The cells are an inverted file: Sivic and Zisserman 2003, doi:10.1109/ICCV.2003.1238663.
"""

import fcntl
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from data_pipeline import files, near

INDEXED = 96  # keypoints of a picture that look for neighbours and are found, the largest first
PROBES = 2  # cells that a keypoint looks into
NEAREST = 8  # neighbours that a keypoint votes for
MOST = 24  # candidates of a picture
BLOCK = 1 << 12  # keypoints that are sorted into cells at a time

Prints = Sequence[NDArray[np.void]]  # one array of `near.PRINT` a shard, usually mapped from disk


@dataclass(frozen=True)
class Table:
    """Keypoints in the order of their cells: centres [C, 128], the first row of each cell [C + 1], and of
    each row its descriptor [R, 128] and the number of its picture [R]."""

    centres: NDArray[np.float32]
    starts: NDArray[np.int64]
    descriptors: NDArray[np.uint8]
    pictures: NDArray[np.int32]


def build(prints: Prints, folder: Path) -> Table:
    """The table of all pictures, from `folder` where it is, else made and put there.

    It depends on the prints alone, so processes that share a job may share it. The folder must be named
    for what it holds, e.g. by a hash of the prints' hashes. One picture at least must have a keypoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits and reads
        if not (folder / "starts.npy").is_file():  # written last
            _write(prints, folder)
    names = ("centres", "starts", "descriptors", "pictures")
    return Table(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def search(table: Table, queries: NDArray[np.void], first: int) -> NDArray[np.int64]:
    """Candidates of the pictures [n] numbered from `first` on: pairs [M, 2] of their numbers and others'."""
    vectors, owners = zip(*(_indexed(queries, side) for side in (near.PLAIN, near.MIRRORED)), strict=True)
    looking = near.unit(np.concatenate(vectors))
    owner = first + np.concatenate(owners)
    cells = _cells(looking, table.centres, PROBES)
    asks, cell = np.repeat(np.arange(len(looking)), cells.shape[1]), cells.ravel()
    order = np.argsort(cell, kind="stable")
    asks, bounds = asks[order], np.searchsorted(cell[order], np.arange(len(table.centres) + 1))
    votes: list[tuple[NDArray, NDArray, NDArray]] = []
    for number in np.flatnonzero(np.diff(bounds)):
        here = asks[bounds[number] : bounds[number + 1]]
        rows = slice(table.starts[number], table.starts[number + 1])
        if rows.stop > rows.start:
            votes.append(_votes(looking[here], owner[here], table.descriptors[rows], table.pictures[rows]))
    if not votes:
        return np.zeros((0, 2), np.int64)
    return _winners(*(np.concatenate(part) for part in zip(*votes, strict=True)))


def _votes(
    looking: near.Floats, owner: NDArray, descriptors: NDArray[np.uint8], pictures: NDArray[np.int32]
) -> tuple[NDArray, NDArray, NDArray]:
    """For each of q keypoints its neighbours among r: its own picture, theirs, and how much closer they are
    than the next one that has no vote."""
    alike = looking @ near.unit(descriptors).T  # [q, r]
    alike[owner[:, None] == pictures] = -1
    count = min(NEAREST + 1, alike.shape[1])
    best = np.argpartition(-alike, count - 1, axis=1)[:, :count]
    closeness = np.take_along_axis(alike, best, axis=1)
    weight = closeness - closeness.min(axis=1, keepdims=True) + 1e-6
    chosen = closeness > near.ALIKE
    return np.broadcast_to(owner[:, None], best.shape)[chosen], pictures[best][chosen], weight[chosen]


def _winners(owner: NDArray, voted: NDArray, weight: NDArray) -> NDArray[np.int64]:
    """The `MOST` pictures with most votes of each owner, as pairs [M, 2]."""
    pairs, inverse = np.unique(np.stack([owner, voted], axis=1).astype(np.int64), axis=0, return_inverse=True)
    total = np.bincount(inverse.ravel(), weight, len(pairs))
    order = np.lexsort((-total, pairs[:, 0]))
    pairs = pairs[order]
    place = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    return pairs[place < MOST]


def _indexed(prints: NDArray[np.void], side: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Descriptors [r, 128] of the indexed keypoints of n prints, and the place of the print of each."""
    counts = np.minimum(prints["count"][:, side], INDEXED)
    kept = np.arange(INDEXED) < counts[:, None]
    owners = np.repeat(np.arange(len(prints), dtype=np.int32), counts)
    return prints["descriptors"][:, side, :INDEXED][kept], owners


def _cells(vectors: near.Floats, centres: near.Floats, count: int) -> NDArray[np.int32]:
    """The `count` cells [r, count] whose centres are nearest to each vector."""
    count = min(count, len(centres))
    found = np.empty((len(vectors), count), np.int32)
    for start in range(0, len(vectors), BLOCK):
        alike = vectors[start : start + BLOCK] @ centres.T
        found[start : start + BLOCK] = np.argpartition(-alike, count - 1, axis=1)[:, :count]
    return found


def _write(prints: Prints, folder: Path) -> None:
    """Sort the keypoints of all pictures into cells: once to count, once to copy."""
    counts = [int(np.minimum(one["count"][:, near.PLAIN], INDEXED).sum()) for one in prints]
    centres = _sample(prints, counts)
    cell = np.concatenate(
        [_cells(near.unit(_indexed(one, near.PLAIN)[0]), centres, 1)[:, 0] for one in prints]
    )
    place = np.empty(len(cell), np.int64)
    place[np.argsort(cell, kind="stable")] = np.arange(len(cell))
    files.require_free(folder, 132 * len(cell))  # a map of a full disk ends with a signal and no word
    temporary = {name: folder / f".{name}.{os.getpid()}.npy" for name in ("descriptors", "pictures")}
    descriptors = open_memmap(temporary["descriptors"], "w+", np.uint8, (len(cell), 128))
    pictures = open_memmap(temporary["pictures"], "w+", np.int32, (len(cell),))
    done = first = 0
    for one, count in zip(prints, counts, strict=True):
        vectors, owners = _indexed(one, near.PLAIN)
        descriptors[place[done : done + count]], pictures[place[done : done + count]] = (
            vectors,
            owners + first,
        )
        done, first = done + count, first + len(one)
    for name, array in (("descriptors", descriptors), ("pictures", pictures)):
        array.flush()
        files.sync(temporary[name])
        temporary[name].replace(folder / f"{name}.npy")
    starts = np.searchsorted(np.sort(cell), np.arange(len(centres) + 1))
    for name, array in (("centres", centres), ("starts", starts)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        files.write_atomic(folder / f"{name}.npy", buffer.getvalue())


def _sample(prints: Prints, counts: Sequence[int]) -> near.Floats:
    """Keypoints of all shards in proportion, about as many as the root of their number."""
    rng, total = np.random.default_rng(0), sum(counts)
    chosen = []
    for one, count in zip(prints, counts, strict=True):
        share = rng.choice(count, -(-count * round(total**0.5) // total), replace=False)
        chosen.append(_indexed(one, near.PLAIN)[0][np.sort(share)])
    return near.unit(np.concatenate(chosen))
