"""Hostile and odd image files are refused with a reason or decoded to what they mean, in bounded memory."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_pipeline import images
from fundus_jax.records import DataError

WIDE = 40, 24  # width, height: not square, so that a turned image shows


def picture(size=WIDE) -> Image.Image:
    """A smooth colour image whose four corners differ."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    planes = [x * 255 // size[0], y * 255 // size[1], (x + y) * 255 // sum(size)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(side: int = 60_000) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


PNG, JPEG = saved(picture(), "PNG"), saved(picture(), "JPEG", quality=95)
BAD = {
    "empty": (b"", "empty file"),
    "text": (b"not found\n", "not a JPEG, PNG, TIFF or BMP but unknown data"),
    "svg": (b'<?xml version="1.0"?><svg width="9" height="9"/>', "but markup"),
    "html with a byte order mark": (b"\xef\xbb\xbf<!DOCTYPE html><html>", "but markup"),
    "gif": (saved(picture(), "GIF"), "but a GIF"),
    "webp": (saved(picture(), "WEBP"), "but a WebP"),
    "zip": (b"PK\x03\x04rest", "but a zip archive"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "png bomb": (bomb(), "more than the 100000000 pixels allowed: .*3600000000 pixels"),
    "smaller png bomb": (bomb(10_001), "10001 x 10001 pixels, more than the 100000000 allowed"),
    "jpeg cut in half": (JPEG[: len(JPEG) // 2], "not a readable JPEG: OSError: (?i:.*truncated)"),
    "jpeg without its last rows": (JPEG[:-60], "not a readable JPEG: OSError: .*truncated"),
    "png cut in half": (PNG[: len(PNG) // 2], "not a readable PNG"),
    "tiff cut in half": (saved(picture(), "TIFF")[:1500], "not a readable TIFF"),
    "bmp cut in half": (saved(picture(), "BMP")[:1500], "not a readable BMP"),
    "jpeg header only": (JPEG[:4], "not a readable JPEG"),
    "png with a flipped bit": (flipped(PNG, len(PNG) - 40), "not a readable PNG"),
    "too small": (saved(picture((40, 15)), "PNG"), "40 x 15 pixels; the shorter side must have 16"),
    "two pages": (saved(picture(), "TIFF", save_all=True, append_images=[picture()]), "of 2 pages"),
    "float tiff": (saved(Image.new("F", WIDE, 0.5), "TIFF"), "colour mode F"),
    "lab tiff": (saved(Image.new("LAB", WIDE), "TIFF"), "colour mode LAB"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_reason(name, tmp_path):
    data, reason = BAD[name]
    (tmp_path / "image.jpg").write_bytes(data)
    for form in (data, tmp_path / "image.jpg"):
        with pytest.raises(DataError, match=reason):
            images.decode(form)
        with pytest.raises(DataError, match=reason):
            images.check(form)
        with pytest.raises(DataError, match=reason):
            images.prepare(form)
        assert images.comment(tmp_path / "image.jpg") == ""


def rgb(image) -> np.ndarray:
    return np.asarray(image).astype(int)


TRUTH = rgb(picture())
GREY = rgb(picture().convert("L"))[..., None].repeat(3, -1)
_half = picture().convert("RGBA")
_half.putalpha(
    Image.fromarray(np.where(np.arange(WIDE[0]) < 20, 255, 0).astype(np.uint8)[None].repeat(WIDE[1], 0))
)
LEFT_HALF = TRUTH * (np.arange(WIDE[0]) < 20)[None, :, None]
_turned = Image.Exif()
_turned[0x0112] = 6  # the camera was held so that the picture has to be turned 90 degrees clockwise
_palette = picture().quantize(200)
_wide_grey = Image.fromarray((GREY[..., 0] * 257).astype(np.uint16))
GOOD = {
    "png": (PNG, TRUTH, 0),
    "png, bytes after the end": (PNG + b"more", TRUTH, 0),
    "bmp": (saved(picture(), "BMP"), TRUTH, 0),
    "tiff, lzw": (saved(picture(), "TIFF", compression="tiff_lzw"), TRUTH, 0),
    "jpeg": (JPEG, TRUTH, 12),
    "jpeg, progressive": (saved(picture(), "JPEG", quality=95, progressive=True), TRUTH, 12),
    "jpeg, grey": (saved(picture().convert("L"), "JPEG", quality=95), GREY, 8),
    "jpeg, cmyk": (saved(picture().convert("CMYK"), "JPEG", quality=95), TRUTH, 25),
    "jpeg, turned by exif": (
        saved(picture(), "JPEG", quality=95, exif=_turned),
        rgb(picture().rotate(-90, expand=True)),
        12,
    ),
    "grey and alpha": (saved(_half.convert("LA"), "PNG"), GREY * (LEFT_HALF.sum(-1) > 0)[..., None], 1),
    "alpha": (saved(_half, "PNG"), LEFT_HALF, 0),
    "palette": (saved(_palette, "PNG"), rgb(_palette.convert("RGB")), 0),
    "palette, one colour transparent": (saved(_palette, "PNG", transparency=0), None, 0),
    "16-bit grey png": (saved(_wide_grey, "PNG"), GREY, 0),
    "16-bit grey tiff": (saved(_wide_grey, "TIFF"), GREY, 0),
    "one bit": (saved(picture().convert("1"), "PNG"), rgb(picture().convert("1").convert("RGB")), 0),
}


@pytest.mark.parametrize("name", GOOD)
def test_decoded_to_what_it_means(name):
    data, truth, tolerance = GOOD[name]
    image = images.decode(data)
    assert image.mode == "RGB"
    assert image.info == {}
    if truth is not None:
        assert rgb(image).shape == truth.shape
        assert np.abs(rgb(image) - truth).max() <= tolerance
    kept = images.decode(images.prepare(data, kind="PNG"))
    assert np.array_equal(rgb(kept), rgb(image)), "ingest changes no pixel unless asked to"


SOUND = {kind: saved(picture(), kind) for kind in ("JPEG", "PNG", "TIFF", "BMP")}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about TIFF tags that it leaves out
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SOUND)), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6)
)
def test_damaged_bytes_raise_nothing_but_a_reason(kind, damage):
    data = bytearray(SOUND[kind])
    for place, value in damage:
        data[place % len(data)] = value
    try:
        image = images.decode(bytes(data))
    except DataError:
        return
    kept = images.decode(images.prepare(bytes(data), kind="PNG"))
    assert np.array_equal(rgb(kept), rgb(image))


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(DataError, match="x.jpg: no such file"):
        images.decode(tmp_path / "x.jpg")
    with pytest.raises(DataError, match="not a plain file"):
        images.decode(tmp_path)


def test_the_bound_is_the_callers():
    assert images.decode(PNG, max_pixels=960).size == WIDE
    with pytest.raises(DataError, match="40 x 24 pixels, more than the 959 allowed"):
        images.decode(PNG, max_pixels=959)


PROBE = """
import resource, sys
from data_pipeline import images
from fundus_jax.records import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        images.decode(__import__("pathlib").Path(path))
    except DataError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_hostile_files_take_little_memory(tmp_path, repo_root):
    paths = []
    for name, (data, _) in BAD.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, paths)],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 100, f"{done.stdout} MB for refusing {len(paths)} small files"


def tagged() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0132] = "2017:07:22 SECRET"
    text = PngInfo()
    text.add_text("Patient", "SECRET")
    text.add_itxt("XML:com.adobe.xmp", "SECRET")
    return {
        "JPEG": saved(picture(), "JPEG", quality=95, exif=exif, comment=b"SECRET", icc_profile=b"colour" * 9),
        "PNG": saved(picture(), "PNG", exif=exif, pnginfo=text),
    }


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_metadata_are_cut_out_and_pixels_kept(kind):
    data = tagged()[kind]
    kept = images.prepare(data)
    assert data.count(b"SECRET") >= 2
    assert b"SECRET" not in kept
    assert 0 < len(data) - len(kept) < 400, "only the texts go; the compressed pixels stay"
    assert np.array_equal(rgb(images.decode(kept)), rgb(images.decode(data)))
    if kind == "JPEG":
        assert Image.open(io.BytesIO(kept)).info["icc_profile"] == b"colour" * 9
    assert images.prepare(kept) == kept


def test_large_images_are_reduced_on_request():
    large = saved(picture((400, 240)), "JPEG", quality=95)
    assert images.prepare(large, max_side=400) == large
    small = images.decode(images.prepare(large, max_side=100))
    assert small.size == (100, 60)
    assert np.abs(rgb(small) - rgb(picture((100, 60)))).mean() < 3
    png = images.prepare(large, max_side=100, kind="PNG")
    assert png.startswith(b"\x89PNG")
