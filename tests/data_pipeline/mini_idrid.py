"""Writes a miniature IDRiD in the publisher's layout, with its odd table headers and its odd RGBA mask."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 96, 64  # width, height
FOLDERS = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "EX": "3. Hard Exudates"}
FOLDERS |= {"SE": "4. Soft Exudates", "OD": "5. Optic Disc"}
HALVES = {"train": "a. Training Set", "test": "b. Testing Set"}
VISITS = {("train", 1): "010119991", ("train", 6): "020119991", ("test", 1): "020119991"}
TABLES = {
    "train": ("a. IDRiD_Disease Grading_Training Labels.csv", "," * 9),
    "test": ("b. IDRiD_Disease Grading_Testing Labels.csv", ""),
}


def picture(number: int) -> Image.Image:
    """A smooth picture that differs from that of every other number."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)


def mask(*rectangles: tuple[int, int, int, int]) -> np.ndarray:
    """[H, W] with ones in some rectangles (left, top, right, bottom)."""
    whole = np.zeros(SIZE[::-1], np.uint8)
    for left, top, right, bottom in rectangles:
        whole[top:bottom, left:right] = 1
    return whole


def save_mask(path: Path, values: np.ndarray, *, rgba: bool = False) -> None:
    """As a palette TIFF with indices {0, 1}; or, like IDRiD_81_EX.tif, red on black, alpha 255 everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if rgba:
        planes = [values * 255, 0 * values, 0 * values, 0 * values + 255]
        image = Image.fromarray(np.stack(planes, -1))
    else:
        image = Image.fromarray(values).convert("P")
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(path, compression="tiff_lzw")


def write(root: Path, *, graded: int = 6, tested: int = 2) -> Path:
    """Two masked training images, one masked test image, and graded ones.

    Image 01 is also graded image 001, recompressed. Image 02 has no soft exudates (no file). The exudate mask
    of test image 55 is RGBA. Training image 006 and test image 001 of part B are of one visit.
    """
    part = root / "A. Segmentation"
    for half, stem, number in (
        ("train", "IDRiD_01", 1),
        ("train", "IDRiD_02", 902),
        ("test", "IDRiD_55", 955),
    ):
        pictures = part / "1. Original Images" / HALVES[half]
        pictures.mkdir(parents=True, exist_ok=True)
        picture(number).save(pictures / f"{stem}.jpg", quality=88)
        for place, (code, folder) in enumerate(FOLDERS.items()):
            path = part / "2. All Segmentation Groundtruths" / HALVES[half] / folder / f"{stem}_{code}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            if (stem, code) != ("IDRiD_02", "SE"):
                spot = mask((10 * place + 2, 8, 10 * place + 6, 12))  # in the upper left
                save_mask(path, spot, rgba=(stem, code) == ("IDRiD_55", "EX"))
    part = root / "B. Disease Grading"
    for half, count, base in (("train", graded, 0), ("test", tested, 5000)):
        pictures = part / "1. Original Images" / HALVES[half]
        pictures.mkdir(parents=True, exist_ok=True)
        name, commas = TABLES[half]
        lines = [f"Image name,Retinopathy grade,Risk of macular edema {commas}"]
        for i in range(1, count + 1):
            visit = VISITS.get((half, i), "No ID").encode() + b"\0"
            picture(base + i).save(pictures / f"IDRiD_{i:03d}.jpg", quality=95, comment=visit)
            lines.append(f"IDRiD_{i:03d},{i % 5},{i % 3}{commas}")
        table = part / "2. Groundtruths" / name
        table.parent.mkdir(exist_ok=True)
        table.write_text("\r\n".join(lines) + "\r\n" + "\r\n", encoding="utf-8-sig", newline="")
    return root
