"""Boxes from masks: they cover every pixel, they are few, and each hugs what it covers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.datasets import masks, twins
from fundus_jax.records import DataError


def covered(mask, boxes):
    """Which pixels of the mask lie wholly inside a box."""
    height, width = mask.shape
    rows, cols = np.nonzero(mask)
    return [
        any(
            b.x1 / 999 * width <= x + 1e-9
            and (x + 1) <= b.x2 / 999 * width + 1e-9
            and b.y1 / 999 * height <= y + 1e-9
            and (y + 1) <= b.y2 / 999 * height + 1e-9
            for b in boxes
        )
        for y, x in zip(rows, cols, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 1300), st.integers(20, 900), st.integers(0, 40))
def test_boxes_cover_all_pixels_and_are_few(seed, width, height, spots):
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(spots):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = True
    boxes = masks.boxes("haemorrhage", mask)
    assert len(boxes) <= masks.MOST
    assert bool(boxes) == mask.any()
    assert all(covered(mask, boxes))
    areas = [(b.x2 - b.x1) * (b.y2 - b.y1) for b in boxes]
    assert areas == sorted(areas, reverse=True)


def test_near_spots_share_a_box_and_far_ones_do_not():
    mask = np.zeros((500, 500), bool)
    for y, x in ((100, 100), (100, 108), (108, 104), (400, 400)):
        mask[y : y + 4, x : x + 4] = True
    first, second = masks.boxes("haemorrhage", mask)
    assert (first.x1, first.y1, first.x2, first.y2) == (199, 199, 224, 224)
    assert (second.x1, second.y1, second.x2, second.y2) == (799, 799, 808, 808)


def test_a_crowd_is_joined_by_neighbourhood():
    mask = np.zeros((500, 500), bool)
    for cluster in ((50, 50), (50, 400), (400, 50), (400, 400)):
        for step in range(4):
            y, x = cluster[0] + 15 * (step % 2), cluster[1] + 15 * (step // 2)
            mask[y : y + 2, x : x + 2] = True
    boxes = masks.boxes("haemorrhage", mask)
    assert 4 <= len(boxes) <= 6
    assert all(b.x2 - b.x1 < 60 and b.y2 - b.y1 < 60 for b in boxes), "no box reaches across the image"


@pytest.mark.parametrize(
    ("mode", "values"),
    [("P", (0, 1)), ("L", (0, 1)), ("L", (0, 255)), ("L", (127, 128)), ("1", (0, 1)), ("RGBA", None)],
)
def test_encodings_of_masks(tmp_path, mode, values):
    truth = np.zeros((20, 30), bool)
    truth[5:9, 5:9] = True
    if mode == "RGBA":
        planes = [truth * 255, truth * 0, truth * 0, truth * 0 + 255]
        image = Image.fromarray(np.stack(planes, -1).astype(np.uint8))
    else:
        image = Image.fromarray(np.where(truth, values[1], values[0]).astype(np.uint8))
        if mode == "P":
            image = image.convert("P")
            image.putdata(np.where(truth, 1, 0).ravel().tolist())
        elif mode == "1":
            image = Image.fromarray(truth)
    image.save(tmp_path / "mask.tif")
    assert Image.open(tmp_path / "mask.tif").mode == mode
    assert np.array_equal(masks.read(tmp_path / "mask.tif"), truth)


def test_masks_of_other_kinds_are_refused(tmp_path):
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(tmp_path / "mask.tif")
    with pytest.raises(DataError, match="colour mode I;16"):
        masks.read(tmp_path / "mask.tif")


def test_groups_follow_chains():
    alike = np.eye(6, dtype=bool)
    for i, j in ((1, 4), (4, 2), (3, 5)):
        alike[i, j] = alike[j, i] = True
    assert twins.groups(alike) == [0, 1, 1, 3, 1, 3]
