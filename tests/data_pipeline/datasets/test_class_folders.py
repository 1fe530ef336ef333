"""OCTID, JSIEC and UCSD: a folder a class."""

from collections import Counter

import pytest

from data_pipeline.datasets import jsiec, labels, layout, octid, ucsd
from fundus_jax.records import DataError
from tests.data_pipeline import mini_sets
from tests.data_pipeline.mini_files import photo


def listed(module, source):
    return {one.key: one for one in module.samples(source, partial=True)}


def test_octid_classes(tmp_path):
    found = listed(octid, mini_sets.write("octid", tmp_path))
    assert Counter(one.labels["disease"] for one in found.values()) == dict.fromkeys(octid.DISEASES, 3)
    assert found["AMRD/AMRD2"].labels == {"disease": "AMD"}
    assert found["CSR/CSR1"].labels == {"disease": labels.CSC}
    assert found["MH/MH3"].eye == ""
    assert {one.split for one in found.values()} == {"train", "test"}


def test_jsiec_classes(tmp_path):
    found = listed(jsiec, mini_sets.write("jsiec", tmp_path))
    assert len(set(jsiec.DISEASES)) == 39
    assert [one.labels["disease"] for one in found.values()] == list(jsiec.DISEASES)
    one = next(one for one in found.values() if one.key.startswith("0.3.DR1/"))
    assert "dr_grade" not in one.labels, "its own scale"
    assert one.key.endswith("817f5b."), "the double dot of the names"


def test_ucsd_splits_and_patients(tmp_path):
    found = listed(ucsd, mini_sets.write("ucsd", tmp_path))
    assert Counter(one.split for one in found.values()) == {"train": 9, "test": 8}
    assert found["CNV-1001-2"].patient == found["DRUSEN-1001-1"].patient == "1001"
    assert found["CNV-1001-2"].split == "train", "the publisher's split stays"
    assert found["DRUSEN-1001-1"].split == "test"


def test_ucsd_as_kaggle_has_it(tmp_path):
    photo(tmp_path / "__MACOSX" / "test" / "CNV" / "._CNV-5-1.jpeg")
    (tmp_path / "__MACOSX" / "train").mkdir()
    for split, patients in (("train", range(4)), ("val", range(4, 5)), ("test", range(5, 7))):
        for name in ucsd.CLASSES:
            for patient in patients:
                photo(tmp_path / "oct2017 " / split / name / f"{name}-{patient}-1.jpeg")
    found = listed(ucsd, tmp_path)
    assert Counter(one.split for one in found.values()) == {"train": 16, "val": 4, "test": 8}
    with pytest.raises(DataError, match="train has 16 images, published are 83484; val has 4 .*; test has 8"):
        ucsd.samples(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "folder"),
    [
        (octid, "octid", "CSR"),
        (jsiec, "jsiec", "1000images/8.MH"),
        (ucsd, "ucsd", "ZhangLabData/CellData/OCT/test/DME"),
    ],
)
def test_missing_and_strange_class_folders_are_named(module, name, folder, tmp_path):
    path = mini_sets.write(name, tmp_path) / folder
    path.rename(path.with_name("Healthy"))
    with pytest.raises(DataError, match=rf"missing: \['{path.name}'\].*no class: \['Healthy'\]"):
        listed(module, tmp_path)


def test_ucsd_images_in_the_wrong_folder_are_all_named(tmp_path):
    home = mini_sets.write("ucsd", tmp_path) / "ZhangLabData" / "CellData" / "OCT" / "train"
    photo(home / "DME" / "CNV-3-1.jpeg")
    photo(home / "NORMAL" / "normal.jpeg")
    with pytest.raises(
        DataError, match="2 names are not .*: train/DME/CNV-3-1.jpeg, train/NORMAL/normal.jpeg"
    ):
        listed(ucsd, tmp_path)


def test_wrong_counts_name_the_class(tmp_path):
    mini_sets.write("octid", tmp_path)
    with pytest.raises(
        DataError, match="Normal has 3 images, published are 206; AMD has 3 images, .* are 55"
    ):
        octid.samples(tmp_path)


def test_hashed_splits_stay_and_are_about_four_to_one():
    splits = [layout.hashed_split("octid", str(number)) for number in range(5000)]
    assert 0.78 < splits.count("train") / 5000 < 0.82
    assert splits[:12] == [layout.hashed_split("octid", str(number)) for number in range(12)]
    assert splits != [layout.hashed_split("neh", str(number)) for number in range(5000)]
    known = {"0": "train", "3": "train", "17": "train", "18": "train"}
    assert {name: layout.hashed_split("octid", name) for name in known} == known, "on every machine"
