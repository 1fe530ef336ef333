"""Where traces say that findings lie: matched IoU and F1 by hand, with n and interval; items with none."""

from __future__ import annotations

import json

import pytest

from fundus_jax.dialog import render_boxes
from fundus_jax.evaluation.benchmarks import item_of
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.places import evaluate_places
from fundus_jax.evaluation.report import compare, compare_places, evaluate
from fundus_jax.evaluation.table import table
from fundus_jax.records import Box
from tests.evaluation.samples import answered, example, item


def box(x1: int, y1: int, x2: int, y2: int, finding: str = "drusen") -> Box:
    """A box of a finding."""
    return Box(finding=finding, x1=x1, y1=y1, x2=x2, y2=y2)


SQUARE, HALF, FAR = box(0, 0, 100, 100), box(0, 0, 100, 50), box(500, 500, 600, 600)
SPOT = box(0, 0, 10, 10, "haemorrhage")
ITEMS = [
    item("a", boxes=(SQUARE, FAR)),
    item("b", boxes=(SQUARE, SPOT)),
    item("c", boxes=(SQUARE,), modality="OCT"),
    item("d", boxes=()),
    item("e"),
]
THINKS = [
    render_boxes([HALF, FAR]),  # drusen: (0.5 + 1) / 2; two of two found
    render_boxes([box(60, 0, 160, 100)]),  # drusen: 40/160; none found. haemorrhage missing
    render_boxes([SQUARE]) + "<ref>haemorrhage</ref><box>[[4, 4, 4, 9]]</box>",  # drusen 1; one malformed
    render_boxes([SPOT]),  # made up
    render_boxes([SPOT]),  # not asked
]


def figures(entry: dict) -> list[tuple[float, int]]:
    """Value and n of IoU and F1."""
    return [(pytest.approx(entry[name]["value"]), entry[name]["n"]) for name in ("iou", "f1")]


def test_the_scores_by_hand() -> None:
    found = evaluate_places(ITEMS, THINKS)
    assert found is not None
    assert (found["answers"], found["malformed"]["value"], found["malformed"]["n"]) == (4, 0.25, 4)
    # findings of answers: a 0.75; b 0.25, 0; c 1, 0 (malformed); d 0 (made up)
    # boxes: 2 + 2, 1 + 1, 0 + 1, 1 + 1, none, 1 + 0 are said or there, and 2 + 0 + 0 + 1 pairs are hits
    assert figures(found) == [(2 / 6, 6), (2 * 3 / 10, 7)]
    assert figures(found["by_finding"]["drusen"]) == [((0.75 + 0.25 + 1) / 3, 3), (2 * 3 / 8, 5)]
    assert figures(found["by_finding"]["haemorrhage"]) == [(0, 3), (0, 2)]
    assert figures(found["by_modality"]["OCT"]) == [(1 / 2, 2), (1, 1)]
    assert found["iou"]["low"] <= 2 / 6 <= found["iou"]["high"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_nothing_there_and_nothing_said_is_no_score() -> None:
    found = evaluate_places([item("d", boxes=())], ["No lesion is seen."])
    assert found is not None
    assert figures(found) == [(None, 0), (None, 0)]
    assert evaluate_places([item("e")], ["x"]) is None


def test_the_report_and_its_table_have_them() -> None:
    report = evaluate([answered(one, "PDR", think) for one, think in zip(ITEMS, THINKS, strict=True)])
    assert report["localisation"] == evaluate_places(ITEMS, THINKS)
    text = table(report)
    for line in (
        "boxes, matched IoU",
        "boxes, F1 at IoU 0.5",
        "    OCT iou",
        "    drusen f1",
        "boxes malformed",
    ):
        assert line in text
    plain = evaluate([answered(item("e"), "PDR")])
    assert plain["localisation"] is None
    assert "boxes" not in table(plain)


def test_two_models_are_compared_on_the_items_with_boxes() -> None:
    before = [answered(one, "PDR", think) for one, think in zip(ITEMS, THINKS, strict=True)]
    after = [answered(one, "PDR", render_boxes(one.boxes or ()) or "x") for one in ITEMS]
    found = compare_places(before, after)
    assert found is not None
    assert found["n"] == 3  # a, b and c: where there is no box there is nothing to score
    assert found["value"] == pytest.approx((0.25 + (1 - 0.125) + 0.5) / 3)
    assert compare_places(before[3:], after[3:]) is None
    assert compare(before, after)["n"] == 5


def test_items_say_what_is_asked() -> None:
    boxes = (SQUARE, FAR, box(700, 700, 720, 720))
    one = example(0, findings=("drusen",), boxes=boxes, task="disease")
    assert item_of(one, Selection()).boxes is None
    asked = item_of(one, Selection(boxes=2))
    assert asked.boxes is not None
    assert len(asked.boxes) == 2
    assert "at most 2 boxes" in asked.prompt
    unknown = example(0, findings=None)
    assert item_of(unknown, Selection(boxes=2)).boxes is None
    assert item_of(example(0, findings=()), Selection(boxes=2)).boxes == ()
    side = example(0, findings=("drusen",), boxes=boxes, task="laterality")
    assert item_of(side, Selection(boxes=2)).boxes is None
