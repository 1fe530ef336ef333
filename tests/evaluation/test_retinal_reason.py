"""MM-Retinal-Reason: the released files and those of eval.py, options in questions, what is not shown."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fundus_jax import dialog
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.report import Prediction, evaluate
from fundus_jax.evaluation.retinal_reason import RetinalReason, listed_options
from fundus_jax.records import DataError
from tests.growth import LINEAR, growth

SINGLE = "Which disease is shown?\nA. Glaucoma\nB. Drusen, small\nC. Normal"
STORY = "A 62-year-old woman presented with sudden painless loss of vision. What is the diagnosis?"


def encoded(red: int) -> str:
    """A JPEG in base64."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), (red, 90, 20)).save(stream, "JPEG", quality=95)
    return base64.b64encode(stream.getvalue()).decode()


def record(question: str, answer: str, image: Any = None, **more: Any) -> dict[str, Any]:
    """One item in the released form."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image or [encoded(50)], "conversations": turns, "reason": "because of Drusen", **more}


def write(folder: Path, name: str, records: Any) -> Path:
    (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def released(tmp_path: Path) -> Path:
    story = record(
        f"<image>\n<image>\n{STORY}",
        "Central retinal artery occlusion",
        [encoded(10), encoded(20)],
        pmcid="PMC1",
        title="An occluded artery",
        caption="Figure 1: central retinal artery occlusion",
    )
    basic = [
        record(SINGLE, "B"),
        record(
            "Which are seen? A) Drusen B) Exudate C) Oedema D) Scar", "<think>t</think><answer>A,D</answer>"
        ),
        record("Is the disc normal?", "True"),
    ]
    write(tmp_path, "complex_reasoning", [story])
    return write(tmp_path, "basic_reasoning", basic)


def test_the_released_files(released: Path) -> None:
    benchmark = RetinalReason(released)
    assert Counter(one.task for one in benchmark.items) == {
        "complex": 2,
        "single_choice": 1,
        "multi_choice": 1,
    }
    by_id = {one.id: one for one in benchmark.items}
    story = by_id["complex_reasoning:0"]
    assert STORY in story.prompt  # complaint and history are a part of the question
    assert "<image>" not in story.prompt
    for told in ("Figure 1", "An occluded artery", "because of", "occlusion"):
        assert told not in story.prompt
    assert [part["type"] for part in story.messages[0]["content"]] == ["image", "image", "text"]
    assert [round(benchmark.load_image(key).getpixel((5, 5))[0], -1) for key in story.images] == [10, 20]
    assert (story.options, story.answers, story.unit) == ((), ("Central retinal artery occlusion",), "PMC1")
    single, several = by_id["basic_reasoning:0"], by_id["basic_reasoning:1"]
    assert single.options == ("Glaucoma", "Drusen, small", "Normal")
    assert (single.answers, single.multiple) == (("Drusen, small",), False)
    assert (several.answers, several.multiple) == (("Drusen", "Scar"), True)
    assert several.prompt.endswith(dialog.THINK_INSTRUCTION)
    assert by_id["basic_reasoning:2"].answers == ("True",)


def test_exact_and_set_scores(released: Path) -> None:
    items = RetinalReason(released).items
    said = {
        "complex_reasoning:0": "<answer>Retinal artery occlusion.</answer>",
        "basic_reasoning:0": "<answer>B</answer>",
        "basic_reasoning:1": "<answer>A,B</answer>",
        "basic_reasoning:2": "<answer>true</answer>",
    }
    report = evaluate([Prediction(item=one, response=said[one.id]) for one in items])
    assert report["by_task"]["single_choice"]["accuracy"]["value"] == 1.0
    sets = {
        task: {name: one["value"] for name, one in figures.items()}
        for task, figures in report["sets"].items()
    }
    assert sets["multi_choice"] == {"exact": 0, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    # words: {retinal, artery, occlusion} of {central, retinal, artery, occlusion}; and True is said
    assert sets["complex"] == pytest.approx(
        {"exact": 0.5, "precision": 1.0, "recall": (3 / 4 + 1) / 2, "f1": (6 / 7 + 1) / 2}
    )
    assert report["published"] is None
    assert report["funbench"] is None
    assert report["by_level"] == {}


def test_the_files_of_eval_py(tmp_path: Path) -> None:
    """Images by name, in a CSV beside; the one that is in neither is missing."""
    write(
        tmp_path,
        "single_choice_test_data_CFP",
        [record(SINGLE, "A", "a/1.jpg"), record(SINGLE, "B", ["a/2.jpg"]), record(SINGLE, "C", ["a/3.jpg"])],
    )
    (tmp_path / "single_choice_test_data_CFP.csv").write_text(f",base64\na/1.jpg,{encoded(70)}\n")
    (tmp_path / "a").mkdir()
    Image.new("RGB", (7, 7)).save(tmp_path / "a" / "2.JPG")
    with pytest.raises(DataError, match="1 of 3 images are not under .* or in a CSV: a/3.jpg"):
        RetinalReason(tmp_path)
    partial = RetinalReason(tmp_path, Selection(allow_partial=True))
    assert [one.modality for one in partial.items] == ["CFP", "CFP"]
    assert [partial.load_image(one.images[0]).size for one in partial.items] == [(16, 12), (7, 7)]


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. One\nB. Two", ("One", "Two")),
        ("Which? A) One, B) Two, C) Three.", ("One", "Two", "Three.")),
        ("Which? (A) One (B) Two", ("One", "Two")),
        ("Options: A: One; B: Two", ("One", "Two")),
        ("The vitamin A. was given. Which?\nA. One\nB. Two", ("One", "Two")),
        ("A. One", ()),
        ("B. One C. Two", ()),
        ("A patient of 60. Which disease?", ()),
    ],
)
def test_options_in_the_text_of_a_question(question: str, options: tuple[str, ...]) -> None:
    assert listed_options(question) == options


@given(st.lists(st.text("abc xyz-0123456789", min_size=1).filter(str.strip), min_size=2, max_size=8))
def test_listed_options_are_read_back(texts: list[str]) -> None:
    options = tuple(text.strip() for text in texts)
    assert listed_options("Which one?\n" + dialog.option_lines(options)) == options


def test_long_questions_take_linear_time() -> None:
    for unit in ("A. ", "A. x B. ", "(A) ", "A.\n"):
        assert growth(lambda n, unit=unit: listed_options(unit * n), 160_000) < LINEAR


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (record(SINGLE, "D"), "answer 'D' names none"),
        (record(SINGLE, "A,B"), "names none, or too many"),
        (record("Which?", "A"), "names none"),
        (record(SINGLE, ""), "the question or the answer is empty"),
        ({"image": ["x"]}, "conversations are not a human and a gpt turn"),
        (
            {**record(SINGLE, "A"), "conversations": [{"from": "gpt", "value": "A"}] * 2},
            "from 'gpt' and 'gpt'",
        ),
        ({**record(SINGLE, "A"), "image": []}, "image is no text"),
    ],
)
def test_broken_items_are_named(tmp_path: Path, broken: dict[str, Any], reason: str) -> None:
    write(tmp_path, "single_choice_test_data_OCT", [record(SINGLE, "A"), broken])
    with pytest.raises(DataError, match=rf"single_choice_test_data_OCT.json\[1\].*{reason}"):
        RetinalReason(tmp_path, Selection(allow_partial=True))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give MM-Retinal-Reason's folder"):
        RetinalReason(tmp_path)
    with pytest.raises(DataError, match="holds a dict, not a list"):
        RetinalReason(write(tmp_path, "basic_reasoning", {}))
