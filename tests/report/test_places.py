"""Boxes in the report: those that are there and those that are said, on the picture and in the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from fundus_jax.dialog import render, render_boxes
from fundus_jax.records import Box
from fundus_jax.report import cases
from tests.report.made import make_run
from tests.report.test_page import loads_nothing, page_of
from tests.report.test_parts import EXAMPLE

DRUSEN = Box(finding="drusen", x1=0, y1=0, x2=100, y2=100)
SPOTS = (
    Box(finding="haemorrhage", x1=0, y1=0, x2=100, y2=100),
    Box(finding="haemorrhage", x1=500, y1=0, x2=600, y2=100),
    Box(finding="haemorrhage", x1=510, y1=20, x2=610, y2=120),
)
WHERE = cases.Example(**{name: getattr(EXAMPLE, name) for name in EXAMPLE.__slots__} | {"boxes": SPOTS})


def places(think: str, boxes: int = 2) -> cases.Places | None:
    """The places of a reply about `WHERE`."""
    return cases.read_reply(render(think, "PDR"), WHERE, boxes=boxes).places


def test_said_boxes_are_numbered_by_finding_and_compared() -> None:
    found = places(f"I see {render_boxes([SPOTS[0], DRUSEN])}.")
    assert found == cases.Places(
        boxes=(
            (1, "there", 500, 0, 110, 120),
            (1, "there", 0, 0, 100, 100),
            (1, "said", 0, 0, 100, 100),
            (2, "said", 0, 0, 100, 100),
        ),
        findings=(("haemorrhage", 0.5), ("drusen", 0.0)),
        malformed=(),
    )


def test_malformed_boxes_are_told_as_text() -> None:
    found = places("<ref><b>x</b>\u202e</ref><box>[[1, 2]]</box>")
    assert found is not None
    assert [name for name, _ in found.findings] == ["haemorrhage", "<b>x</b>\ufffd"]
    assert "not [[x1, y1, x2, y2], ...]" in found.malformed[0]
    assert {kind for _, kind, *_ in found.boxes} == {"there"}


def test_boxes_are_compared_only_where_they_were_asked_for() -> None:
    think = f"I see {render_boxes(SPOTS)}."
    assert places(think, boxes=0) is None
    plain = cases.read_reply(render(think, "PDR"), WHERE)
    assert "<box>" in "".join(piece.text for piece in plain.think)
    asked = cases.read_reply(render(think, "PDR"), WHERE, boxes=2)
    assert "".join(piece.text for piece in asked.think) == "I see haemorrhage."


@pytest.fixture(scope="module")
def positioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of positioned traces."""
    return make_run(tmp_path_factory.mktemp("report") / "places", train=8, test=24, steps=12, boxes=2)


def test_a_positioned_run_shows_its_boxes(positioned: Path) -> None:
    (positioned / "hf").mkdir()
    page = page_of(positioned)
    assert loads_nothing(page)
    assert page.missing == 0
    for text in ("Box IoU", "Box F1", "Malformed boxes", "Where findings lie", "where the policy says it is",
                 "answer + format + process + localisation, at most 4", "--boxes=2"):  # fmt: skip
        assert text in page.text, text
    drawn = [one["class"] for one in page.named("rect")]
    assert drawn.count("under") == drawn.count("b-there") + drawn.count("b-said")
    assert min(drawn.count("b-there"), drawn.count("b-said")) >= 8
    numbers = [one for one in page.named("i") if one.get("class") in ("b-there", "b-said")]
    assert len(numbers) == drawn.count("under")
    shown = page.text.partition("Sample cases")[2].partition("GRPO rollouts")[0]
    assert "<box>" not in shown, "the picture shows what the text would only list"


def test_a_run_without_boxes_says_nothing_of_them(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "plain", train=8, test=12, steps=12))
    for text in ("Box IoU", "Where findings lie", "localisation", "--boxes"):
        assert text not in page.text.partition("Set-up")[0], text
