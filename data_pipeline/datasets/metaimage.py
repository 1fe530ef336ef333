"""Reads planes of MetaImage volumes (.mhd beside .raw), the format of RETOUCH.

The header is text, one "Name = value" a line; the other file is nothing but numbers, x fastest, z slowest. So
a plane is read alone, by its place. What a volume of a challenge does not need (compression, data in the
header file, several channels, lists of files) is refused by name. Format: the MetaIO documentation of ITK.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fundus_jax.records import DataError

MOST_HEADER = 64 << 10  # bytes
MOST_SIDE = 8192
_TYPES = {"MET_UCHAR": "u1", "MET_CHAR": "i1", "MET_USHORT": "u2", "MET_SHORT": "i2"}
_FIXED = {  # what these fields have to say, if they are there
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "CompressedData": "False",
    "ElementNumberOfChannels": "1",
    "HeaderSize": "0",
}


@dataclass(frozen=True, slots=True)
class Volume:
    """A header that was checked, with the file of numbers that belongs to it."""

    raw: Path
    dtype: np.dtype
    width: int
    height: int
    depth: int


def header(path: Path) -> Volume:
    """Read and check a header.

    Raises DataError naming the field that is missing or not supported, a data file that is missing or lies
    elsewhere, or its size where it is not exactly that of the volume.
    """
    fields = _fields(path)
    needed = ("DimSize", "ElementType", "ElementDataFile")
    if lost := [name for name in needed if name not in fields]:
        raise DataError(f"{path}: a MetaImage header without {', '.join(lost)}")
    for name, value in _FIXED.items():
        if fields.get(name, value).lower() != value.lower():
            raise DataError(f"{path}: {name} = {fields[name]}; only {value} is read, so convert the volume")
    sizes = fields["DimSize"].split()
    if len(sizes) != 3 or not all(n.isdecimal() and 1 <= int(n) <= MOST_SIDE for n in sizes):
        raise DataError(f"{path}: DimSize = {fields['DimSize']}; three sides of 1 to {MOST_SIDE} are read")
    kind = fields["ElementType"]
    if kind not in _TYPES:
        raise DataError(f"{path}: ElementType = {kind}; read are {', '.join(_TYPES)}")
    order = ">" if fields.get("BinaryDataByteOrderMSB", "False").lower() == "true" else "<"
    dtype = np.dtype(order + _TYPES[kind])
    width, height, depth = map(int, sizes)
    return Volume(
        _raw(path, fields["ElementDataFile"], dtype, (width, height, depth)), dtype, width, height, depth
    )


def plane(path: Path, index: int) -> NDArray:
    """Plane `index` of the volume whose header is `path`, [H, W] in the volume's own type."""
    volume = header(path)
    if not 0 <= index < volume.depth:
        raise DataError(f"{path}: plane {index} of {volume.depth}")
    count = volume.width * volume.height
    with volume.raw.open("rb") as stream:
        stream.seek(index * count * volume.dtype.itemsize)
        values = np.fromfile(stream, volume.dtype, count)
    return values.reshape(volume.height, volume.width)


def _fields(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; check --source against the publisher's layout")
    if path.stat().st_size > MOST_HEADER:
        raise DataError(f"{path}: {path.stat().st_size} bytes are too many for a MetaImage header")
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _raw(path: Path, name: str, dtype: np.dtype, shape: tuple[int, int, int]) -> Path:
    raw = path.with_name(name) if name == Path(name).name else path.parent / "?"
    if not raw.is_file() or raw.is_symlink() and raw.resolve().parent != path.parent.resolve():
        raise DataError(f"{path}: ElementDataFile = {name}; a file of that name has to lie beside the header")
    wanted, found = math.prod(shape) * dtype.itemsize, raw.stat().st_size
    if found != wanted:
        raise DataError(f"{raw}: {found} bytes, but DimSize and ElementType ask for {wanted}; get it again")
    return raw
