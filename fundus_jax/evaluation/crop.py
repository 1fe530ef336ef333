"""FunBench's preparation of colour photographs: cut to the square around the fundus, black outside of its
circle, turned by 180 degrees where a camera was upside down.

The publisher's preprocess_info.json names the square of every image: [height, width, x, y, diameter] of the
raw image, whose square may reach over its edges and is zero there. FunBench's preprocess.py writes the
results to disk with OpenCV; here they are made when an image is loaded, to the pixel, but without the second
JPEG compression. Neighbour: funbench.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fundus_jax.data import Size
from fundus_jax.records import DataError

# Beginnings of the image keys that preprocess.py leaves as they are.
UNTOUCHED = ("octdl/", "neh", "octid", "ucsd/", "retouch/", "top/", "mmc-amd/", "deepdrid/ultra")

Square = tuple[int, int, int, int, int]
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values for a picture on its side


@dataclass(frozen=True, slots=True)
class Cut:
    """What is done to one image. `square`: height and width of the raw image, x, y and diameter; or None."""

    rotate: bool
    square: Square | None


def read_cuts(path: Path) -> dict[str, Cut]:
    """preprocess_info.json as image key in lower case -> Cut: it spells one data set in another case than the
    questions do.

    Raises:
        DataError: another form, naming the image.
    """
    try:
        sets = json.loads(path.read_text(encoding="utf-8"))
        entries = {key: entry for images in sets.values() for key, entry in images.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not FunBench's preprocess_info.json: {error}") from error
    return {key.lower(): _cut(key, entry, path) for key, entry in entries.items()}


def _cut(key: str, entry: object, path: Path) -> Cut:
    if isinstance(entry, dict) and isinstance(entry.get("rotate"), bool):
        square = entry.get("crop")
        if square is None:
            return Cut(entry["rotate"], None)
        if isinstance(square, list) and len(square) == 5 and all(type(number) is int for number in square):
            height, width, x, y, diameter = square
            if diameter > 0 and -diameter < x < width and -diameter < y < height:
                return Cut(entry["rotate"], (height, width, x, y, diameter))
    raise DataError(f"{path}: {key}: {entry!r} is not rotate with crop [height, width, x, y, diameter]")


def prepare(image: Image.Image, key: str, cuts: Mapping[str, Cut]) -> Image.Image:
    """The image as FunBench shows it to a model.

    Raises:
        DataError: a photograph that the file does not know, or that has another size than it says.
    """
    cut = _cut_of(key, cuts)
    if cut.square is None and not cut.rotate:
        return image
    pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # turned as OpenCV reads it
    if cut.square is not None:
        pixels = _circle_of(pixels, cut.square, key)
    return Image.fromarray(pixels[::-1, ::-1] if cut.rotate else pixels)


def size_of(image: Image.Image, key: str, cuts: Mapping[str, Cut]) -> Size:
    """The size of what `prepare` makes of an image, of which no pixel is decoded.

    Raises:
        DataError: as `prepare`, but an image that lies on its side may pass here.
    """
    cut = _cut_of(key, cuts)
    if cut.square is None:
        turned = cut.rotate and image.getexif().get(_ORIENTATION) in _SIDEWAYS
        return Size(*image.size[::-1] if turned else image.size)
    height, width, _, _, diameter = cut.square
    if sorted(image.size) != sorted((width, height)):
        raise _other_size(key, Size(*image.size), cut.square)
    return Size(diameter, diameter)


def _cut_of(key: str, cuts: Mapping[str, Cut]) -> Cut:
    cut = cuts.get(key.lower())
    if cut is None and key.lower().startswith(UNTOUCHED):
        return Cut(rotate=False, square=None)
    if cut is None:
        raise DataError(f"{key}: preprocess_info.json has no entry for it")
    return cut


def _other_size(key: str, size: Size, square: Square) -> DataError:
    return DataError(
        f"{key}: {size.width} x {size.height} pixels, but preprocess_info.json cuts {square[1]} x "
        f"{square[0]}: give the publisher's raw images, or leave the preparation out"
    )


def _circle_of(pixels: np.ndarray, square: Square, key: str) -> np.ndarray:
    """The square [D, D, 3] of the raw pixels, zero outside of the image and of the circle in it."""
    height, width, x, y, diameter = square
    if pixels.shape[:2] != (height, width):
        raise _other_size(key, Size(pixels.shape[1], pixels.shape[0]), square)
    cut = np.zeros((diameter, diameter, 3), np.uint8)
    top, left = max(0, y), max(0, x)
    part = pixels[top : min(height, y + diameter), left : min(width, x + diameter)]
    cut[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]] = part
    cut[~disc(diameter)] = 0
    return cut


@functools.lru_cache(maxsize=64)
def disc(diameter: int) -> np.ndarray:
    """OpenCV's filled circle of radius D // 2 around (D // 2, D // 2): bool [D, D].

    It is drawn by the midpoint rule in whole numbers, eight octants at a time; `half` is how far each row
    reaches to both sides of the centre.
    """
    radius = diameter // 2
    half = np.full(radius + 1, -1)
    error, along, across, plus, minus = 0, radius, 0, 1, 2 * radius - 1
    while along >= across:
        half[across] = max(half[across], along)
        half[along] = max(half[along], across)
        across += 1
        error += plus
        plus += 2
        if error > 0:
            error -= minus
            along -= 1
            minus -= 2
    offset = np.abs(np.arange(diameter) - radius)
    return offset[None, :] <= half[offset][:, None]
