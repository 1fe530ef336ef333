"""Bounded decoding of images from strangers, and what ingest does to their bytes before they are kept.

A published archive holds truncated files, web pages saved as .jpg, and headers that claim 60,000 x 60,000
pixels. Everything here looks at the first bytes and the header before it allocates, allows four formats, and
turns each failure of the decoder into a DataError that says why; ingest quarantines the image with it.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fundus_jax.records import DataError

MAX_PIXELS = 100_000_000
MAX_BYTES = 512 << 20
MIN_SIDE = 16
_TURN = 0x0112  # the EXIF tag of the orientation

_FORMATS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
}
_OTHERS = {
    b"GIF8": "a GIF",
    b"RIFF": "a WebP or another RIFF file",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"version https://git-lfs": "a Git LFS pointer: fetch the real files",
}
_EIGHT_BIT = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def load(
    data: bytes | Path, *, max_pixels: int = MAX_PIXELS, draft: tuple[int, int] | None = None
) -> Image.Image:
    """The decoded image in its file's own colour mode (as masks need it), bounded as `decode` says.

    With `draft` (width, height) a JPEG is decoded to grey in a reduced size not below that, for a rough look.
    """
    data, kind = _sniffed(data)
    with _reasons(f"not a readable {kind}", max_pixels):
        image = Image.open(io.BytesIO(data), formats=[kind])
        _require_size(*image.size, max_pixels)
        if kind != "JPEG" and getattr(image, "n_frames", 1) != 1:  # a JPEG's further frames are previews
            raise DataError(f"a {kind} of {image.n_frames} pages; one image a file is expected")  # pyright: ignore
        if kind == "PNG":  # Pillow checks no checksums when it decodes
            Image.open(io.BytesIO(data), formats=[kind]).verify()
        if draft:
            image.draft("L", draft)
        image.load()
    return image


def size(data: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as the header says, before any turn by EXIF. Raises DataError as `decode`."""
    data, kind = _sniffed(data)
    with _reasons(f"not a readable {kind}", max_pixels):
        found = Image.open(io.BytesIO(data), formats=[kind]).size
    _require_size(*found, max_pixels)
    return found


def turned(data: bytes | Path) -> bool:
    """Whether EXIF says that the picture has to be turned or mirrored to be upright, as `decode` does."""
    data, kind = _sniffed(data)
    with _reasons(f"not a readable {kind}", MAX_PIXELS):
        return Image.open(io.BytesIO(data), formats=[kind]).getexif().get(_TURN, 1) != 1


