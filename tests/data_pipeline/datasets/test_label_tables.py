"""OCTDL, RFMiD, TOP, NEH, OIA-ODIR and GRAPE: what their tables say, and what is said of a broken one."""

import csv
import io
import re
from collections import Counter

import pytest

from data_pipeline import questions
from data_pipeline.datasets import grape, neh, octdl, odir, rfmid, top
from fundus_jax.records import DataError
from tests.data_pipeline import mini_sets
from tests.data_pipeline.mini_files import book, photo, text


def listed(module, source, **more):
    return {(one.split, one.key): one for one in module.samples(source, **{"partial": True, **more})}


def keyed(module, source):
    return {one.key: one for one in module.samples(source, partial=True)}


def edit(path, old, new):
    content = path.read_text(encoding="utf-8")
    assert content.count(old) == 1
    path.write_text(content.replace(old, new), encoding="utf-8")


def test_octdl(tmp_path):
    found = keyed(octdl, mini_sets.write("octdl", tmp_path))
    assert found["amd_101_2"].labels == {"disease": "AMD", "amd_grade": "Intermediate AMD"}
    assert found["amd_101_1"].patient == found["amd_101_2"].patient == "101"
    assert found["amd_101_1"].eye == "", "0 is not known"
    assert found["amd_102_1"].eye == "OD"
    assert Counter(one.labels["disease"] for one in found.values())["Retinal vein occlusion"] == 1


def test_octdl_broken(tmp_path):
    table = mini_sets.write("octdl", tmp_path) / "OCTDL_labels.csv"
    edit(table, "AMD,early", "AMD,none")
    edit(table, "DME,none,none,200,OS", "DMO,none,none,200,OS")
    with pytest.raises(
        DataError,
        match=r"2 bad rows: line 2 \(amd_101_1: subcategory 'none' is none of .*line 5 .*disease 'DMO'",
    ):
        keyed(octdl, tmp_path)
    mini_sets.write("octdl", tmp_path)
    image = next(tmp_path.rglob("dme_200_1.jpg"))
    image.rename(image.parent.parent / "RAO" / image.name)
    with pytest.raises(DataError, match="1 images lie in the folder of another class: dme_200_1.jpg"):
        keyed(octdl, tmp_path)


def test_octdl_with_the_real_table(tmp_path, shared_data):
    real = shared_data / "labels" / "OCTDL_labels.csv"
    if not real.is_file():
        pytest.skip(f"no real table of OCTDL in {shared_data}")
    (tmp_path / real.name).write_bytes(real.read_bytes())
    rows = list(csv.DictReader(io.StringIO(real.read_text(encoding="utf-8-sig"))))
    for row in rows:
        path = tmp_path / "OCTDL" / row["disease"] / f"{row['file_name']}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"listing opens no picture")
    found = octdl.samples(tmp_path)
    assert len(found) == 2064
    assert len({one.patient for one in found}) == 820
    assert Counter(one.eye for one in found) == {"": 1616, "OS": 245, "OD": 203}
    assert Counter(one.labels["disease"] for one in found) == {
        "AMD": 1231, "Normal": 332, "Epiretinal membrane": 155, "DME": 147, "Retinal vein occlusion": 101,
        "Vitreomacular interface disease": 76, "Retinal artery occlusion": 22,
    }  # fmt: skip
    stages = Counter(one.labels.get("amd_grade") for one in found)
    assert stages == {
        "Late AMD": 717, "Early AMD": 266, "Intermediate AMD": 248, "No AMD": 332, None: 501,
    }  # fmt: skip
    asked = questions.ask(found, {"amd_grade": 1.0})
    assert sum(map(len, asked)) == 1231 + 332
    share = sum(one.split == "train" for one in found) / len(found)
    assert 0.75 < share < 0.85
    next(tmp_path.rglob("amd_1047099_1.jpg")).unlink()
    with pytest.raises(DataError, match="1 files are missing: amd_1047099_1; get the archive again"):
        octdl.samples(tmp_path)


