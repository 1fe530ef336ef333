"""Phantoms: reproducible, true to their rules, visible, and without a nuisance that gives the label away."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from data_pipeline.datasets.phantom import LABELS, MIX, RULES, Phantom, encode, render, sheet
from data_pipeline.datasets.phantom.boxes import GRID, MOST, find_boxes
from data_pipeline.datasets.phantom.rules import draw_case
from fundus_jax.findings import FINDINGS
from fundus_jax.records import ConfigError

SIZE = 112
CASES = [(modality, label) for modality in MIX for label in LABELS[modality]]
FUNDUS = [case for case in CASES if case[0] != "OCT"]


@cache
def series(modality: str, label: str, count: int = 24) -> tuple[Phantom, ...]:
    """The same phantoms for every test of this file: 18 classes of 24, about 430."""
    return tuple(render(31, index, modality=modality, label=label) for index in range(count))


def everything() -> list[Phantom]:
    """All of them."""
    return [drawn for case in CASES for drawn in series(*case)]


def digest(drawn: Phantom) -> str:
    """One hash of all that a phantom says."""
    parts = [drawn.image.tobytes(), repr((drawn.label, drawn.eye, drawn.findings, drawn.boxes)).encode()]
    parts += [mask.tobytes() for mask in drawn.masks.values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_same_arguments_give_the_same_bytes() -> None:
    first = [digest(render(5, index)) for index in range(12)]
    assert [digest(render(5, index)) for index in reversed(range(12))] == first[::-1]
    assert len(set(first)) == 12
    assert digest(render(6, 0)) != first[0]


def test_another_process_gives_the_same_bytes(repo_root: Path) -> None:
    code = (
        "import hashlib; from data_pipeline.datasets.phantom import render\n"
        "print(*[hashlib.sha256(render(5, k).image.tobytes()).hexdigest() for k in range(8)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [hashlib.sha256(render(5, k).image.tobytes()).hexdigest() for k in range(8)]


@pytest.mark.parametrize(("modality", "label"), CASES)
def test_shape_type_and_names(modality: str, label: str) -> None:
    for drawn in series(modality, label):
        assert drawn.image.shape == (SIZE, SIZE, 3)
        assert drawn.image.dtype == np.uint8
        assert (drawn.modality, drawn.label) == (modality, label)
        assert drawn.eye in (("",) if modality == "OCT" else ("OD", "OS"))
        assert drawn.findings == tuple(sorted(drawn.masks)) == tuple(sorted(drawn.counts))
        for name, mask in drawn.masks.items():
            assert name in FINDINGS
            assert modality in FINDINGS[name].modalities
            assert mask.dtype == np.bool_
            assert mask.shape == (SIZE, SIZE)
            assert mask.any()


@pytest.mark.parametrize(("modality", "label"), CASES)
def test_findings_obey_the_rule_of_the_label(modality: str, label: str) -> None:
    rule = RULES[modality][label]
    for drawn in series(modality, label):
        found = set(drawn.findings)
        assert found >= set(rule.required)
        assert found <= set(rule.allowed)
        assert not rule.any_of or found & set(rule.any_of)


def test_the_rules_are_the_grading_schemes() -> None:
    """Spelt out once more, so that a slip in the table of doses is seen."""
    for modality in ("CFP", "UWF"):
        rules = RULES[modality]
        assert rules["Normal"].allowed == ()
        assert rules["Mild NPDR"].allowed == rules["Mild NPDR"].required == ("microaneurysm",)
        new = {"neovascularisation", "vitreous haemorrhage"}
        for label in ("Moderate NPDR", "Severe NPDR"):
            assert rules[label].required == ("haemorrhage", "microaneurysm")
            assert not new & set(rules[label].allowed)
        assert set(rules["PDR"].any_of) == new
        assert rules["Glaucoma"].allowed == ("large cup",)
        assert rules["AMD"].allowed == ("drusen",)
    assert RULES["OCT"]["DME"].required == ("intraretinal fluid",)
    assert "pigment epithelial detachment" not in RULES["OCT"]["DME"].allowed
    assert RULES["OCT"]["CNV"].required == ("pigment epithelial detachment",)
    assert RULES["OCT"]["Drusen"].allowed == ("drusen",)


@pytest.mark.parametrize("modality", ["CFP", "UWF"])
def test_severe_means_many_haemorrhages_in_all_quadrants(modality: str) -> None:
    half = SIZE // 2
    for drawn in series(modality, "Severe NPDR"):
        mask = drawn.masks["haemorrhage"]
        for rows in (slice(half), slice(half, None)):
            for cols in (slice(half), slice(half, None)):
                assert ndimage.label(mask[rows, cols], np.ones((3, 3)))[1] >= 3
    severe = min(drawn.counts["haemorrhage"] for drawn in series(modality, "Severe NPDR"))
    moderate = max(drawn.counts["haemorrhage"] for drawn in series(modality, "Moderate NPDR"))
    assert severe > 2 * moderate


def test_cups_are_large_in_glaucoma_only() -> None:
    for modality, label in FUNDUS:
        for drawn in series(modality, label):
            ratio = drawn.anatomy["cup_ratio"]
            assert (ratio > 0.6) == (label == "Glaucoma") == ("large cup" in drawn.findings)
            if label == "Glaucoma":
                radius = np.sqrt(drawn.masks["large cup"].sum() / np.pi) / SIZE
                assert radius / drawn.anatomy["disc_radius"] == pytest.approx(ratio, rel=0.12)


def test_the_disc_is_on_the_side_of_the_eye_and_bright() -> None:
    eyes = Counter()
    for modality in ("CFP", "UWF"):
        for drawn in series(modality, "Normal"):
            x, y = drawn.anatomy["disc_x"], drawn.anatomy["disc_y"]
            eyes[drawn.eye] += 1
            assert (x > 0.5) == (drawn.eye == "OD")
            assert (drawn.anatomy["fovea_x"] < x) == (drawn.eye == "OD")
            row, col = int(y * SIZE), int(x * SIZE)
            green = drawn.image[..., 1].astype(float)
            disc = green[row - 2 : row + 3, col - 2 : col + 3].mean()
            mirrored = green[row - 2 : row + 3, SIZE - col - 3 : SIZE - col + 2].mean()
            assert disc > mirrored + 30
    assert min(eyes.values()) >= 10


def inside(box_low: int, box_high: int, count: int) -> np.ndarray:
    """Which of `count` pixels in a row lie wholly between two coordinates of a box."""
    edges = np.arange(count + 1) * GRID / count
    return (edges[:-1] >= box_low) & (edges[1:] <= box_high)


def check_boxes(mask: np.ndarray, boxes: tuple) -> None:
    """Few boxes, largest first; each holds some of the mask, together all of it."""
    assert 1 <= len(boxes) <= MOST
    covered = np.zeros_like(mask)
    for box in boxes:
        assert 0 <= box.x1 < box.x2 <= GRID
        assert 0 <= box.y1 < box.y2 <= GRID
        here = inside(box.y1, box.y2, len(mask))[:, None] & inside(box.x1, box.x2, len(mask))[None, :]
        assert (here & mask).any()
        covered |= here
    assert not (mask & ~covered).any()
    areas = [(box.x2 - box.x1) * (box.y2 - box.y1) for box in boxes]
    assert areas == sorted(areas, reverse=True)


def test_boxes_cover_the_masks() -> None:
    for drawn in everything():
        assert tuple(dict.fromkeys(box.finding for box in drawn.boxes)) == drawn.findings
        for name, mask in drawn.masks.items():
            check_boxes(mask, tuple(box for box in drawn.boxes if box.finding == name))


def test_boxes_fit_tightly_around_separate_lesions() -> None:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[10:14, 10:14] = mask[90:98, 80:88] = mask[20:23, 95:99] = True
    boxes = find_boxes("drusen", mask)
    assert [(box.x1, box.y1) for box in boxes] == [(80 * 999 // 112, 90 * 999 // 112), (89, 89), (847, 178)]
    assert find_boxes("drusen", np.zeros((SIZE, SIZE), dtype=bool)) == ()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=30),
    st.integers(64, 90),
)
def test_boxes_cover_any_mask(squares: list[tuple[int, int, int]], size: int) -> None:
    mask = np.zeros((size, size), dtype=bool)
    for row, col, side in squares:
        mask[row : row + side, col : col + side] = True
    check_boxes(mask, find_boxes("drusen", mask))


def contrast(drawn: Phantom, name: str) -> float:
    """Largest difference of a channel between the mask's mean and that of a ring around it (0 to 255)."""
    mask = drawn.masks[name]
    lesions = np.logical_or.reduce(list(drawn.masks.values()))
    ring = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(lesions)
    image = drawn.image.astype(float)
    return float(np.abs(image[mask].mean(axis=0) - image[ring].mean(axis=0)).max())


