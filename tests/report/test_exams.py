"""The exams on the page of a run: drawn with their intervals, the kept one ringed; nothing without exams."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fundus_jax.report import charts
from fundus_jax.report.collect import Run
from fundus_jax.report.exams import exams
from fundus_jax.report.page import render
from fundus_jax.workdir import Workdir
from tests.report.test_page import Page, loads_nothing

SCORES = (0.4, 0.7, 0.5, 0.7)  # after steps 10, 20, 30, 40: of the best ones the first


def line(step: int, score: Any, **others: Any) -> dict[str, Any]:
    """A line of metrics.jsonl with an exam."""
    ends = {"exam/low": score - 0.1, "exam/high": score + 0.1} if isinstance(score, float) else {}
    about = {"exam/well_formed": 0.9, "exam/length": 31.5, "exam/n": 100.0}
    return {"stage": "sft", "step": step, "exam/accuracy": score, **ends, **about, **others}


LINES = [
    {"stage": "sft", "step": 5, "loss": 1.0},
    *(line(10 * k, score) for k, score in enumerate(SCORES, 1)),
]


def test_the_kept_one_is_that_of_the_workdir(tmp_path: Any) -> None:
    work = Workdir(tmp_path, {})
    for one in LINES:
        work.metrics.log("sft", one["step"], {name: x for name, x in one.items() if name[:5] == "exam/"})
    (found,) = exams({"sft": LINES, "grpo": [{"step": 1, "loss": 0.5}]})
    assert [one.step for one in found.exams if one.kept] == [found.best.step] == [work.best("sft")] == [20]
    work.close()
    assert found.last.step == 40
    assert [one.accuracy.text for one in found.exams if one.accuracy] == ["40.0", "70.0", "50.0", "70.0"]
    assert (found.best.accuracy.interval, found.best.accuracy.n) == ("[60.0, 80.0]", 100)  # type: ignore[union-attr]


def places(picture: str, kind: str) -> list[tuple[float, float]]:
    """Centres of the circles of one class."""
    found = re.findall(rf'class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', picture)
    return [(float(x), float(y)) for x, y in found]


def test_what_is_drawn() -> None:
    picture = str(exams({"sft": LINES})[0].picture)
    dots, rings = places(picture, "line"), places(picture, "ring")
    assert len(dots) == 4
    assert rings == [dots[1]]
    assert dots[0][1] > dots[2][1] > dots[1][1] == dots[3][1], "SVG's y points down"
    whiskers = re.findall(r'class="whisker" d="M([\d.]+) ([\d.]+)V([\d.]+)"', picture)
    assert [float(x) for x, _, _ in whiskers] == [x for x, _ in dots]
    for (_, middle), (_, below, above) in zip(dots, whiskers, strict=True):
        assert middle - float(above) == pytest.approx(float(below) - middle, abs=0.11)
        assert charts.TOP - 1 <= float(above) < float(below) <= charts.HEIGHT - charts.BOTTOM + 1
    assert ">70<" in picture


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_one_exam_without_an_interval(score: float) -> None:
    (found,) = exams({"grpo": [{"step": 7, "exam/accuracy": score}]})
    assert (found.best.step, found.best.accuracy.interval) == (7, "no interval")  # type: ignore[union-attr]
    assert (found.best.length, found.best.well_formed) == (None, None)
    assert "whisker" not in found.picture
    assert places(str(found.picture), "ring") == places(str(found.picture), "line")


def test_on_the_page_only_where_there_are_exams(tmp_path: Any) -> None:
    def page_of(lines: list[dict[str, Any]], **config: Any) -> Page:
        return Page(render(Run(path=tmp_path, config=config, metrics={"sft": lines})))

    without = page_of(LINES[:1])
    assert "Exams while it trained" not in without.text
    page = page_of(LINES)
    assert loads_nothing(page)
    assert "Best after step 20: 70.0 % [60.0, 80.0], n 100; last after step 40: 70.0 %" in page.text
    assert "4 exams of 100 questions" in page.text
    assert "goes on with the last bundle" in page.text
    assert page.text.count("kept as the best") == 1 + 1  # in the words above, and in its row
    assert "goes on with the last" not in page_of(LINES, exam={"use": "best"}).text


def test_damaged_lines_are_left_out(tmp_path: Any) -> None:
    odd = [
        line(50, "<script>"),
        line(60, None),
        line(65, float("nan")),
        {**line(70, 0.3), "exam/low": "x", "exam/length": "<b>"},
    ]
    (found,) = exams({"sft": [*LINES, *odd, {"exam/accuracy": 0.2}]})
    assert [one.step for one in found.exams] == [10, 20, 30, 40, 70, 0]
    assert found.exams[4].length is None
    assert loads_nothing(Page(render(Run(path=tmp_path, metrics={"sft": [*LINES, *odd]}))))