def test_rfmid(tmp_path):
    found = listed(rfmid, mini_sets.write("rfmid", tmp_path))
    assert len(found) == 10
    assert found["train", "1"].labels == {"disease": "Normal"}
    assert found["train", "2"].labels == {"disease": "Diabetic retinopathy"}
    assert found["train", "4"].labels == {"disease": "Macular hole"}, "MHL; MH is media haze"
    both = found["train", "3"]
    assert (both.labels, both.diseases) == ({}, ("Media haze", "Tessellated fundus"))
    assert len({found[split, "1"].patient for split in ("train", "val", "test")}) == 3, "IDs restart"


def test_rfmid_as_kaggle_has_it(tmp_path):
    wanted = listed(rfmid, mini_sets.write("rfmid", tmp_path / "ieee"))
    parts = {"a. Training Set": ("Training", "Training"), "b. Validation Set": ("Evaluation", "Validation")}
    for folder, (home, images) in {**parts, "c. Testing Set": ("Test", "Test")}.items():
        inner = tmp_path / "kaggle" / f"{home}_Set" / f"{home}_Set"
        inner.mkdir(parents=True)
        (tmp_path / "ieee" / "1. Original Images" / folder).rename(inner / images)
        table = next((tmp_path / "ieee" / "2. Groundtruths").glob(f"{folder[0]}.*"))
        table.rename(inner / table.name[3:])
    found = listed(rfmid, tmp_path / "kaggle")
    assert {key: one.labels for key, one in found.items()} == {key: one.labels for key, one in wanted.items()}


def test_rfmid_broken(tmp_path):
    table = next(mini_sets.write("rfmid", tmp_path).rglob("a. RFMiD*.csv"))
    edit(table, "\n2,1,1", "\n2,1,3")
    edit(table, "\n5,0", "\n5,1")
    edit(table, "\n4,1", "\n3,1")
    with pytest.raises(
        DataError,
        match=r"line 3 \(2: DR '3': neither 0 nor 1\), line 5 \(3 again\), line 6 \(5: Disease_Risk 1",
    ):
        rfmid.samples(tmp_path, partial=True)
    mini_sets.write("rfmid", tmp_path)
    for number in (1, 4):
        (tmp_path / "1. Original Images" / "a. Training Set" / f"{number}.png").unlink()
    assert ("train", "1") not in listed(rfmid, tmp_path), "a copy that is known to be partial"
    with pytest.raises(DataError, match="2 files are missing: 1, 4"):
        rfmid.samples(tmp_path)


def test_rfmid_with_the_real_training_table(tmp_path, shared_data):
    real = shared_data / "labels" / "RFMiD_Training_Labels.csv"
    if not real.is_file():
        pytest.skip(f"no real table of RFMiD in {shared_data}")
    home = tmp_path / "Training_Set" / "Training_Set"
    (home / "Training").mkdir(parents=True)
    (home / real.name).write_bytes(real.read_bytes())
    for number in range(1, 1921):
        (home / "Training" / f"{number}.png").write_bytes(b"listing opens no picture")
    found = rfmid.samples(tmp_path, partial=True)
    assert Counter(one.split for one in found) == {"train": 1920}
    counts = Counter(disease for one in found for disease in one.diseases)
    assert (counts["Normal"], counts["Diabetic retinopathy"], counts["Media haze"]) == (401, 376, 317)
    assert (counts["Macular hole"], counts["AMD"], counts["Drusen"]) == (11, 100, 138)
    assert Counter(len(one.diseases) for one in found) == {1: 401 + 1061, 2: 373, 3: 79, 4: 5, 5: 1}
    assert sum("disease" in one.labels for one in found) == 401 + 1061
    asked = questions.ask(found, {"disease_presence": 2.0})
    assert {len(one.diseases) > 1 for one, about in zip(found, asked, strict=True) if about} == {True}
    assert sum(map(bool, asked)) > 0.95 * 458, "nearly every image with several diseases"
    said: dict[str, list[str]] = {}
    for one, about in zip(found, asked, strict=True):
        for question in about:
            match = re.search(r"(?:signs of|Is) (.+?)(?: among the diagnoses here)?\?", question.question)
            assert match is not None
            said.setdefault(match[1], []).append(question.answer)
            assert (question.answer == "Yes") == (match[1] in one.diseases)
    assert all(answers.count("Yes") == answers.count("No") > 0 for answers in said.values())
    assert sum(map(len, said.values())) > 800
    assert asked == questions.ask(found, {"disease_presence": 2.0})


