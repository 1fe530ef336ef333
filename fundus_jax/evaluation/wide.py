"""Tables whose cells hold whole images in base64, read row by row and found again by their place in the file.

VLMEvalKit's TSV files are hundreds of megabytes of such cells. A first pass reads the texts and remembers
where each row begins; a picture is read again from there when it is wanted, so that memory does not grow
with the file. Neighbours: gmai.py, retinal_reason.py.
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from fundus_jax import data
from fundus_jax.data import Size
from fundus_jax.records import DataError

_CELL = 256 * 2**20  # characters of the longest cell that is read


def rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each row of a table with the byte at which it begins; the first is the header. Quoted cells may hold
    line breaks.

    Raises:
        DataError: naming the row, counted from 1 after the header: not UTF-8, a quote that is not closed, or
        another number of cells than the header has.
    """
    with open(path, "rb") as file:
        yield from _read(file, path, delimiter, 0)


def row_at(path: Path, delimiter: str, begin: int, width: int) -> list[str]:
    """The row of `width` cells that begins at byte `begin`."""
    with open(path, "rb") as file:
        file.seek(begin)
        for _, cells in _read(file, path, delimiter, width):
            return cells
    raise DataError(f"{path}: no row begins at byte {begin}: the file is not the one that was listed")


def _read(file: BinaryIO, path: Path, delimiter: str, width: int) -> Iterator[tuple[int, list[str]]]:
    end = file.tell()

    def lines() -> Iterator[str]:
        nonlocal end
        for line in file:
            end += len(line)
            yield line.decode("utf-8-sig" if end == len(line) else "utf-8")

    csv.field_size_limit(_CELL)  # of the process: the csv module knows no other
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    number = 0
    while True:
        begin = end
        try:
            cells = next(reader, None)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        if cells is None:
            return
        width = width or len(cells)
        if len(cells) != width:
            raise DataError(f"{path}, row {number}: {len(cells)} cells, the header has {width}")
        yield begin, cells
        number += 1


def picture(text: str, where: str) -> Image.Image:
    """The image of a base64 text, its pixels decoded; line breaks and a data URI's head are passed over.

    Raises:
        DataError: naming `where`: not base64, or no image.
    """
    return data.decoded(data.open_image(_bytes(text, where), where), where)


def picture_size(text: str, where: str) -> Size:
    """The size of that image, for which no pixel is decoded. Raises DataError as `picture`."""
    return data.image_size(_bytes(text, where), where)


def _bytes(text: str, where: str) -> bytes:
    body = text.strip()
    if body.startswith("data:"):
        body = body.partition(",")[2]
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the image is not base64: {error}") from error
