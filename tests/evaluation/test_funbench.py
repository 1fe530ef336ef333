"""FunBench's own files: the real samples, the tree's form, images of the user's, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fundus_jax import dialog
from fundus_jax.evaluation.extract import VLMEVALKIT
from fundus_jax.evaluation.funbench import FILES, FunBench, modality_of
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.pictures import find_file
from fundus_jax.evaluation.report import Prediction, evaluate
from fundus_jax.records import ConfigError, DataError


@pytest.fixture
def samples(shared_data: Path) -> Path:
    folder = shared_data / "funbench_samples"
    if not folder.is_dir():
        pytest.skip(f"FunBench's sample files are not in {folder}")
    return folder


PART = Selection(allow_partial=True)
LATERALITY = ("L2b-laterality",)


def test_the_whole_tree_of_files(samples: Path) -> None:
    assert len(FILES) == len(set(FILES)) == 47
    real = {path.relative_to(samples).as_posix() for path in samples.rglob("*.json")}
    assert len(real) == 13
    assert real < set(FILES)


def test_missing_files_are_counted_and_refused(samples: Path) -> None:
    with pytest.raises(
        DataError, match=r"34 of 47 question files are missing: .*L3a0-lesion_recognition-Fib"
    ):
        FunBench(samples)
    assert FunBench(samples, PART).partial[0].startswith("34 of 47 question files are missing")
    chosen = FunBench(samples, Selection(tasks=("L4c-dr_grading",)))
    assert chosen.partial == ("of its tasks only L4c-dr_grading",)
    with pytest.raises(DataError, match="11 of 12 question files are missing"):
        FunBench(samples, Selection(tasks=("L3a-lesion_recognition",)))
    drawn = FunBench(samples, Selection(limit=10, allow_partial=True))
    assert drawn.partial[-1] == "10 of 30 questions, drawn"


def test_a_file_that_was_cut_is_told_by_its_own_number(samples: Path, tmp_path: Path) -> None:
    """Each file says how many images it has: the publisher's L1a 16,348, our sample of it 2."""
    shutil.copytree(samples, tmp_path / "FunBench")
    path = tmp_path / "FunBench" / "L4-disease_diagnosis" / "L4c-dr_grading.json"
    whole = json.loads(path.read_text())
    task = Selection(tasks=("L4c-dr_grading",))
    assert whole["info"]["number of images"] == len(whole["data"]) == 2
    assert FunBench(tmp_path / "FunBench", task).partial == ("of its tasks only L4c-dr_grading",)
    whole["data"].popitem()
    path.write_text(json.dumps(whole))
    reason = "1 of 1 question files are not as published: L4-disease_diagnosis/L4c-dr_grading.json 1 of 2"
    with pytest.raises(DataError, match=f"FunBench: {reason}; mend that"):
        FunBench(tmp_path / "FunBench", task)
    assert FunBench(tmp_path / "FunBench", replace(task, allow_partial=True)).partial[0] == reason
    FunBench(tmp_path / "FunBench", Selection(tasks=LATERALITY))  # of which it says nothing


def test_the_description_of_the_second_mode(samples: Path) -> None:
    both = FunBench(samples, PART).items
    described = FunBench(samples, Selection(emode=2, allow_partial=True))
    assert len(both) == 30
    assert 0 < len(described.items) < 30
    assert any("have no E-mode2 prompt" in note for note in described.notes)
    for one in described.items:
        assert "based on the image, description and the question" in one.prompt
        assert "\nDescription: the fundus image shows" in one.prompt
    with pytest.raises(ConfigError, match="emode is 1"):
        FunBench(samples, Selection(emode=1, allow_partial=True))


def test_the_real_samples(samples: Path) -> None:
    items = FunBench(samples, PART).items
    assert Counter(one.level for one in items) == {"L1": 7, "L2": 5, "L3": 8, "L4": 10}
    assert Counter(one.modality for one in items) == {"CFP": 18, "UWF": 7, "OCT": 5}
    assert {one.part for one in items if one.task == "L3b-lesion_localization"} == {
        "L3b3-lesion_localization-Intraretinal_Fluid",
        "L3b5-lesion_localization-Microaneurysm",
    }
    three = next(one for one in items if len(one.answers) == 3)
    assert three.multiple
    assert three.answers[0] == "Temporal side of the optic disc center"
    counted = next(one for one in items if one.task == "L3d-lesion_counting")
    assert counted.options[-1] == "More than 35 "  # the trailing space is FunBench's
    assert counted.prompt.endswith(dialog.THINK_INSTRUCTION)
    plain = FunBench(samples, Selection(instruct=False, allow_partial=True)).items[0]
    assert plain.prompt.startswith(
        "Please choose the most suitable option based on the image and the question."
    )
    assert plain.prompt.endswith("Remote sensing.")


