"""FunBench's own files: the real samples, the tree's form, images of the user's, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fundus_jax import dialog
from fundus_jax.evaluation.funbench import FunBench, find_file, modality_of
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.report import Prediction, evaluate
from fundus_jax.records import ConfigError, DataError


@pytest.fixture
def samples(shared_data: Path) -> Path:
    folder = shared_data / "funbench_samples"
    if not folder.is_dir():
        pytest.skip(f"FunBench's sample files are not in {folder}")
    return folder


def test_the_real_samples(samples: Path) -> None:
    items = FunBench(samples).items
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
    plain = FunBench(samples, Selection(instruct=False)).items[0]
    assert plain.prompt.startswith(
        "Please choose the most suitable option based on the image and the question."
    )
    assert plain.prompt.endswith("Remote sensing.")


def test_right_and_wrong_answers_to_the_real_samples(samples: Path) -> None:
    items = FunBench(samples).items
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
    (folder / "L2b-laterality.json").write_text(json.dumps({"info": {}, "data": questions}))
    return root / "FunBench"


def test_images_of_the_user(tmp_path: Path) -> None:
    keys = ["OIA-ODIR/Images/1_left.jpg", "OIA-ODIR/Images/2_left.jpg"]
    source = tree(tmp_path, {key: question() for key in keys})
    images = tmp_path / "images"
    (images / "oia-odir" / "images").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(images / "oia-odir" / "images" / "1_LEFT.jpg")
    with pytest.raises(
        DataError, match=r"1 of 2 images are not under .*: OIA-ODIR/Images/2_left.jpg; add them"
    ):
        FunBench(source, Selection(images=str(images)))
    partial = FunBench(source, Selection(images=str(images), allow_partial=True))
    assert [one.image for one in partial.items] == keys[:1]
    assert partial.missing == (keys[1],)
    assert partial.load_image(keys[0]).size == (30, 20)
    with pytest.raises(ConfigError, match="none of FunBench's images"):
        FunBench(source, Selection(images=str(tmp_path / "nowhere"), allow_partial=True))
    with pytest.raises(ConfigError, match="name the folder"):
        FunBench(source).load_image(keys[0])


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
        FunBench(source)


def test_other_folders_and_files_are_refused(tmp_path: Path, samples: Path) -> None:
    with pytest.raises(DataError, match="give FunBench's folder"):
        FunBench(tmp_path)
    shutil.copytree(samples / "L2-anatomy_perception", tmp_path / "L2-anatomy_perception")
    (tmp_path / "L2-anatomy_perception" / "L2b-laterality.json").write_text("[1]")
    with pytest.raises(DataError, match="not a FunBench file"):
        FunBench(tmp_path)
