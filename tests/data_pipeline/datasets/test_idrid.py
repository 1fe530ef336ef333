"""IDRiD: its traps on a miniature that the test writes, its numbers on the real copy."""

import sys
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipeline.datasets import base, idrid, labels
from fundus_jax.records import DataError
from tests.data_pipeline import mini_idrid
from tests.data_pipeline.mini_idrid import HALVES


@pytest.fixture
def mini(tmp_path):
    return mini_idrid.write(tmp_path / "idrid")


def listed(source, **more):
    return {(one.key, one.split): one for one in idrid.samples(source, partial=True, **more)}


def test_listing_of_the_miniature(mini):
    found = listed(mini)
    assert len(found) == 3 + 6 + 2
    one = found["B/IDRiD_003", "train"]
    assert one.labels == {
        "disease": "Severe NPDR",
        "dr_grade": "Severe NPDR",
        "dme_risk": "No hard exudates",
    }
    assert found["B/IDRiD_005", "train"].labels["disease"] == "Normal"
    assert found["B/IDRiD_005", "train"].labels["dr_grade"] == "No DR"
    assert one.masks is None
    assert base.annotated(one).findings is None, (
        "a graded image without masks is not an image without findings"
    )
    assert found["B/IDRiD_001", "train"] != found["B/IDRiD_001", "test"], "part B counts from 001 twice"


