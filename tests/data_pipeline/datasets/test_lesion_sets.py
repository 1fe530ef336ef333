"""DDR, DeepDRiD, Retinal-Lesions, FGADR-143-9, MMC-AMD: grades, masks, splits, and broken copies."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline import questions
from data_pipeline.datasets import base, ddr, deepdrid, fgadr_143_9, mmc_amd, retinal_lesions
from fundus_jax.records import DataError
from tests.data_pipeline import mini_sets
from tests.data_pipeline.mini_files import SIZE, book, photo, spot


def keyed(module, source):
    return {one.key: one for one in module.samples(source, partial=True)}


def edit(path, old, new):
    content = path.read_text(encoding="utf-8")
    assert content.count(old) == 1
    path.write_text(content.replace(old, new), encoding="utf-8")


def test_ddr_joins_its_two_parts(tmp_path):
    found = keyed(ddr, mini_sets.write("ddr", tmp_path))
    assert set(found) == {"a-1", "a-2", "b-1", "c-1", "c-2", "d-1"}, "a-3 is ungradable"
    one = base.annotated(found["a-2"])
    assert (one.split, one.labels["dr_grade"]) == ("train", "Moderate NPDR")
    assert one.findings == ("haemorrhage", "microaneurysm")
    assert sorted(one.searched) == ["cotton-wool spot", "haemorrhage", "hard exudate", "microaneurysm"]
    x, y = 999 / SIZE[0], 999 / SIZE[1]
    assert {(box.x1, box.y1) for box in one.boxes} == {(int(4 * x), int(4 * y))}
    assert {(box.x2, box.y2) for box in one.boxes} == {(-int(-12 * x // 1), -int(-12 * y // 1))}
    assert found["c-2"].split == "test", "graded for testing, so not trained on for its masks"
    assert (found["d-1"].split, found["d-1"].labels) == ("val", {})
    assert base.annotated(found["d-1"]).findings == ("haemorrhage",), "'segmentation label' in valid"
    assert found["a-1"].masks is None


def test_ddr_broken(tmp_path):
    home = mini_sets.write("ddr", tmp_path) / "DDR-dataset"
    edit(home / "DR_grading" / "train.txt", "a-2.jpg 2", "a-2.jpg 6")
    with pytest.raises(DataError, match=r"line 2 \(a-2: grade '6' is none of 0, 1, 2, 3, 4, 5\)"):
        keyed(ddr, tmp_path)
    edit(home / "DR_grading" / "train.txt", "a-2.jpg 6", "a-2.jpg 2")
    spot(home / "lesion_segmentation" / "train" / "label" / "SE" / "z-9.tif")
    with pytest.raises(DataError, match="1 masks belong to no image: SE/z-9.tif"):
        keyed(ddr, tmp_path)
    (home / "lesion_segmentation" / "valid" / "segmentation label").rename(
        home / "lesion_segmentation" / "valid" / "label"
    )
    (home / "lesion_segmentation" / "train" / "label" / "SE" / "z-9.tif").unlink()
    with pytest.raises(DataError, match="valid: no folder named segmentation label"):
        keyed(ddr, tmp_path)


def test_deepdrid(tmp_path):
    found = keyed(deepdrid, mini_sets.write("deepdrid", tmp_path))
    assert found["regular/1_l1"].labels["dr_grade"] == "Severe NPDR", "of its own eye"
    assert found["regular/1_r1"].labels["dr_grade"] == "PDR"
    assert "regular/1_r2" not in found, "5 is ungradable"
    assert (found["regular/347_r1"].split, found["regular/347_r1"].labels["disease"]) == ("test", "Normal")
    wide = found["ultra-widefield/34_r1"]
    assert (wide.modality, wide.split, wide.eye) == ("UWF", "val", "OD")
    assert (found["ultra-widefield/58_l2"].split, found["ultra-widefield/58_l2"].eye) == ("test", "OS")
    assert found["ultra-widefield/76_l1"].eye == found["ultra-widefield/76_l2"].eye == "", "one is the right"
    for name, grade in (("56_r3", "Normal"), ("56_l3", "Mild NPDR")):
        one = found[f"regular/{name}"]
        assert (one.labels["disease"], one.eye) == (grade, ""), "the grade stands under the other eye"
    assert found["regular/1_l1"].patient == found["regular/1_r1"].patient
    assert found["regular/1_l1"].patient != found["ultra-widefield/1_l2"].patient, "numbered anew"


def test_deepdrid_broken(tmp_path):
    home = mini_sets.write("deepdrid", tmp_path)
    table = next(home.rglob("regular-fundus-training.csv"))
    edit(table, "1_l1.jpg,0,3,,4", "1_l1.jpg,0,3,2,4")
    edit(table, "1,1_r2,", "1,1-r2,")
    with pytest.raises(
        DataError, match=r"line 2 \(1_l1: grades of left and right eye.*line 5 \(1-r2: image_id is not"
    ):
        keyed(deepdrid, tmp_path)
    mini_sets.write("deepdrid", tmp_path)
    book(next(home.rglob("Challenge3_labels.xlsx")), {"Sheet1": [["image_id", "grade"], ["58_l2", 0]]})
    with pytest.raises(DataError, match="not one column named DR_Levels or UWF_DR_Levels"):
        keyed(deepdrid, tmp_path)


def test_retinal_lesions(tmp_path):
    found = {key: base.annotated(one) for key, one in keyed(retinal_lesions, mini_sets.write("retinal_lesions", tmp_path)).items()}  # fmt: skip  # noqa: E501
    assert found["10_left"].findings == ("microaneurysm",)
    assert found["10_left"].boxes[0].x1 == 36 * 999 // SIZE[0]
    assert found["10_right"].findings == ("neovascularisation",), "127 is an excluded annotation"
    assert "preretinal haemorrhage" not in found["10_right"].searched, "so it is not known to be absent"
    assert (len(found["10_right"].searched), len(found["10_left"].searched)) == (7, 8)
    assert found["430_left"].findings == (), "no file: no lesion"
    assert len(found["430_left"].searched) == 8
    assert found["10_right"].labels == {"disease": "PDR", "dr_grade": "PDR"}, "the publisher's, not Kaggle's"
    assert found["10_left"].patient == found["10_right"].patient == "10"
    assert found["10_left"].eye == found["10_right"].eye == "", (
        "some images are turned, and no name says which"
    )


def test_retinal_lesions_asks_nothing_about_what_was_excluded(tmp_path):
    """One image is left whose answer would be no, and its mask holds 127 alone."""
    segments = (
        mini_sets.write("retinal_lesions", tmp_path) / "retinal-lesions-v20191227" / "lesion_segs_896x896"
    )
    for name in ("10_left", "430_left"):
        spot(segments / name / "preretinal_hemorrhage.png")
    found = [base.annotated(one) for one in keyed(retinal_lesions, tmp_path).values()]
    asked = questions.ask(found, {"lesion_presence": 9.0})
    assert not [one for about in asked for one in about if "preretinal" in one.question]


def test_retinal_lesions_beside_what_was_excluded(tmp_path):
    """A lesion with 255 and 127 in one mask is there, and its box is of 255."""
    segments = (
        mini_sets.write("retinal_lesions", tmp_path) / "retinal-lesions-v20191227" / "lesion_segs_896x896"
    )
    mask = segments / "10_right" / "neovascularization.png"
    pixels = np.asarray(Image.open(mask)).copy()
    pixels[-4:, -4:] = 127
    Image.fromarray(pixels).save(mask)
    one = base.annotated(keyed(retinal_lesions, tmp_path)["10_right"])
    assert "neovascularisation" in one.searched
    (box,) = one.boxes
    assert (box.finding, box.x2, box.y2) == ("neovascularisation", *(-(-12 * 999 // side) for side in SIZE))


def test_retinal_lesions_broken(tmp_path):
    home = mini_sets.write("retinal_lesions", tmp_path) / "retinal-lesions-v20191227"
    spot(home / "lesion_segs_896x896" / "11_left" / "microaneurysm.png")
    spot(home / "lesion_segs_896x896" / "10_left" / "drusen.png")
    with pytest.raises(DataError, match="2 masks of no image or no .*: 10_left/drusen.png, 11_left/micro"):
        keyed(retinal_lesions, tmp_path)
    edit(home / "dr_grades.csv", "430_left,0,0", "430,0,7")
    with pytest.raises(DataError, match=r"line 4 \(430: no name NUMBER_left"):
        keyed(retinal_lesions, tmp_path)


def test_fgadr_143_9(tmp_path):
    found = keyed(fgadr_143_9, mini_sets.write("fgadr_143_9", tmp_path))
    one = base.annotated(found["0001_1"])
    assert one.findings == ("hard exudate", "microaneurysm")
    assert len(one.searched) == 9
    assert one.labels["dr_grade"] == "Severe NPDR"
    assert base.annotated(found["0002_1"]).findings == ()
    with pytest.raises(DataError, match="images has 2 images, published are 143"):
        fgadr_143_9.samples(tmp_path)


def test_fgadr_143_9_broken(tmp_path):
    table = mini_sets.write("fgadr_143_9", tmp_path) / "fgadr_143_9.csv"
    edit(table, "0001_1.png,new vessels,", "0001_1.png,optic disc,")
    edit(table, "0001_1.png,hemorrhages,", "0001_1.png,HE,")
    edit(table, "nine/microaneurysm/0001_1.png", "../../etc/passwd")
    edit(table, "nine/hard exudate/0001_1.png", "nine/hard exudate/gone.png")
    with pytest.raises(
        DataError,
        match=r"4 bad rows: .*: no file \.\./.*HE: a lesion .*: no file nine/hard exudate/gone.*disc: a",
    ):
        keyed(fgadr_143_9, tmp_path)


def test_mmc_amd(tmp_path):
    found = keyed(mmc_amd, mini_sets.write("mmc_amd", tmp_path))
    assert len(found) == 9
    assert found["f-d-ICG-5579-r"].labels == {"disease": "Dry AMD"}
    assert found["f-d-ICG-5579-r"].image.parent.name == "cfp-448x448", "not the one with CLAHE"
    assert found["f-d-ICG-5579-r"].patient == found["o-d-ICG-5579-r_2"].patient, "one eye in both modalities"
    assert (found["f-d-ICG-5579-r"].eye, found["f-p-ICG-5590"].eye) == ("OD", "")
    assert (found["o-h-31-l"].modality, found["o-h-31-l"].split, found["o-h-31-l"].eye) == (
        "OCT",
        "test",
        "OS",
    )


def test_mmc_amd_broken(tmp_path):
    home = mini_sets.write("mmc_amd", tmp_path) / "mmc-amd-splitAP-train"
    edit(home / "annotations" / "oct.txt", "o-d-ICG-5579-r_1 1\n", "")
    with pytest.raises(DataError, match="annotations/oct.txt: 1 lines, but .* has 2"):
        keyed(mmc_amd, tmp_path)
    edit(home / "annotations" / "cfp.txt", "f-w-77-l 3", "f-w-77-l 2")
    edit(home / "ImageSets" / "cfp.txt", "f-h-2051-l", "fundus2051")
    with pytest.raises(
        DataError, match=r"line 1 \(fundus2051: no name.*line 3 \(f-w-77-l: .*class 2 in annot"
    ):
        keyed(mmc_amd, tmp_path)
    mini_sets.write("mmc_amd", tmp_path)
    pictures = tmp_path / "mmc-amd" / "ImageData"
    photo(pictures / "cfp" / "x.jpg")
    assert keyed(mmc_amd, tmp_path)["f-w-77-l"].image.parent.name == "cfp-448x448", "FunBench's"
    (pictures / "cfp").rename(pictures / "cfp-again")
    (pictures / "cfp-448x448").rename(pictures / "cfp-old")
    with pytest.raises(DataError, match="2 folders named cfp..., none of them cfp or cfp-448x448"):
        keyed(mmc_amd, tmp_path)
