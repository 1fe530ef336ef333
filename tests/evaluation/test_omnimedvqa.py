"""OmniMedVQA: all real fundus and OCT questions, the subset and its counts, images, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fundus_jax import dialog
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.omnimedvqa import FILES, FOLDER, MODALITIES, OCT, OmniMedVQA, read
from fundus_jax.evaluation.report import Prediction, evaluate
from fundus_jax.records import ConfigError, DataError

CFP = "Fundus Photography"


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Path:
    folder = shared_data / "omnimedvqa"
    if not folder.is_dir():
        pytest.skip(f"OmniMedVQA's questions are not in {folder}")
    return folder


def test_the_counts_of_the_real_questions(real: Path) -> None:
    items, left, _ = read(real, tuple(MODALITIES), Selection())
    assert Counter((one.modality, one.task) for one in items) == {
        ("CFP", "MR"): 1190,
        ("CFP", "AI"): 439,
        ("CFP", "LG"): 1830,
        ("CFP", "DD"): 769,
        ("OCT", "MR"): 488,
        ("OCT", "DD"): 2461,
    }
    assert left == {"Other Biological Attributes": 1170 + 1697}
    assert len(items) + left.total() == 10_044
    assert len({one.unit for one in items if one.modality == "CFP"}) <= 5034
    photographs, left, _ = read(real, (CFP,), Selection())
    assert len(photographs) == 4228
    assert left[f"modality {OCT}"] == 4646
    assert Counter(len(one.options) for one in photographs) == {4: 3667, 2: 439, 3: 122}


def test_a_file_that_was_cut_is_told_by_the_published_numbers(real: Path, tmp_path: Path) -> None:
    """The numbers are those of the real questions; what is asked of is one file."""
    for name, published in {**FILES[CFP], **FILES[OCT]}.items():
        assert len(json.loads((real / FOLDER / f"{name}.json").read_text())) == published
    (tmp_path / FOLDER).mkdir(parents=True)
    for name in FILES[OCT]:
        questions = json.loads((real / FOLDER / f"{name}.json").read_text())
        more = [question(question_id="x", modality_type="X-Ray")]  # as in the publisher's file
        (tmp_path / FOLDER / f"{name}.json").write_text(json.dumps(questions[:600] + more))
    chosen = Selection(modalities=(OCT,), allow_partial=True)
    with pytest.raises(ConfigError, match="2 of 2 .* not as published: OCT & X-Ray 2017 600 of 630, Retinal"):
        OmniMedVQA(tmp_path, chosen)  # and none of the images is there


def test_images_made_here_and_missing_ones(real: Path, tmp_path: Path) -> None:
    """The real annotations with real image paths; a third of the images lies there, spelt in another case."""
    items, *_ = read(real, (CFP,), Selection())
    keys = sorted({one.images[0] for one in items if one.task == "AI"})
    for key in keys[::3]:
        path = tmp_path / key.lower()
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 8, 7)).save(path)
    chosen = Selection(images=str(tmp_path), modalities=(CFP,), tasks=("AI",))
    with pytest.raises(DataError, match=rf"{len(keys) - len(keys[::3])} of {len(keys)} images are not under"):
        OmniMedVQA(real, chosen)
    partial = OmniMedVQA(
        real, Selection(images=str(tmp_path), modalities=(CFP,), tasks=("AI",), allow_partial=True)
    )
    assert {one.images[0] for one in partial.items} == set(keys[::3])
    assert len(partial.missing) == len(keys) - len(keys[::3])
    assert partial.load_image(keys[0]).size == (8, 8)
    assert "AI 439" in partial.notes[0]
    assert "OLIVES 593" in partial.notes[0]  # of all tasks
    assert "Other Biological Attributes 1170" in partial.notes[1]


def test_the_published_score_of_perfect_and_of_constant_answers(real: Path) -> None:
    items, *_ = read(real, tuple(MODALITIES), Selection())
    letters = [
        {text: letter for letter, text in dialog.lettered(one.options).items()}[one.answer] for one in items
    ]
    asked = [(one, letter) for one, letter in zip(items, letters, strict=True)][::5]
    right = [Prediction(item=one, response=f"<answer>{letter}</answer>") for one, letter in asked]
    score = evaluate(right, published="Omni-Fundus")["published"]
    assert score["score"]["value"] == 1.0
    assert list(score["groups"]) == ["MR", "AI", "LG", "DD"]
    always = [Prediction(item=one, response="A") for one, _ in asked]
    score = evaluate(always, published="Omni-Fundus")["published"]
    share = {
        task: sum(letter == "A" for one, letter in asked if one.task == task)
        / sum(one.task == task for one, _ in asked)
        for task in ("MR", "AI", "LG", "DD")
    }
    assert {name: one["value"] for name, one in score["groups"].items()} == pytest.approx(share)
    assert score["score"]["value"] == pytest.approx(sum(share.values()) / 4)


def question(**changes: Any) -> dict[str, Any]:
    """One question in the publisher's form."""
    fields = {
        "dataset": "OLIVES",
        "question_id": "OLIVES_0000",
        "question_type": "Anatomy Identification",
        "question": "Which eye is shown?",
        "gt_answer": "Left eye.",
        "image_path": "Images/OLIVES/a.tif",
        "option_A": "Right eye.",
        "option_B": "Left eye.",
        "modality_type": CFP,
    }
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}