def test_every_lesion_stands_out_at_112_pixels() -> None:
    seen = Counter()
    for drawn in everything():
        for name in drawn.findings:
            if (drawn.modality, name) == ("OCT", "drusen"):
                continue  # seen by the shape of the bright line above them: the next test
            seen[drawn.modality, name] += 1
            assert contrast(drawn, name) > 28, (drawn.modality, drawn.label, name)
    assert len(seen) == 8 * 2 + 3


def test_drusen_of_a_scan_lift_the_bright_line() -> None:
    for index, drawn in enumerate(series("OCT", "Drusen")):
        mask = drawn.masks["drusen"]
        flat = render(31, index, modality="OCT", label="Normal").image[..., 0].astype(float)
        image = drawn.image[..., 0].astype(float)
        cols = np.flatnonzero(mask.sum(axis=0) >= 3)
        tops = mask[:, cols].argmax(axis=0)
        line = np.mean([image[tops - k, cols] for k in (1, 2)])
        assert line > image[mask].mean() + 40
        assert line > np.mean([flat[tops - k, cols] for k in (1, 2)]) + 40
        surface = [(picture > 100).argmax(axis=0) for picture in (image, flat)]  # first bright row: the ILM
        assert np.mean(surface[0] == surface[1]) > 0.9  # it would move over a third of the columns and more


