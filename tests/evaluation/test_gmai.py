"""GMAI-MMBench's table: made rows in its layout, the subset, pictures found again, bad rows by number."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fundus_jax import dialog
from fundus_jax.evaluation import gmai, vlmevalkit, wide
from fundus_jax.evaluation.gmai import FILE, GmaiMMBench
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.report import Prediction, evaluate
from fundus_jax.records import ConfigError, DataError
from tests.growth import LINEAR, growth

PART = Selection(allow_partial=True)  # no table made here is the published one
COLUMNS = ("index", "image", "question", "A", "B", "C", "D", "E", "answer", "category", "original task")
COLUMNS += ("modality", "clinical VQA task", "department", "perceptual granularity")
TASKS = {
    "AR": "Attribute Recognition",
    "NT": "Nervous Tissue",
    "BVR": "Blood Vessels Recognition",
    "DD": "Disease Diagnosis",
    "SG": "Severity Grading",
}


def encoded(number: int) -> str:
    """A picture whose red channel is `number`, in base64."""
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (number, 1, 2)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def row(number: int, task: str = "DD", **changes: Any) -> dict[str, str]:
    """One row; `changes` replace cells, with _ for a blank in the column's name."""
    cells = {
        "index": str(number),
        "image": encoded(number),
        "question": f"What is seen\tin picture {number},\n\"as a 'quoted' text\"?",
        "A": "Glaucoma",
        "B": "Drusen, large",
        "C": "None of them",
        "answer": "B",
        "category": "Drusen, large",
        "original task": "CLS_2D",
        "modality": "Fundus Photography",
        "clinical VQA task": TASKS.get(task, task),
        "department": "Ophthalmology",
        "perceptual granularity": "image",
    }
    return {**dict.fromkeys(COLUMNS, ""), **cells, **{k.replace("_", " "): v for k, v in changes.items()}}