def test_top(tmp_path):
    found = keyed(top, mini_sets.write("top", tmp_path))
    assert found["000000_00"].labels == {"disease": "Normal", "diabetes": "No"}
    assert found["000006_01"].labels == {"diabetes": "Yes"}, "diabetes is no disease of the eye, nor health"
    assert found["000089_00"].diseases == ("Retinal vein occlusion", "Glaucoma")
    assert found["000011_01"].labels == {"disease": "Diabetic retinopathy", "diabetes": "Yes"}
    assert (found["000000_00"].eye, found["000000_01"].eye) == ("OS", "OD")
    assert found["000000_00"].patient == found["000000_01"].patient == "03090"


def test_top_broken(tmp_path):
    table = mini_sets.write("top", tmp_path) / "data.csv"
    edit(table, "000000_01.jpg,03090,78,M,R", "000000_01.jpg,,78,M,R")
    edit(table, "04951,42,M,L,0,1", "04951,42,M,X,0,1")
    with pytest.raises(
        DataError, match=r"line 3 \(000000_01: no ID\), line 6 \(000089_00: LR 'X' is none of L, R"
    ):
        keyed(top, tmp_path)
    text(table, "filename,ID,age,sex,LR,AMD,RVO,Gla,MH,DR,RD,RP,AO")
    with pytest.raises(DataError, match=r"columns \['DM'\] are missing"):
        keyed(top, tmp_path)


def test_neh(tmp_path):
    found = keyed(neh, mini_sets.write("neh", tmp_path))
    volume = [found[f"CNV/1/OS/{scan}"] for scan in (1, 2, 3)]
    assert [one.labels["disease"] for one in volume] == ["Normal", "Drusen", "CNV"], "the folder is no label"
    assert {one.patient for one in volume} == {"cnv/1"}
    assert len(found) == 6, "a file that the table names twice is one"
    assert found["DRUSEN/9/OS/y"].patient == "cnv/1", "the same bytes under another number"
    assert found["DRUSEN/9/OS/y"].labels == {"disease": "Drusen"}, (
        "labels stay; decontaminate reports conflicts"
    )
    assert found["NORMAL/1/OD/a"].patient == "normal/1", "numbers restart in each folder"
    assert (volume[0].eye, found["NORMAL/1/OD/a"].eye) == ("OS", "OD")


def test_neh_broken(tmp_path):
    table = next(mini_sets.write("neh", tmp_path).rglob("data_information.csv"))
    edit(table, "1,CNV,OS,2,drusen", "1,CNV,OS,2,druzen")
    edit(table, "2,drusen,x.TIFF,DRUSEN/7/OD/x.TIFF", "2,normal,x.TIFF,DRUSEN/7/OD/x.TIFF")
    edit(table, "y.jpg,DRUSEN/9/OS/y.jpg", "y.jpg,elsewhere/y.jpg")
    said = (
        r"line 4 \(cnv/1/os/2.jpg: Label 'druzen' .* line 7 \(drusen/7/od/x.tiff again\), line 8 \(no name\)"
    )
    with pytest.raises(DataError, match=said):
        keyed(neh, tmp_path)