def test_masks_become_findings_and_boxes(mini):
    found = {key: base.annotated(one) for key, one in listed(mini).items()}
    four = ("cotton-wool spot", "haemorrhage", "hard exudate", "microaneurysm")
    assert found["A/IDRiD_01", "train"].findings == four
    assert found["A/IDRiD_02", "train"].findings == four[1:], "no mask file: the lesion is absent"
    assert sorted(found["A/IDRiD_02", "train"].searched) == sorted(four), "and was looked for"
    rgba = found["A/IDRiD_55", "test"]
    assert rgba.findings == four, "alpha, which is 255 everywhere, is not the lesion"
    box = next(box for box in rgba.boxes if box.finding == "hard exudate")
    x, y = 999 / mini_idrid.SIZE[0], 999 / mini_idrid.SIZE[1]
    assert (box.x1, box.y1) == (int(22 * x), int(8 * y))
    assert (box.x2, box.y2) == (-int(-26 * x // 1), -int(-12 * y // 1))


def test_part_a_gets_the_grade_of_the_same_picture_only(mini):
    found = listed(mini)
    assert found["A/IDRiD_01", "train"].labels == {"disease": "Mild NPDR", "dr_grade": "Mild NPDR"}
    assert found["A/IDRiD_01", "train"].patient == found["B/IDRiD_001", "train"].patient
    assert found["A/IDRiD_02", "train"].labels == {}
    assert found["B/IDRiD_006", "train"].patient == found["B/IDRiD_001", "test"].patient, "one visit"
    assert len({one.patient for one in found.values()}) == len(found) - 2, "No ID is no visit"


def test_no_grade_where_part_b_contradicts_itself(mini):
    folder = mini / "B. Disease Grading" / "1. Original Images"
    mini_idrid.picture(1).save(folder / HALVES["test"] / "IDRiD_002.jpg", quality=90)  # graded 2, as 001 is 1
    found = listed(mini)
    assert found["A/IDRiD_01", "train"].labels == {}
    assert found["B/IDRiD_002", "test"].patient == found["B/IDRiD_001", "train"].patient


def test_other_counts_than_published_are_refused(mini):
    with pytest.raises(DataError, match="part A has 2 train images, published are 54"):
        idrid.samples(mini)


def test_missing_and_surplus_files_are_all_named(mini):
    folder = mini / "B. Disease Grading" / "1. Original Images" / HALVES["train"]
    for number in (2, 4):
        (folder / f"IDRiD_00{number}.jpg").unlink()
    with pytest.raises(DataError, match="2 files are missing: IDRiD_002, IDRiD_004"):
        listed(mini)
    for number in (2, 4, 7, 8):
        mini_idrid.picture(number).save(folder / f"idrid_00{number}.JPG")  # any case will do
    with pytest.raises(DataError, match="2 images have no row: idrid_007, idrid_008"):
        listed(mini)


def test_bad_rows_are_all_named(mini):
    table = next((mini / "B. Disease Grading" / "2. Groundtruths").glob("b.*"))
    table.write_text(
        "Image name,Retinopathy grade,Risk of macular edema \nIDRiD_001,5,0\nIDRiD_002,1,3\n,1\n"
    )
    with pytest.raises(
        DataError, match=r"line 2 \(IDRiD_001: Retinopathy grade '5'.*line 3 .*'3'.*\), line 4 \(no name"
    ):
        listed(mini)
    table.write_text("Image name,Grade\n")
    with pytest.raises(DataError, match="columns .'Retinopathy grade', 'Risk of macular edema'. are missing"):
        listed(mini)


def test_masks_without_image_and_missing_folders(mini):
    truths = mini / "A. Segmentation" / "2. All Segmentation Groundtruths" / HALVES["train"]
    stray = truths / "2. Haemorrhages" / "IDRiD_03_HE.tif"
    mini_idrid.save_mask(stray, mini_idrid.mask())
    with pytest.raises(DataError, match="1 masks belong to no image: IDRiD_03_HE.tif"):
        listed(mini)
    stray.unlink()
    for path in (truths / "4. Soft Exudates").iterdir():
        path.unlink()
    (truths / "4. Soft Exudates").rmdir()
    with pytest.raises(
        DataError, match="no folder named 4"
    ):  # absent from the copy is not absent from the eye
        listed(mini)


def test_mask_of_another_size_is_refused(mini):
    path = next(mini.rglob("IDRiD_55_HE.tif"))
    Image.open(path).resize((48, 32)).save(path)
    with pytest.raises(DataError, match="IDRiD_55_HE.tif: 48 x 32 pixels, but its image has 96 x 64"):
        base.annotated(listed(mini)["A/IDRiD_55", "test"])


def test_wrong_folder(tmp_path):
    with pytest.raises(DataError, match="neither 'A. Segmentation' nor 'B. Disease Grading' is here"):
        idrid.samples(tmp_path)


def test_tfds_builder_without_tensorflow(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(
        idrid.Idrid, "samples", staticmethod(lambda source: idrid.samples(source, partial=True))
    )
    builder = idrid.Idrid(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=mini))
    train, test = builder.as_data_source("train"), builder.as_data_source("test")
    assert (len(train), len(test)) == (8, 3)
    assert "tensorflow" not in sys.modules
    one = next(row for row in train if row["key"] == b"A/IDRiD_02")
    truth = base.annotated(listed(mini)["A/IDRiD_02", "train"])
    assert one["image"].shape == (64, 96, 3)
    assert np.array_equal(one["image"], np.asarray(Image.open(truth.image)))
    assert [name.decode() for name in one["findings"]] == list(truth.findings)
    assert len(one["searched"]) == 4
    boxes = one["boxes"]
    assert [n.decode() for n in boxes["finding"]] == [b.finding for b in truth.boxes]
    assert np.array_equal(boxes["corners"], [[b.x1, b.y1, b.x2, b.y2] for b in truth.boxes])
    graded = next(row for row in train if row["key"] == b"B/IDRiD_003")
    assert (
        dict(zip(graded["labels"]["task"], graded["labels"]["answer"], strict=True))[b"disease"]
        == b"Severe NPDR"
    )


@pytest.fixture(scope="module")
def real(shared_data):
    if not (shared_data / "idrid").is_dir():
        pytest.skip(f"no real copy of IDRiD in {shared_data}")
    return idrid.samples(shared_data / "idrid")


def test_real_counts_and_grades(real):
    assert Counter((one.key[0], one.split) for one in real) == idrid.COUNTS
    grades = {
        split: [
            sum(o.split == split and o.key[0] == "B" and o.labels["dr_grade"] == grade for o in real)
            for grade in labels.GRADES
        ]
        for split in ("train", "test")
    }
    assert grades == {"train": [134, 20, 136, 74, 49], "test": [34, 5, 32, 19, 13]}
    risks = Counter((o.split, o.labels["dme_risk"]) for o in real if o.key[0] == "B")
    none, far, near = idrid.DME_RISKS.values()
    assert [risks["train", r] for r in (none, far, near)] == [177, 41, 195]
    assert [risks["test", r] for r in (none, far, near)] == [45, 10, 48]


def test_real_masks(real):
    masked = [base.annotated(one) for one in real if one.masks is not None]
    found = Counter((one.split, name) for one in masked for name in one.findings)
    names = ("microaneurysm", "haemorrhage", "hard exudate", "cotton-wool spot")
    assert [found["train", name] for name in names] == [54, 53, 54, 26]
    assert [found["test", name] for name in names] == [27, 27, 27, 14]
    assert max(Counter(box.finding for one in masked for box in one.boxes if one is masked[0]).values()) <= 6


def test_real_parts_share_pictures_and_persons(real):
    """Found by thumbnails, then looked at: 60 of part A stand in part B, two are second shots of an eye."""
    people: dict[str, list] = {}
    for one in real:
        people.setdefault(one.patient, []).append(one)
    assert len(people) == 369
    assert max(map(len, people.values())) == 5
    assert sum(len({one.split for one in person}) > 1 for person in people.values()) == 32
    segmented = [one for one in real if one.key[0] == "A"]
    assert sum(len(people[one.patient]) > 1 for one in segmented) == 62
    assert sum(bool(one.labels) for one in segmented) == 59, "60 less IDRiD_69, which part B grades 3 and 4"
    by_key = {(one.key, one.split): one for one in real}
    assert by_key["A/IDRiD_69", "test"].labels == {}
    assert by_key["A/IDRiD_26", "train"].patient == by_key["B/IDRiD_299", "train"].patient
    assert by_key["A/IDRiD_26", "train"].labels == {}, "the same eye is not the same picture"