def table(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = COLUMNS) -> Path:
    """The rows as pandas writes them: tabs, and quotes only where they are needed."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [row(k, task) for k, task in enumerate([*TASKS, "DD", "SG"], start=1)]
    rows += [
        row(20, modality="OCT"),
        row(21, "NT", modality="oct"),
        row(22, modality="X-ray"),
        row(23, "Bone", modality="X-ray"),
        row(24, "Image Quality Grading"),
        row(25, "SG", image="3"),  # the picture of row 3
    ]
    table(tmp_path / FILE, rows)
    return tmp_path


def test_the_subset_and_its_counts(source: Path) -> None:
    benchmark = GmaiMMBench(source, PART)
    assert Counter(one.task for one in benchmark.items) == {"AR": 1, "NT": 2, "BVR": 1, "DD": 3, "SG": 3}
    assert Counter(one.modality for one in benchmark.items) == {"CFP": 8, "OCT": 2}
    assert "10 of 13 questions, AR 1, BVR 1, DD 3, NT 2, SG 3" in benchmark.notes[0]
    assert benchmark.notes[1] == "left out by the rule: Image Quality Grading 1, modality X-ray 2"
    only = GmaiMMBench(source / FILE, Selection(modalities=("OCT",), allow_partial=True))
    assert [one.id for one in only.items] == ["20", "21"]
    with pytest.raises(ConfigError, match="no row has a modality in"):
        GmaiMMBench(source, Selection(modalities=("MRI",)))


def test_another_file_than_the_published_one_is_partial(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = f"{FILE} is not the published validation file: it has 13 rows of 4550, and the md5 "
    with pytest.raises(DataError, match=f"GMAI-MMBench: {reason}"):
        GmaiMMBench(source)
    [told] = GmaiMMBench(source, PART).partial
    assert told.startswith(reason)
    monkeypatch.setattr(gmai, "MD5", hashlib.md5((source / FILE).read_bytes()).hexdigest())  # noqa: S324
    assert GmaiMMBench(source).partial == ()


def test_a_question_and_its_picture(source: Path) -> None:
    benchmark = GmaiMMBench(source, Selection(instruct=False, allow_partial=True))
    one = benchmark.items[3]
    assert one.prompt == (
        "Question: What is seen\tin picture 4,\n\"as a 'quoted' text\"?\n"
        "Options:\nA. Glaucoma\nB. Drusen, large\nC. None of them\n"
        "Please select the correct answer from the options above. \n"
    )
    assert one.answers == ("Drusen, large",)
    for item in benchmark.items:
        number = 3 if item.id == "25" else int(item.id)
        assert benchmark.load_image(item.images[0]).convert("RGB").getpixel((0, 0)) == (number, 1, 2)
    units = {item.id: item.unit for item in benchmark.items}
    assert units["25"] == units["3"]
    assert len(set(units.values())) == len(units) - 1


def test_the_published_score(source: Path) -> None:
    items = GmaiMMBench(source, PART).items
    answers = [Prediction(item=one, response="A" if one.id in "16" else "(B)") for one in items]
    found = evaluate(answers, published="GMAI-Fundus")["published"]
    values = {name: (one["value"], one["n"]) for name, one in found["groups"].items()}
    two_of_three = pytest.approx(2 / 3)
    assert values == {"AR": (0, 1), "NT": (1, 2), "BVR": (1, 1), "DD": (two_of_three, 3), "SG": (1, 3)}
    assert found["score"]["value"] == pytest.approx((0 + 1 + 1 + 2 / 3 + 1) / 5)


def test_vlmevalkit_scores_it_against_its_own_questions(source: Path) -> None:
    """As VLMEvalKit does: the right answers come from the benchmark's table, by index."""
    rows = [row(k, task, answer="ABC"[k % 3]) for k, task in enumerate(["Bone", *TASKS, "DD"], start=7)]
    path = table(source / FILE, rows)
    items = GmaiMMBench(path, PART).items
    assert [one.id for one in items] == [str(k) for k in range(8, 14)]
    letters = {text: letter for letter, text in dialog.lettered(items[0].options).items()}
    answers = [Prediction(item=one, response=letters[one.answer]) for one in items]
    known = {int(one["index"]): one["answer"] for one in rows}
    head, *lines = vlmevalkit.rows(answers)
    for line in lines:
        cells = dict(zip(head, line, strict=True))
        assert known[cells["index"]] == cells["answer"] == cells["prediction"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": ""}, "its image is 'nothing', neither base64 nor another row's index"),
        ({"image": "77"}, "its image is '77'"),
        ({"answer": ""}, "there is no answer: the TEST files have none"),
        ({"answer": "D"}, "answer 'D' is the letter of none of 3 options"),
        ({"answer": "b"}, "answer 'b' is"),
        ({"B": ""}, "options are"),
        ({"question": " "}, "the question is empty"),
    ],
)
def test_bad_rows_are_named_by_number(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    path = table(tmp_path / FILE, [row(1), row(2, **changes), row(3)])
    with pytest.raises(DataError, match=rf"1 bad rows: row 2 \(index 2\): .*{reason}"):
        GmaiMMBench(path)
    # outside of the subset nobody needs them
    fine = [row(1), row(2, **{"modality": "X-ray", **changes}), row(3)]
    assert len(GmaiMMBench(table(path, fine), PART).items) == 2


def test_all_bad_rows_are_counted(tmp_path: Path) -> None:
    path = table(tmp_path / FILE, [row(k, answer="Z") for k in range(1, 9)])
    with pytest.raises(DataError, match="8 bad rows: row 1 .*; row 5 "):
        GmaiMMBench(path)


def test_broken_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with pytest.raises(DataError, match="give GMAI-MMBench's TSV"):
        GmaiMMBench(tmp_path)
    table(path, [row(1), row(2), row(1)])
    with pytest.raises(DataError, match="row 3: has the index 1 of row 1"):
        GmaiMMBench(path)
    table(path, [row(1)], [name for name in COLUMNS if name not in ("image", "modality")])
    with pytest.raises(DataError, match="no column image, modality; there are index, question"):
        GmaiMMBench(path)
    path.write_text(table(path, [row(1), row(2)]).read_text() + "3\ttoo\tfew\n")
    with pytest.raises(DataError, match="row 3: 3 cells, the header has 15"):
        GmaiMMBench(path)
    path.write_bytes(table(path, [row(1)]).read_bytes() + b"\xff\xfe\t\n")
    with pytest.raises(DataError, match="row 2: .*utf-8"):
        GmaiMMBench(path)
    path.write_text(table(path, [row(1)]).read_text() + '2\t"never closed')
    with pytest.raises(DataError, match="row 2: unexpected end of data"):
        GmaiMMBench(path)
    path.write_text("")
    with pytest.raises(DataError, match="no column index"):
        GmaiMMBench(path)


# A carriage return alone, which writers leave unquoted, ends a line for every reader of such tables.
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=3, max_size=3)))
def test_every_row_is_found_again(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([["a", "b", "c"], *rows])
    found = list(wide.rows(path, "\t"))
    assert [cells for _, cells in found] == [["a", "b", "c"], *rows]
    for begin, cells in found[1:]:
        assert wide.row_at(path, "\t", begin, 3) == cells


def test_reading_takes_linear_time(tmp_path: Path) -> None:
    one = row(1)
    paths = {
        n: table(tmp_path / f"{n}.tsv", [{**one, "index": str(k)} for k in range(n)]) for n in (100, 1600)
    }
    assert growth(lambda n: GmaiMMBench(paths[n], PART), 1600) < LINEAR