@pytest.mark.parametrize(("modality", "label"), [case for case in FUNDUS if case[1] != "Normal"])
def test_the_eye_is_the_same_under_every_label(modality: str, label: str) -> None:
    """Away from its lesions a picture is, to the pixel, its healthy twin's: no nuisance knows the label."""
    for drawn, healthy in zip(series(modality, label), series(modality, "Normal"), strict=True):
        lesions = np.logical_or.reduce(list(drawn.masks.values()))
        reach = 12 if "vitreous haemorrhage" in drawn.findings else 5
        far = ~ndimage.binary_dilation(lesions, iterations=reach)
        assert far.mean() > 0.02
        assert np.array_equal(drawn.image[far], healthy.image[far])
        assert drawn.anatomy["crescent"] == healthy.anatomy["crescent"]


def test_brightness_does_not_tell_glaucoma_from_normal() -> None:
    normal = [render(41, k, modality="CFP", label="Normal").image.mean() for k in range(60)]
    glaucoma = [render(42, k, modality="CFP", label="Glaucoma").image.mean() for k in range(60)]
    wins = np.mean(np.asarray(glaucoma)[:, None] > np.asarray(normal)[None, :])
    assert 0.33 < wins < 0.67  # the area under the ROC curve; its standard error is 0.053


def test_modalities_and_labels_are_drawn_as_promised() -> None:
    drawn = Counter(draw_case(np.random.default_rng([77, k]), None, None) for k in range(6000))
    expected = {(m, label): 6000 * MIX[m] / len(LABELS[m]) for m, label in CASES}
    assert set(drawn) == set(expected)
    chi_square = sum((drawn[case] - mean) ** 2 / mean for case, mean in expected.items())
    assert chi_square < 45  # 17 degrees of freedom: 1 in 4000 draws lies above
    given_label = Counter(draw_case(np.random.default_rng([78, k]), None, "Normal")[0] for k in range(2000))
    assert given_label["CFP"] > given_label["OCT"] > given_label["UWF"] > 0


@pytest.mark.parametrize(("modality", "label"), [("CFP", "PDR"), ("UWF", "Severe NPDR"), ("OCT", "CNV")])
def test_a_larger_picture_shows_the_same_case(modality: str, label: str) -> None:
    for index in range(3):
        small = render(9, index, modality=modality, label=label)
        large = render(9, index, size=224, modality=modality, label=label)
        assert large.image.shape == (224, 224, 3)
        assert large.counts == small.counts
        assert large.findings == small.findings
        assert large.anatomy == pytest.approx(small.anatomy, abs=0.01)
        reduced = np.asarray(Image.fromarray(large.image).reduce(2)).astype(float)
        assert np.corrcoef(reduced.ravel(), small.image.ravel())[0, 1] > 0.9


def test_png_holds_the_pixels() -> None:
    drawn = render(1, 1)
    data = encode(drawn)
    assert data.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), drawn.image)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": -1, "index": 0}, "seed"),
        ({"seed": 0, "index": -1}, "index"),
        ({"seed": 0, "index": 0, "size": 16}, "56"),
        ({"seed": 0, "index": 0, "modality": "MRI"}, "CFP"),
        ({"seed": 0, "index": 0, "modality": "OCT", "label": "Glaucoma"}, "DME"),
        ({"seed": 0, "index": 0, "label": "Cataract"}, "Cataract"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        render(**arguments)


def test_the_contact_sheet_is_written_within_its_limit(tmp_path: Path) -> None:
    out = tmp_path / "new" / "sheet.png"
    sheet.main([f"--out={out}", "--tile=40", "--limit=60000"])
    assert out.stat().st_size <= 60_000
    assert Image.open(out).width > 5 * 40
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"]
