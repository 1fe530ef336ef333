"""The pictures of items, by their keys: files under a folder, or records of a stage directory.

A size is read from the head of a file: the questions of a benchmark are sorted by length before any is asked,
and decoding all its photographs for that would take longer than many an answer. Neighbours: items.py (whose
keys these are), predict.py and served.py (who show them), the readers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from PIL import Image

from fundus_jax import data
from fundus_jax.data import Size
from fundus_jax.records import DataError


class Images(Protocol):
    """The pictures of items; every benchmark is one.

    Both functions raise DataError, naming the file and what is wrong, for a picture that can not be had.
    """

    def load_image(self, image: str) -> Image.Image:
        """The picture of one of an item's `images`, its pixels decoded."""
        ...

    def image_size(self, image: str) -> Size:
        """The size of that very picture; no pixel is decoded."""
        ...


@dataclass(frozen=True)
class Stage:
    """The pictures of Examples, "FILE#INDEX": record INDEX of the ArrayRecord file FILE in a finished stage
    directory."""

    directory: Path

    def load_image(self, image: str) -> Image.Image:
        """See `Images`."""
        return data.decoded(data.load_image(self.directory, image), f"{self.directory}, {image}")

    def image_size(self, image: str) -> Size:
        """See `Images`."""
        return Size(*data.load_image(self.directory, image).size)


@dataclass(frozen=True)
class Folder:
    """The files under `root`, by their paths, exactly spelt or else with case ignored."""

    root: Path

    def __contains__(self, image: str) -> bool:
        return find_file(self.root, image) is not None

    def path(self, image: str) -> Path:
        """The file of a key. Raises DataError where there is none."""
        path = find_file(self.root, image)
        if path is None:
            raise DataError(f"{image} is not under {self.root}")
        return path

    def load_image(self, image: str) -> Image.Image:
        """See `Images`."""
        path = self.path(image)
        return data.decoded(data.open_image(path.read_bytes(), str(path)), str(path))

    def image_size(self, image: str) -> Size:
        """See `Images`."""
        path = self.path(image)
        return data.image_size(path, str(path))


def find_file(root: Path, key: str) -> Path | None:
    """The file `key` under `root`, exactly spelt or else with case ignored; None if there is none.

    Raises:
        DataError: a key that leads out of `root`.
    """
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
        raise DataError(f"image key {key!r} leads out of its folder")
    path = root.joinpath(*parts)
    if path.is_file():
        return path
    folder = root
    for part in parts:
        name = _names(folder).get(part.lower())
        if name is None:
            return None
        folder = folder / name
    return folder if folder.is_file() else None


@functools.lru_cache(maxsize=4096)
def _names(folder: Path) -> dict[str, str]:
    """Lower-case name -> name of everything in a folder; of two that differ in case only, the first."""
    if not folder.is_dir():
        return {}
    return {path.name.lower(): path.name for path in sorted(folder.iterdir(), reverse=True)}
