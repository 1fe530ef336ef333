"""Copies are known again, other eyes are not taken for copies, and what has no structure is like nothing."""

import functools

import numpy as np
import pytest
from PIL import Image

from data_pipeline import near
from tests.data_pipeline.copies import COPIES, retina

MODALITIES = ("CFP", "OCT", "UWF")


@functools.cache
def printed(index: int, modality: str) -> np.ndarray:
    return near.fingerprint(retina(index, modality))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("modality", MODALITIES)
def test_a_copy_is_known_again(modality: str, how: str) -> None:
    copy = near.fingerprint(COPIES[how](retina(0, modality)))
    match = near.compare(printed(0, modality), copy)
    assert near.kind(match) == "same picture", match
    assert near.kind(near.compare(copy, printed(0, modality))) == "same picture", "either way round"
    if how in ("mirrored", "upside down", "all"):
        assert match.mirrored


@pytest.mark.parametrize("modality", MODALITIES)
def test_another_eye_is_no_copy(modality: str) -> None:
    for one, other in ((0, 1), (0, 2), (1, 2)):
        match = near.compare(printed(one, modality), printed(other, modality))
        assert near.kind(match) == "", match


def test_what_has_no_structure_is_like_nothing() -> None:
    blank = near.fingerprint(Image.new("RGB", (300, 200), (90, 40, 20)))
    assert blank["count"].tolist() == [0, 0]
    assert near.compare(blank, blank) == near.NO_MATCH
    assert near.compare(blank, printed(0, "CFP")) == near.NO_MATCH


def test_a_picture_of_a_few_pixels_has_a_print() -> None:
    rng = np.random.default_rng(0)
    for size in ((16, 16), (16, 400), (56, 40)):
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        near.fingerprint(noise)
