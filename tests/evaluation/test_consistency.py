"""Clinical consistency: the publisher's own example, denials, contradictions, the questions asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundus_jax.evaluation.consistency import (
    consistency_table,
    evaluate_reports,
    read_by_rules,
    score_and_total,
)
from fundus_jax.evaluation.describe import Reports
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.report import Prediction
from fundus_jax.findings import Mentions
from fundus_jax.records import ConfigError
from tests.evaluation.samples import example, item, reply, stage

NAMES = ("drusen", "haemorrhage", "hard exudate", "microaneurysm")


def test_the_publishers_example() -> None:
    """Microaneurysms and exudates are there; exudates are named, six other findings are denied: 7 of 8."""
    denied = frozenset("abcdef")
    said = Mentions(frozenset({"hard exudate"}), denied)
    assert score_and_total({"microaneurysm", "hard exudate"}, said) == (7, 8)


@pytest.mark.parametrize(
    ("present", "absent", "expected"),
    [
        ((), (), (0, 2)),  # nothing said
        (("drusen", "haemorrhage"), (), (2, 2)),
        (("drusen",), ("haemorrhage",), (1, 2)),  # a positive finding denied
        (("drusen", "microaneurysm"), (), (1, 3)),  # a negative one claimed
        (("drusen",), ("microaneurysm",), (2, 3)),
        (("drusen", "haemorrhage"), ("drusen",), (1, 2)),  # claimed and denied is not right
        (("microaneurysm",), ("microaneurysm",), (0, 3)),
        (NAMES, NAMES, (0, 4)),
    ],
)
def test_scores_by_hand(present: tuple, absent: tuple, expected: tuple[int, int]) -> None:
    assert (
        score_and_total({"drusen", "haemorrhage"}, Mentions(frozenset(present), frozenset(absent)))
        == expected
    )


@given(*[st.frozensets(st.sampled_from(NAMES))] * 3)
def test_a_share_of_one_needs_every_finding(
    positive: frozenset, present: frozenset, absent: frozenset
) -> None:
    right, total = score_and_total(positive, Mentions(present, absent))
    assert 0 <= right <= total
    if right == total:
        assert present == positive
        assert absent.isdisjoint(positive)


def test_reports_are_read_from_the_answer_block() -> None:
    boxed = "No <ref>drusen</ref><box>[[1, 2, 3, 4]]</box>."
    said = f"<think>Drusen?</think> <answer>Haemorrhages are seen. {boxed}</answer>"
    assert read_by_rules(said) == Mentions(frozenset({"haemorrhage"}), frozenset({"drusen"}))


def report_of(*said: tuple[tuple[str, ...], str]) -> list[Prediction]:
    """Reports about images with findings."""
    return [
        Prediction(
            item=item(f"r{k}", options=(), answers=("x",), lettered=False, level="", findings=there),
            response=reply(text),
        )
        for k, (there, text) in enumerate(said)
    ]


def test_mean_and_pooled() -> None:
    answers = report_of(
        (
            ("drusen",),
            "There are drusen. No haemorrhage, no hard exudate and no microaneurysm is seen.",
        ),  # 4/4
        (("drusen", "haemorrhage"), "There are hard exudates."),  # 0/3
        ((), "An unremarkable retina."),  # 0/0
    )
    found = evaluate_reports(answers)
    assert (found["mean"]["value"], found["mean"]["n"]) == (0.5, 2)
    assert (found["pooled"]["value"], found["pooled"]["n"]) == (pytest.approx(4 / 7), 7)
    assert found["empty"] == 1
    assert (found["precision"]["value"], found["recall"]["value"]) == (0.5, pytest.approx(1 / 3))
    text = consistency_table(evaluate_reports(answers, partial=["1 of 4 images is missing"]))
    assert sum(line.endswith("PARTIAL") for line in text.splitlines()) == 5
    assert "PARTIAL: 1 of 4 images" in text


def test_reports_that_could_not_be_read_count_apart() -> None:
    answers = report_of((("drusen",), "?"), (("drusen",), "?"))
    found = evaluate_reports(answers, [Mentions(frozenset({"drusen"}), frozenset()), None], reader="m")
    assert (found["mean"]["value"], found["mean"]["n"], found["reader"]) == (1.0, 1, "m")
    assert found["unread_ids"] == ["r1#0"]
    nothing = evaluate_reports(answers, [None, None])
    assert nothing["mean"]["value"] is None
    with pytest.raises(ConfigError, match="findings are unknown for"):
        evaluate_reports([Prediction(item=item(), response="x")])


def test_the_questions(tmp_path: Path) -> None:
    examples = [
        example(0, findings=("drusen",)),
        example(1, findings=None),
        example(2, findings=(), modality="OCT"),
        example(3, findings=("drusen",), split="train"),
        example(4, image="toy.images.array_record#0", task="dr_grade", findings=("drusen",)),
    ]
    benchmark = Reports(stage(tmp_path / "examples", examples))
    assert [one.images for one in benchmark.items] == [
        ("toy.images.array_record#0",),
        ("toy.images.array_record#2",),
    ]
    first, second = benchmark.items
    assert "this colour fundus photograph" in first.prompt
    assert "drusen" not in first.prompt
    assert (first.answers, second.answers) == (("drusen",), ("no finding",))
    assert benchmark.load_image(first.images[0]).size == (56, 56)
    with pytest.raises(ConfigError, match="no val image with masks"):
        Reports(tmp_path / "examples", Selection(split="val"))
