"""Draws the contact sheet of phantoms.

The README's is made by `python -m data_pipeline.datasets.phantom.sheet --out=docs/phantoms.png`. On the left
a row for each fundus label (CFP, then UWF), on the right a block for each OCT label. Noise is smoothed and
colours are reduced to a palette, as few as it takes to stay below the size that a repository can bear.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_pipeline.datasets.phantom import LABELS, render
from data_pipeline.files import write_atomic

_BACK, _INK, _FAINT = (13, 13, 13), (240, 240, 240), (152, 152, 152)
_MARGIN = 12
_HEAD = 30
_NAMES = 96  # width of the column of row labels
_COLUMNS = ("CFP", "CFP", "CFP", "CFP", "UWF")
_COLOURS = (256, 192, 128, 96, 64, 48)
_GREYS = 20  # of them kept for B-scans and letters


def _tile(seed: int, index: int, size: int, modality: str, label: str) -> Image.Image:
    """One phantom, drawn twice as large, freed of noise (which no PNG can make small) and averaged down."""
    picture = render(seed, index, size=2 * size, modality=modality, label=label).image
    return Image.fromarray(picture).filter(ImageFilter.MedianFilter(5)).reduce(2)


def draw_sheet(seed: int = 5, tile: int = 160) -> Image.Image:
    """The contact sheet as an RGB image; `tile` is the side of a fundus tile in pixels."""
    fundus, scans = LABELS["CFP"], LABELS["OCT"]
    body = tile * len(fundus)
    block = body // len(scans)
    scan = block - 26
    width = 3 * _MARGIN + _NAMES + tile * len(_COLUMNS) + 2 * scan + 6
    sheet = Image.new("RGB", (width, _HEAD + body + _MARGIN), _BACK)
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(size=17), ImageFont.load_default(size=14)
    left = _MARGIN + _NAMES
    for column, modality in enumerate(_COLUMNS):
        draw.text((left + (column + 0.5) * tile, _HEAD / 2), modality, font=small, fill=_FAINT, anchor="mm")
        for row, label in enumerate(fundus):
            place = (left + column * tile, _HEAD + row * tile)
            sheet.paste(_tile(seed, 100 * row + column, tile, modality, label), place)
    for row, label in enumerate(fundus):
        words = label.replace(" NPDR", "\nNPDR")
        draw.text((_MARGIN, _HEAD + (row + 0.5) * tile), words, font=bold, fill=_INK, anchor="lm")
    right = left + len(_COLUMNS) * tile + _MARGIN
    for row, label in enumerate(scans):
        top = _HEAD + row * block
        draw.text((right, top + 4), "Normal OCT" if label == "Normal" else label, font=bold, fill=_INK)
        for column in range(2):
            tile_of_scan = _tile(seed, 1000 + 10 * row + column, scan, "OCT", label)
            sheet.paste(tile_of_scan, (right + column * (scan + 6), top + 26))
    return sheet


def _palette(sheet: Image.Image, colours: int) -> Image.Image:
    """A palette that serves every hue alike: by area, the rare yellow of an exudate would get nothing."""
    pixels = np.asarray(sheet).reshape(-1, 3)
    coloured = pixels[np.ptp(pixels, axis=1) > 6]
    bins = (coloured >> 3).astype(np.int64) @ np.asarray([1024, 32, 1])
    _, group, count = np.unique(bins, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(group, coloured[:, k]) / count for k in range(3)], axis=1)
    weight = np.maximum(1, (count / 30) ** 0.25).round().astype(np.int64) * (count >= 12)
    sample = Image.fromarray(np.repeat(means.round().astype(np.uint8), weight, axis=0)[None])
    chosen = (sample.quantize(colours - _GREYS, kmeans=4).getpalette() or [])[: 3 * (colours - _GREYS)]
    greys = np.linspace(0, 240, _GREYS).round().astype(int).repeat(3).tolist()
    palette = Image.new("P", (1, 1))
    palette.putpalette(chosen + greys)
    return palette


def compress(sheet: Image.Image, limit: int) -> bytes:
    """The sheet as a palette PNG within `limit` bytes, with as many colours as fit, or the fewest tried."""
    data = b""
    for colours in _COLOURS:
        buffer = io.BytesIO()
        reduced = sheet.quantize(palette=_palette(sheet, colours), dither=Image.Dither.NONE)
        reduced.save(buffer, format="PNG", optimize=True)
        data = buffer.getvalue()
        if len(data) <= limit:
            break
    return data


def draw_small(seed: int, columns: int = 6) -> Image.Image:
    """For the eye of the developer: every class as a network sees it, 112 pixels, each pixel doubled."""
    rows = []
    for modality, labels in LABELS.items():
        for label in labels:
            cases = [render(seed, k, modality=modality, label=label).image for k in range(columns)]
            rows.append(np.concatenate(cases, axis=1))
    whole = Image.fromarray(np.concatenate(rows))
    return whole.resize((whole.width * 2, whole.height * 2), Image.Resampling.NEAREST)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the contact sheet of phantoms.")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--seed", type=int, default=5, help="series of phantoms (default 5)")
    parser.add_argument("--tile", type=int, default=160, help="side of a fundus tile in pixels (default 160)")
    parser.add_argument("--limit", type=int, default=380_000, help="bytes the PNG may have (default 380000)")
    parser.add_argument(
        "--small", action="store_true", help="instead: every class at 112 pixels, pixels doubled"
    )
    options = parser.parse_args(arguments)
    sheet = draw_small(options.seed) if options.small else draw_sheet(options.seed, options.tile)
    data = compress(sheet, options.limit)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, data)
    print(f"{options.out}: {sheet.width} x {sheet.height} pixels, {len(data)} bytes")


if __name__ == "__main__":
    main()
