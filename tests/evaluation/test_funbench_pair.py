"""FunBench's score of two models in pairs, against a plain computation over every possible resample."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundus_jax.evaluation.compare import compare, read, run
from fundus_jax.evaluation.funbench_pair import LEVELS, by_report, pairs, published
from fundus_jax.evaluation.report import Prediction, evaluate
from fundus_jax.evaluation.results import write
from fundus_jax.records import ConfigError, DataError
from fundus_jax.report.versus import render
from tests.evaluation.samples import item

# File -> its place, its options, and of each of five images the right answers and what A and B choose.
GRADES, SEEN, YES = ("mild", "moderate", "severe"), ("AMD", "DR", "glaucoma", "none"), ("Yes", "No")
FILES = {
    "L3a0-drusen": ("L3", "L3a", YES, ["Y Y Y", "Y N Y", "N N N", "N Y N", "Y Y N"]),
    "L3a1-cyst": ("L3", "L3a", YES, ["N N N", "Y Y Y", "Y Y -", "N Y N", "N N N"]),
    "L4b-many": ("L4", "L4b", SEEN, ["AD AD A", "D D D", "A G AD", "G G G", "AG A AG"]),
    "L4c-grade": ("L4", "L4c", GRADES, ["i i i", "o o i", "e o e", "i o i", "o o o"]),
}
LETTERS = {
    **dict(zip("YN", YES, strict=True)),
    **dict(zip("ADG", SEEN, strict=False)),
    **dict(zip("ioe", GRADES, strict=True)),
}


def lines(side: int) -> list[dict[str, Any]]:
    """What A (0) or B (1) answers, as lines of predictions.jsonl."""
    found = []
    for part, (level, task, options, images) in FILES.items():
        for image, cell in enumerate(images):
            texts = [tuple(LETTERS[k] for k in group if k != "-") for group in cell.split()]
            place = {"level": level, "task": task, "part": part, "unit": f"image {image}"}
            said = {"answers": texts[0], "extracted": texts[1 + side] or None, "options": options}
            found.append({"id": f"{part} {image}", **place, **said})
    return found


def score_of(answers: Sequence[Mapping[str, Any]], labels: Mapping[str, Sequence[str]]) -> float:
    """FunBench's score as its paper words it, one label, file and task after the other; NaN: undefined."""
    tree: dict[str, dict[str, dict[str, list[Mapping[str, Any]]]]] = {}
    for one in answers:
        files = tree.setdefault(one["level"], {}).setdefault(one["task"], {})
        files.setdefault(one["part"], []).append(one)
    return mean(
        mean(mean(file_of(found, labels[part]) for part, found in files.items()) for files in tasks.values())
        for tasks in tree.values()
    )


