"""Finds pictures that a data set holds twice, and photographs of the same eye, by small grey thumbnails.

Publishers draw several tasks from one pool, so an image with masks may stand among the graded ones under
another name, even on the other side of the train/test line. Builders ask here whether it does, so that both
get one `patient`. This takes seconds and finds copies (exact, resampled, recompressed) inside one data
set: on IDRiD all 68, but of other photographs of an eye 2 of 25, for which thumbnails are too alike.
`decontaminate` finds those, and copies that were changed, and across data sets.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline import files, images
from fundus_jax.records import DataError

_SIZE = (64, 42)


def similarity(paths: Sequence[Path]) -> NDArray[np.float64]:
    """Correlation [N, N] of N images' thumbnails; a file that can not be read is like no other (0)."""
    thumbs = np.stack([_thumbnail(path) for path in paths])
    thumbs -= thumbs.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(thumbs, axis=1, keepdims=True)
    thumbs /= np.where(norms > 0, norms, 1)
    return thumbs @ thumbs.T


def identical(paths: Sequence[Path]) -> list[int]:
    """For each of N files the place of the first one with the same bytes; only equal sizes are read."""
    sizes = [path.stat().st_size for path in paths]
    many = {size for size, count in Counter(sizes).items() if count > 1}
    first: dict[int | str, int] = {}
    return [
        first.setdefault(files.sha256(path) if size in many else place, place)
        for place, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]


def groups(alike: NDArray[np.bool_]) -> list[int]:
    """For each of N items the first one that the symmetric relation [N, N], followed on and on, leads to."""
    first = list(range(len(alike)))

    def root(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    for i, j in np.argwhere(np.triu(alike, 1)).tolist():
        a, b = sorted((root(i), root(j)))
        first[b] = a
    return [root(i) for i in range(len(first))]


def _thumbnail(path: Path) -> NDArray[np.float64]:
    try:
        image = images.load(path, draft=_SIZE).convert("L").resize(_SIZE, Image.Resampling.BOX)
    except DataError:  # whoever decodes the image for its own sake reports it
        return np.zeros(_SIZE[0] * _SIZE[1])
    return np.asarray(image, np.float64).ravel()