@contextmanager
def _reasons(what: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever Pillow raises on broken data, which is not a closed list, into a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # our own bound is checked as well
            yield
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, met while it reads the header
        raise DataError(f"more than the {max_pixels} pixels allowed: {error}") from error
    except Exception as error:
        raise DataError(f"{what}: {type(error).__name__}: {error}") from error


def decode(data: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG, TIFF or BMP of unknown origin.

    Args:
      data: the encoded bytes, or the file that holds them. The name of the file does not matter.
      max_pixels: width x height allowed; more is refused from the header, before anything is allocated.

    Returns:
      An RGB image turned upright by its EXIF orientation, without metadata. Transparent pixels lie on black,
      as the surroundings of a fundus do; of 16-bit grey values the upper eight bits are kept.

    Raises:
      DataError: with the reason: another format, truncated, too large, too small, several pages, ...
    """
    image = load(data, max_pixels=max_pixels)
    with _reasons("cannot be converted to RGB", max_pixels):
        image = _rgb(ImageOps.exif_transpose(image))
    image.info = {}
    return image


def comment(path: Path) -> str:
    """The text that a camera or its owner wrote into a JPEG's comment; "" if none or not a readable JPEG.

    Only the header is read. `prepare` cuts the comment out; a builder may use it before.
    """
    try:
        data, kind = _sniffed(path)
        with _reasons(f"not a readable {kind}", MAX_PIXELS):
            found = Image.open(io.BytesIO(data), formats=[kind]).info.get("comment", b"")
    except DataError:  # whoever decodes the image for its own sake reports it
        return ""
    return found.decode("latin-1").strip("\0 ") if isinstance(found, bytes) else str(found)


def check(data: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError with the reason if `decode` would."""
    decode(data, max_pixels=max_pixels)


def prepare(data: bytes | Path, *, max_side: int = 0, kind: str = "JPEG", quality: int = 95) -> bytes:
    """Checked image bytes as they go into a shard: no metadata, and not larger than asked for.

    A JPEG or PNG in RGB or grey that is small enough and upright keeps its compressed pixels bit for bit;
    EXIF, comments and other texts are cut out, for they hold dates, serial numbers and worse. Anything else
    is decoded and encoded again.

    Args:
      max_side: longest side allowed, in pixels; larger images are reduced (Lanczos). 0 allows any.
      kind: "JPEG" or "PNG", for images that have to be encoded again.
      quality: of a JPEG.

    Raises:
      DataError: as `decode`.
    """
    data, format_ = _sniffed(data)
    upright = decode(data)
    raw = Image.open(io.BytesIO(data), formats=[format_])
    large = max_side and max(upright.size) > max_side
    plain = raw.mode in ("L", "RGB") and "transparency" not in raw.info and raw.getexif().get(_TURN, 1) == 1
    if not large and plain and raw.format in _STRIP:
        return _STRIP[raw.format](data)
    if large:
        upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return encode(upright, kind=kind, quality=quality)


def encode(image: Image.Image, *, kind: str = "PNG", quality: int = 95) -> bytes:
    """An RGB image as JPEG (full colour resolution) or PNG."""
    options = {"quality": quality, "subsampling": 0} if kind == "JPEG" else {"compress_level": 1}
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(
            f"{path.name}: no such file" if not path.exists() else f"{path.name}: not a plain file"
        )
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{path.name}: {size} bytes, more than the {MAX_BYTES} that an image may have")
    return path.read_bytes()


def _sniffed(data: bytes | Path) -> tuple[bytes, str]:
    """The bytes, and the format that their beginning shows."""
    if isinstance(data, Path):
        data = _read(data)
    return data, _kind(data)


def _kind(data: bytes) -> str:
    if not data:
        raise DataError("empty file")
    for magic, kind in _FORMATS.items():
        if data.startswith(magic):
            return kind
    what = next((name for magic, name in _OTHERS.items() if data.startswith(magic)), "")
    if not what:
        start = data[:512].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
        what = "markup (SVG or HTML)" if start.startswith(b"<") else "unknown data"
    raise DataError(f"not a JPEG, PNG, TIFF or BMP but {what}")


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(f"{width} x {height} pixels, more than the {max_pixels} allowed")
    if min(width, height) < MIN_SIDE:
        raise DataError(f"{width} x {height} pixels; the shorter side must have {MIN_SIDE}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA or (image.mode in _EIGHT_BIT and "transparency" in image.info):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    if image.mode in _EIGHT_BIT:
        return image.convert("RGB")
    raise DataError(
        f"colour mode {image.mode}; only 8-bit colour and 8- or 16-bit grey have a defined meaning"
    )


# What is cut from a JPEG: comments and application data, but for those without which the colours change: JFIF
# (0), ICC profiles (2) and Adobe's transform (14).
_JPEG_DROP = {0xFE, *range(0xE0, 0xF0)} - {0xE0, 0xE2, 0xEE}
_PNG_DROP = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME"}


def _strip_jpeg(data: bytes) -> bytes:
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # fill bytes may precede a marker
            at += 1
            continue
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        foreign = data[at + 1] == 0xE2 and not data.startswith(b"ICC_PROFILE\0", at + 4)
        if data[at + 1] not in _JPEG_DROP and not foreign:
            kept.append(data[at:end])
        at = end
    end = data.rfind(b"\xff\xd9") + 2  # what follows the end marker is not the image
    return b"".join([*kept, data[at:end] if end > at else data[at:]])


def _strip_png(data: bytes) -> bytes:
    def chunks() -> Iterator[bytes]:
        at = 8
        while at + 12 <= len(data):
            end = at + 12 + struct.unpack_from(">I", data, at)[0]
            if data[at + 4 : at + 8] not in _PNG_DROP:
                yield data[at:end]
            if data[at + 4 : at + 8] == b"IEND":
                return
            at = end

    return data[:8] + b"".join(chunks())


_STRIP = {"JPEG": _strip_jpeg, "PNG": _strip_png}