def file_of(answers: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> float:
    found = []
    for label in labels:
        asked = [one for one in answers if label in one["options"]]
        there = [label in (one["extracted"] or ()) for one in asked if label in one["answers"]]
        absent = [label not in (one["extracted"] or ()) for one in asked if label not in one["answers"]]
        if not there or not absent:
            found.append(math.nan)
            continue
        sensitivity, specificity = sum(there) / len(there), sum(absent) / len(absent)
        total = sensitivity + specificity
        found.append(2 * sensitivity * specificity / total if total else 0.0)
    return found[0] if len(labels) == 2 else mean(found)


def mean(values: Any) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def labels_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found = {
        part: sorted({text for one in answers if one["part"] == part for text in one["answers"]})
        for part in FILES
    }
    return {part: ["Yes", "No"] if texts == ["No", "Yes"] else texts for part, texts in found.items()}


def test_against_every_possible_resample() -> None:
    """Five images have 5^5 resamples with equal chances, so the interval is known, not estimated."""
    sides = [lines(side) for side in range(2)]
    labels, images = labels_of(sides[0]), [f"image {k}" for k in range(5)]
    of_image = [[[one for one in side if one["unit"] == image] for image in images] for side in sides]
    drawn: list[list[float]] = []
    for chosen in itertools.combinations_with_replacement(range(5), 5):
        scored = [score_of([x for k in chosen for x in side[k]], labels) for side in of_image]
        orders = math.factorial(5) // math.prod(math.factorial(chosen.count(k)) for k in range(5))
        drawn += [scored] * orders
    table = np.array(drawn)
    assert len(table) == 5**5
    rows = {"first": table[:, 0], "second": table[:, 1], "difference": table[:, 1] - table[:, 0]}
    whole = [score_of(side, labels) for side in sides]
    values = {"first": whole[0], "second": whole[1], "difference": whole[1] - whole[0]}
    found = pairs(sides[0], sides[1], by_report)[()]
    for name, figure in found.items():
        assert figure["value"] == pytest.approx(values[name])
        assert figure["n"] == 20
        low, high = np.nanpercentile(rows[name], (2.5, 97.5))
        assert [figure["low"], figure["high"]] == pytest.approx([low, high], abs=0.01), name


def test_both_sides_are_drawn_together() -> None:
    """Two models that say the same differ by nothing, in every resample."""
    nothing = pairs(lines(0), lines(0), by_report)[()]["difference"]
    assert (nothing["value"], nothing["low"], nothing["high"]) == (0, 0, 0)
    twice = pairs(lines(0), [*lines(0), *lines(0)], by_report)  # two samples of each question
    assert twice[()]["difference"] == nothing
    assert twice["L3", "L3a"]["second"]["n"] == 10, "n counts questions"


def test_questions_without_a_level_have_no_score() -> None:
    assert pairs([{**one, "level": ""} for one in lines(0)], lines(1)[:0], by_report) == {}


def evaluated(folder: Path, side: int, **how: Any) -> dict[str, Any]:
    """An evaluation on disk; each side answers in words that the rules of VLMEvalKit read otherwise."""
    answers = []
    for one in lines(side):
        place = {key: one[key] for key in ("level", "task", "part", "unit", "options", "answers")}
        asked = item(one["id"], **place, multiple=one["task"] == "L4b")
        answers.append(Prediction(item=asked, response=", ".join(one["extracted"] or ("it is unclear",))))
    report = evaluate(answers, **how)
    write(folder, answers, report, how.get("mode", "tail"))
    return report


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    for side in range(2):
        evaluated(tmp_path / "AB"[side], side, published="FunBench", partial=["a sample of them"])
    return tmp_path / "A", tmp_path / "B"


def test_sides_are_those_of_the_reports(tmp_path: Path) -> None:
    """With our own reading in all, by_level and by_task, and as published apart."""
    folders = [tmp_path / name for name in "AB"]
    reports = [evaluated(folder, side, published="FunBench") for side, folder in enumerate(folders)]
    found = compare(*(read(folder) for folder in folders), rules="tail")
    for name, report in zip(("first", "second"), reports, strict=True):
        assert found["all"]["funbench"][name]["value"] == report["funbench"]["overall"]["value"]
        for group in ("by_level", "by_task"):
            assert report[group]
            for key, entry in report[group].items():
                assert found[group][key]["funbench"][name]["value"] == entry["funbench"]["value"]
        for level, figure in report["published"]["groups"].items():
            assert found["published"]["groups"][level][name]["value"] == figure["value"]
    assert found["published"]["groups"].keys() == {"L3", "L4"}
    assert found["published"]["lacking"] == ["L1", "L2"]
    assert found["published"]["score"]["difference"]["value"] is None
    assert "funbench" not in found["by_modality"]["CFP"]


def test_the_published_score_of_all_levels() -> None:
    """It is the response that counts, by the rules, and not what was extracted."""
    grades = [one for one in lines(0) if one["part"] == "L4c-grade"]
    sides = [
        [
            {**one, "level": level, "id": f"{level} {one['id']}", "multiple": False, "response": letter}
            for level in LEVELS
            for one, letter in zip(grades, said, strict=True)
        ]
        for said in ("ABCAB", "ABCAC")
    ]
    found = published(sides[0], sides[1], "tail")
    assert found["lacking"] == []
    assert {key: pair["difference"]["n"] for key, pair in found["groups"].items()} == dict.fromkeys(LEVELS, 5)
    by_hand = []
    for said in ("ABCAB", "ABCAC"):
        texts = [(GRADES["ABC".index(letter)],) for letter in said]
        chosen = [{**one, "extracted": text} for one, text in zip(grades, texts, strict=True)]
        by_hand.append(score_of(chosen, labels_of(lines(0))))
    assert by_hand[0] > by_hand[1] > 0
    values = {name: figure["value"] for name, figure in found["score"].items()}
    assert list(values.values()) == pytest.approx([*by_hand, by_hand[1] - by_hand[0]])


def test_text_and_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    text = run(*runs, None)
    numbers = [one for one in text.splitlines() if "[" in one or "  -  " in one]
    assert all(one.endswith("  PARTIAL") for one in numbers)
    assert "PARTIAL: a sample of them" in text
    assert len([one for one in numbers if one.startswith("        FunBench score")]) == 2 + 3
    assert re.search(r"FunBench score, difference +14\.9 +\[-25\.0, 62\.5\] +20", text)
    assert re.search(r"FunBench as published, difference +-  ", text)
    assert "no question of L1: no FunBench score" in text
    reports = compare(*map(read, runs), rules="tail", partial=["<b>some</b>"])
    page = render("A", "B", [("", reports, [])])
    assert page.count(">FunBench score<") == 1 + 2 + 3
    assert "<b>+14.9</b>" in page.replace(' class="noise"', "")
    assert "FunBench as published, by the rules tail alone" in page
    assert "mean of the levels, no question of L1, L2" in page
    assert "Partial: &lt;b&gt;some&lt;/b&gt;" in page


def test_what_can_not_be_paired_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    evaluated(tmp_path / "C", 1, published="FunBench", mode="phrase")
    with pytest.raises(ConfigError, match="the rules tail, B by phrase: .* --extraction"):
        run(runs[0], tmp_path / "C", None)
    old = [{key: value for key, value in one.items() if key != "multiple"} for one in read(runs[0])]
    with pytest.raises(DataError, match="L3a0-drusen 0: .* evaluate again"):
        compare(old, old, rules="tail")
