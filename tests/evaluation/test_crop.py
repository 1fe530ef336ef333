"""FunBench's cut to the fundus: OpenCV's circle to the pixel, squares over the edges, rotation, bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fundus_jax.evaluation.crop import Cut, disc, prepare, read_cuts
from fundus_jax.records import DataError

# Pixels a row of cv2.circle(zeros((D, D)), (D // 2, D // 2), D // 2, 1, -1) in OpenCV 5.0; and the sum for
# the square of a real image.
ROWS = {
    14: [1, 7, 9, 11, 13, 13, 13, 14, 13, 13, 13, 11, 9, 7],
    15: [1, 7, 9, 11, 13, 13, 13, 15, 13, 13, 13, 11, 9, 7, 1],
}


@pytest.mark.parametrize("diameter", ROWS)
def test_the_circle_is_opencvs(diameter: int) -> None:
    assert disc(diameter).sum(axis=1).tolist() == ROWS[diameter]
    assert disc(3410).sum() == 9_132_607
    assert disc(1).all()


def photograph(width: int = 60, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(1, 256, (height, width, 3), dtype=np.uint8))


def test_a_square_over_the_edges_is_black_there() -> None:
    image = photograph()
    square = (
        40,
        60,
        5,
        -6,
        52,
    )  # as the real ones: wider than high, cut at the sides, padded above and below
    cut = np.asarray(prepare(image, "DDR/a.jpg", {"ddr/a.jpg": Cut(False, square)}))
    assert cut.shape == (52, 52, 3)
    inside = disc(52)
    inside[:6] = inside[46:] = False
    np.testing.assert_array_equal(cut[~inside], 0)
    expected = np.zeros((52, 52, 3), np.uint8)
    expected[6:46] = np.asarray(image)[:, 5:57]
    np.testing.assert_array_equal(cut[inside], expected[inside])


def test_rotation_is_by_180_degrees_and_after_the_cut() -> None:
    image, square = photograph(), (40, 60, 5, -6, 52)
    upright, turned = (
        np.asarray(prepare(image, "x", {"x": Cut(rotate, square)})) for rotate in (False, True)
    )
    np.testing.assert_array_equal(turned, upright[::-1, ::-1])
    whole = np.asarray(prepare(image, "x", {"x": Cut(True, None)}))
    np.testing.assert_array_equal(whole, np.asarray(image)[::-1, ::-1])
    assert prepare(image, "x", {"x": Cut(False, None)}) is image


def test_what_is_left_alone_and_what_is_refused() -> None:
    image = photograph()
    for key in ("OCTDL/a.jpg", "TOP/TOP/1.jpg", "DeepDRiD/ultra-widefield_images/1.jpg", "RETOUCH/x.png"):
        assert prepare(image, key, {}) is image
    with pytest.raises(DataError, match="DeepDRiD/regular-fundus/1.jpg: .* no entry"):
        prepare(image, "DeepDRiD/regular-fundus/1.jpg", {})
    with pytest.raises(DataError, match="60 x 40 pixels, but preprocess_info.json cuts 4288 x 2848"):
        prepare(image, "IDRiD/a.jpg", {"idrid/a.jpg": Cut(False, (2848, 4288, 282, -296, 3412))})


@pytest.mark.parametrize(
    "entry",
    [
        {"rotate": 1, "crop": None},
        {"rotate": False, "crop": [1, 2, 3, 4]},
        {"rotate": False, "crop": [40, 60, 5, -6, 0]},
        {"rotate": False, "crop": [40, 60, 5.0, -6, 52]},
        {"rotate": False, "crop": [40, 60, 60, 0, 52]},
        [],
    ],
)
def test_bad_entries_are_named(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "preprocess_info.json"
    path.write_text(json.dumps({"DDR": {"DDR/a.jpg": entry}}))
    with pytest.raises(DataError, match=r"preprocess_info.json: DDR/a.jpg: "):
        read_cuts(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocess_info.json"
    path.write_text("[1]")
    with pytest.raises(DataError, match="not FunBench's preprocess_info.json"):
        read_cuts(path)