def test_right_and_wrong_answers_to_the_real_samples(samples: Path) -> None:
    items = FunBench(samples, PART).items
    letters = {one.id: dict(zip(one.options, dialog.LETTERS, strict=False)) for one in items}
    right = [", ".join(letters[one.id][answer] for answer in one.answers) for one in items]
    report = evaluate([Prediction(item=one, response=text) for one, text in zip(items, right, strict=True)])
    assert report["accuracy"]["value"] == 1.0
    # where a file has one sample only, no label has negatives, and there is no score; none is below 1
    assert {entry["funbench"]["value"] for entry in report["by_level"].values()} == {1.0}
    texts = [Prediction(item=one, response=f"<answer>{one.answer}</answer>") for one in items]
    assert evaluate(texts)["accuracy"]["value"] == 1.0
    mute = evaluate([Prediction(item=one, response="I cannot tell.") for one in items])
    assert mute["unparsed"]["share"]["value"] == 1.0
    assert mute["funbench"]["overall"]["value"] == 0.0


def test_naming_every_letter_wins_nothing(samples: Path) -> None:
    items = FunBench(samples, PART).items
    said = [", ".join(dialog.lettered(one.options)) for one in items]
    found = evaluate(
        [Prediction(item=one, response=text) for one, text in zip(items, said, strict=True)],
        published="FunBench",
    )
    assert found["accuracy"]["value"] == 0.0
    single = [one.id for one in items if not one.multiple]
    assert found["published"]["unparsed_ids"] == single
    # where several may be right all are found and nothing is left alone: specificity, and so the score, is 0
    file = "L3/L3b-lesion_localization/L3b5-lesion_localization-Microaneurysm"
    assert found["funbench"]["files"][file]["score"]["value"] == 0.0
    sets = found["sets"]["L3b-lesion_localization"]
    assert sets["recall"]["value"] == 1.0
    assert sets["precision"]["value"] < 0.5


def test_the_published_score_of_right_answers_by_every_rule(samples: Path) -> None:
    items = FunBench(samples, PART).items
    for mode in VLMEVALKIT:
        letters = [{text: k for k, text in dialog.lettered(one.options).items()} for one in items]
        said = [",".join(table[a] for a in one.answers) for one, table in zip(items, letters, strict=True)]
        answers = [Prediction(item=one, response=text) for one, text in zip(items, said, strict=True)]
        found = evaluate(answers, mode=mode, published="FunBench")["published"]
        assert found["score"]["value"] == 1.0
        assert found["unparsed"] == 0
        assert list(found["groups"]) == ["L1", "L2", "L3", "L4"]


def test_modalities_of_the_data_sets() -> None:
    assert modality_of("retinal-lesions/images_896x896/1043_left.jpg") == "CFP"  # the case trap
    assert modality_of("DeepDRiD/ultra-widefield_images/x.jpg") == "UWF"
    assert modality_of("DeepDRiD/regular_fundus_images/x.jpg") == "CFP"
    assert modality_of("MMC-AMD/ImageData/oct/o-d-1.jpg") == "OCT"
    assert modality_of("UCSD/OCT/test/NORMAL/NORMAL-1-1.jpeg") == "OCT"
    with pytest.raises(DataError, match="add a row to MODALITY_OF"):
        modality_of("Messidor/a.jpg")


def question(**changes: Any) -> dict[str, Any]:
    """One question in FunBench's form."""
    raw = {"options": ["Left eye", "Right eye"], "question": "Which eye?", "gt": "Left eye"}
    return {
        "E-mode2": None,
        "E-mode3": "Which eye? A. Left eye, B. Right eye.",
        "gt": "A",
        "raw_data": raw,
        **changes,
    }


def tree(root: Path, questions: dict[str, Any]) -> Path:
    """A FunBench tree of one file."""
    folder = root / "FunBench" / "L2-anatomy_perception"
    folder.mkdir(parents=True)
    told = {"number of images": len(questions)}
    (folder / "L2b-laterality.json").write_text(json.dumps({"info": told, "data": questions}))
    return root / "FunBench"