def source(root: Path, questions: Any, name: str = "OLIVES") -> Path:
    """A folder of one question file."""
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    (root / FOLDER / f"{name}.json").write_text(json.dumps(questions))
    return root


def test_a_question_and_its_prompt(tmp_path: Path) -> None:
    chest = question(modality_type=..., modality="CT(Computed Tomography)", question_id="c")  # a real slip
    [one], left, _ = read(source(tmp_path, [question(), chest]), (CFP,), Selection(instruct=False))
    assert one.prompt == (
        "Question: Which eye is shown?\nOptions:\nA. Right eye.\nB. Left eye.\n"
        "Please select the correct answer from the options above. \n"
    )
    assert (one.id, one.task, one.part, one.answers) == (
        "OLIVES:OLIVES_0000",
        "AI",
        "AI-OLIVES",
        ("Left eye.",),
    )
    assert left == {"modality CT(Computed Tomography)": 1}


def test_missing_question_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "Images" / "OLIVES").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "Images" / "OLIVES" / "a.tif")
    folder = source(tmp_path, [question()])
    with pytest.raises(DataError, match="10 of 11 question files are missing: ACRIMA, Adam Challenge, "):
        OmniMedVQA(folder)
    partial = OmniMedVQA(folder, Selection(allow_partial=True))
    assert partial.load_image(partial.items[0].images[0]).size == (4, 4)
    report = evaluate(
        [Prediction(item=partial.items[0], response="B")], published="Omni-Fundus", partial=partial.partial
    )
    assert report["published"]["groups"]["AI"]["value"] == 1.0
    assert report["published"]["lacking"] == ["MR", "LG", "DD"]
    assert report["published"]["score"]["value"] is None  # three of four groups have no question


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": ""}, "question is missing, empty or no text"),
        ({"image_path": ...}, "image_path is missing"),
        ({"question_type": "Poetry"}, "question_type is 'Poetry'"),
        ({"gt_answer": "left eye."}, "gt_answer 'left eye.' is not one of the options"),
        ({"option_A": "Left eye."}, "gt_answer 'Left eye.' is not one of"),  # it is two of them
        ({"option_B": None}, "options are"),
        ({"option_D": "Neither."}, "options are"),
    ],
)
def test_broken_questions_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"OLIVES.json\[1\]: {reason}"):
        read(source(tmp_path, [question(), question(**changes)]), (CFP,), Selection())


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give OmniMedVQA's folder"):
        OmniMedVQA(tmp_path)
    with pytest.raises(DataError, match="holds a dict, not a list"):
        OmniMedVQA(source(tmp_path, {}))
    with pytest.raises(DataError, match=r"OLIVES.json\[0\]: holds a int"):
        OmniMedVQA(source(tmp_path, [1]))
    with pytest.raises(ConfigError, match="there are Fundus Photography"):
        OmniMedVQA(source(tmp_path, [question()]), Selection(modalities=("X-Ray",)))
    with pytest.raises(DataError, match="2 items have only 1 ids"):
        OmniMedVQA(source(tmp_path, [question(), question()]), Selection(allow_partial=True))
    with pytest.raises(DataError, match="leads out of its folder"):
        OmniMedVQA(source(tmp_path, [question(image_path="../a.png")]), Selection(allow_partial=True))