def test_odir(tmp_path):
    found = listed(odir, mini_sets.write("odir", tmp_path))
    assert found["train", "0_left"].labels == {"disease": "Cataract"}, "labels of an eye, not of the patient"
    assert found["train", "0_right"].labels == {"disease": "Normal"}
    two = found["train", "1_left"]
    assert (two.labels, two.diseases) == (
        {"dr_grade": "Moderate NPDR"}, ("Diabetic retinopathy", "Other disease"),
    )  # fmt: skip
    assert found["train", "1_right"].labels == {"disease": "Other disease"}, "lens dust is a remark"
    assert found["val", "3000_left"].labels == {"disease": "AMD"}
    assert found["val", "3000_right"].labels == {"disease": "Diabetic retinopathy", "dr_grade": "Mild NPDR"}
    assert found["test", "4999_left"].diseases == ("Diabetic retinopathy", "Hypertensive retinopathy")
    assert found["test", "4999_left"].labels == {"dr_grade": "PDR"}
    assert {("train", "2_left"), ("test", "4999_right")}.isdisjoint(found), "nothing to see"
    assert (found["train", "0_left"].eye, found["train", "0_right"].eye) == ("OS", "OD")
    assert found["train", "0_left"].patient == found["train", "0_right"].patient


def test_odir_as_kaggle_has_it(tmp_path):
    rows = [mini_sets.odir_row(*row[1:]) for row in mini_sets.ODIR_ROWS if row[0] == "Training Set"]
    home = tmp_path / "ODIR-5K" / "ODIR-5K"
    book(home / "data.xlsx", {"Sheet1": [mini_sets.ODIR_HEAD, *rows]})
    for row in rows:
        for cell in row[3:5]:
            photo(home / "Training Images" / str(cell))
    photo(home / "Testing Images" / "937_left.jpg")
    found = listed(odir, tmp_path)
    assert {split for split, _ in found} == {"train"}
    assert len(found) == 5


def test_odir_broken(tmp_path):
    home = mini_sets.write("odir", tmp_path) / "Training Set"
    rows = [mini_sets.odir_row(0, "", "normal fundus", "N"), mini_sets.odir_row(1, "drusen", "drusen", "O")]
    rows[1][4], rows[1][-1] = "2_right.jpg", 2
    book(home / "Annotation" / "training annotation (English).xlsx", {"Sheet1": [mini_sets.ODIR_HEAD, *rows]})
    with pytest.raises(
        DataError, match=r"3 bad rows: line 2 \(0_left: no keyword\), line 3 \(1_left: O '2'.*2_right"
    ):
        listed(odir, tmp_path)


def test_grape(tmp_path):
    found = keyed(grape, mini_sets.write("grape", tmp_path))
    assert set(found) == {"1_OD_1", "1_OD_2", "1_OS_1", "2_OD_1"}, "a visit without photograph is none"
    assert found["1_OS_1"].labels == {
        "progression_plr2": "Progression",
        "progression_plr3": "No progression",
        "progression_md": "Progression",
    }
    assert (found["1_OS_1"].eye, found["1_OS_1"].patient) == ("OS", "1")
    assert {one.split for one in found.values() if one.patient == "1"} == {found["1_OD_1"].split}


def test_grape_broken(tmp_path):
    mini_sets.write("grape", tmp_path)
    (tmp_path / "CFPs" / "CFPs" / "1_OD_2.jpg").unlink()
    with pytest.raises(DataError, match="CFPs: 1 files are missing: 1_OD_2"):
        grape.samples(tmp_path)
    head = ["Subject Number", "Laterality", "Progression Status", "", ""], ["", "", "PLR2", "PLR3", "MD"]
    visit = ["Subject Number", "Laterality", "Corresponding CFP"]
    rows = [[1, "OD", "2_OD_1.jpg"], [3, "OS", "3_OS_1.jpg"]]
    book(
        tmp_path / grape.TABLE,
        {"Baseline": [*head, [1, "OD", 0, 0, 2]], "Follow-up": [visit, [""], *rows]},
    )
    with pytest.raises(DataError, match=r"line 3 \(1_OD: Progression Status/MD '2' is none of 0, 1\)"):
        grape.samples(tmp_path)
    book(
        tmp_path / grape.TABLE,
        {"Baseline": [*head, [1, "OD", 0, 0, 1]], "Follow-up": [visit, [""], *rows]},
    )
    with pytest.raises(DataError, match=r"line 3 \(2_OD_1: the photograph of eye 1_OD\)"):
        grape.samples(tmp_path)