def test_images_of_the_user(tmp_path: Path) -> None:
    keys = ["OIA-ODIR/Images/1_left.jpg", "OIA-ODIR/Images/2_left.jpg"]
    source = tree(tmp_path, {key: question() for key in keys})
    images = tmp_path / "images"
    chosen = Selection(images=str(images), tasks=LATERALITY)
    (images / "oia-odir" / "images").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(images / "oia-odir" / "images" / "1_LEFT.jpg")
    with pytest.raises(
        DataError, match=r"1 of 2 images are not under .*: OIA-ODIR/Images/2_left.jpg; mend that"
    ):
        FunBench(source, chosen)
    partial = FunBench(source, replace(chosen, allow_partial=True))
    assert [one.images for one in partial.items] == [(keys[0],)]
    assert partial.missing == (keys[1],)
    assert partial.partial[0].startswith("1 of 2 images are not under")
    assert partial.load_image(keys[0]).size == (30, 20)
    with pytest.raises(ConfigError, match="none of 2 images"):
        FunBench(source, replace(chosen, images=str(tmp_path / "nowhere"), allow_partial=True))
    with pytest.raises(ConfigError, match="name the folder"):
        FunBench(source, PART).load_image(keys[0])


@pytest.mark.parametrize(
    "key", ["../secret.png", "/etc/secret.png", "DDR/../../secret.png", "DDR\\..\\secret.png", ""]
)
def test_keys_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="leads out of its folder"):
        find_file(tmp_path, key)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gt": "B"}, "gt 'B' does not name"),
        ({"gt": "Q"}, "gt 'Q' does not name"),
        ({"gt": None}, "not a question"),
        ({"raw_data": {"options": ["Left eye"]}}, "not a question"),
    ],
)
def test_broken_questions_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    source = tree(tmp_path, {"OIA-ODIR/1.jpg": question(**changes)})
    with pytest.raises(DataError, match=f"L2b-laterality: OIA-ODIR/1.jpg: {reason}"):
        FunBench(source, PART)


def test_a_file_that_is_not_funbenchs_or_holds_a_key_twice(tmp_path: Path) -> None:
    source = tree(tmp_path, {"OIA-ODIR/1.jpg": question()})
    (source / "L2-anatomy_perception" / "._L2b-laterality.json").write_text("what macOS leaves behind")
    assert len(FunBench(source, PART).items) == 1
    extra = source / "L2-anatomy_perception" / "L2c-vessels.json"
    extra.write_text("{}")
    with pytest.raises(
        DataError, match="files that FunBench has not: L2-anatomy_perception/L2c-vessels.json"
    ):
        FunBench(source, PART)
    extra.unlink()
    one = json.dumps(question())
    (source / "L2-anatomy_perception" / "L2b-laterality.json").write_text(
        f'{{"info": {{"number of images": 2}}, "data": {{"DDR/1.jpg": {one}, "DDR/1.jpg": {one}}}}}'
    )
    with pytest.raises(DataError, match=r"DDR/1.jpg is there twice"):
        FunBench(source, PART)


def test_images_as_the_publishers_script_gives_them(tmp_path: Path) -> None:
    key = "Retinal-Lesions/images_896x896/1_left.jpg"
    source = tree(tmp_path, {key: question(), "TOP/TOP/1.jpg": question()})
    for path in (key, "TOP/TOP/1.jpg"):
        file = tmp_path / "images" / path
        file.parent.mkdir(parents=True)
        Image.new("RGB", (40, 30), (200, 100, 50)).save(file, quality=100, subsampling=0)
    info = tmp_path / "preprocess_info.json"
    entry = {"rotate": True, "crop": [30, 40, 5, -5, 40]}
    info.write_text(
        json.dumps({"Retinal-Lesions": {key.replace("Retinal-Lesions", "retinal-lesions"): entry}})
    )
    chosen = Selection(images=str(tmp_path / "images"), tasks=LATERALITY, preprocess=str(info))
    prepared = FunBench(source, chosen)
    picture = prepared.load_image(key)
    assert picture.size == (40, 40)
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert prepared.load_image("TOP/TOP/1.jpg").size == (40, 30)
    assert FunBench(source, replace(chosen, side=224)).load_image(key).size == (224, 224)
    info.write_text(json.dumps({"Retinal-Lesions": {}}))
    with pytest.raises(DataError, match="no entry"):
        FunBench(source, chosen).load_image(key)


def test_other_folders_and_files_are_refused(tmp_path: Path, samples: Path) -> None:
    with pytest.raises(DataError, match="give FunBench's folder"):
        FunBench(tmp_path)
    shutil.copytree(samples / "L2-anatomy_perception", tmp_path / "L2-anatomy_perception")
    for text in ("[1]", '{"info": {}, "data": {}}'):
        (tmp_path / "L2-anatomy_perception" / "L2b-laterality.json").write_text(text)
        with pytest.raises(DataError, match="not a FunBench file"):
            FunBench(tmp_path, PART)
