"""The parts of the report: figures, replies, the choice of cases, curves, times and pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fundus_jax.findings import clean, mark
from fundus_jax.records import Example
from fundus_jax.report import cases, charts, curves, figures
from fundus_jax.report.pictures import LARGEST, data_uri


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "up"), (-0.3, -0.1, "down"), (-0.1, 0.3, "noise"), (0.0, 0.2, "noise")],
)
def test_a_difference_counts_only_beyond_its_interval(low: float, high: float, verdict: str) -> None:
    found = figures.figure({"a": {"value": (low + high) / 2, "low": low, "high": high, "n": 3}}, "a")
    assert found is not None
    assert found.verdict == verdict


def test_undefined_figures_are_no_numbers() -> None:
    assert figures.figure({"a": {"value": None, "n": 0, "low": None, "high": None}}, "a") is None
    assert figures.figure({}, "a", "b") is None
    alone = figures.figure({"value": -0.0004, "n": 1, "low": None, "high": None})
    assert alone is not None
    assert (alone.text, alone.signed, alone.interval, alone.verdict) == ("0.0", "0.0", "no interval", "noise")


EXAMPLE = Example(
    id="e", dataset="toy", split="test", patient="p", eye="", modality="CFP", image="toy.array_record#0",
    labels=("Moderate NPDR",), task="disease", question="Which disease?", options=("Moderate NPDR", "PDR"),
    answer="Moderate NPDR", findings=("haemorrhage", "microaneurysm"), boxes=(),
)  # fmt: skip


def marked(reply: cases.Reply) -> list[tuple[str, str]]:
    """The pieces of a trace that name a finding, and what is known of it."""
    return [(piece.text, piece.kind) for piece in reply.think if piece.kind]


def test_claims_are_compared_with_the_findings() -> None:
    said = cases.read_reply(
        "<think>There is drusen and a hemorrhage, but no large cup. IRF, too.</think> <answer>pdr.</answer>",
        EXAMPLE,
    )
    assert marked(said) == [
        ("drusen", "unsupported"), ("hemorrhage", "supported"),
        ("large cup", "supported"), ("IRF", "contradicted"),
    ]  # fmt: skip
    assert "".join(piece.text for piece in said.think).startswith("There is drusen and a hemorrhage, but")
    assert said.missed == ("microaneurysm",)
    assert said.right is False
    answer = f"<answer>{EXAMPLE.answer}</answer>"
    letters = [
        cases.read_reply(f"<think>x</think> <answer>{one}</answer>", EXAMPLE, style="letters") for one in "AB"
    ]
    assert [(one.answer, one.right) for one in letters] == [("Moderate NPDR", True), ("PDR", False)]
    denied = cases.read_reply(f"<think>No haemorrhage.</think> {answer}", EXAMPLE)
    assert denied.right is True
    assert marked(denied) == [("haemorrhage", "contradicted")]
    outside = cases.read_reply(f"So: <think>No haemorrhage.</think> {answer}\x00 <b>end", EXAMPLE)
    assert outside.outside == "So: \ufffd <b>end"
    assert denied.outside == ""
    both = cases.read_reply(f"<think>Drusen are seen. There are no drusen.</think> {answer}", EXAMPLE)
    assert marked(both) == [("Drusen", "contradicted"), ("drusen", "contradicted")]
    concluded = cases.read_reply(f"<think>The answer is drusen.</think> {answer}", EXAMPLE)
    assert marked(concluded) == []
    unreadable = cases.read_reply("<think>" + "x" * 5000, None)
    assert (unreadable.answer, unreadable.right, unreadable.well_formed) == (None, None, False)
    assert len(unreadable.think[0].text) < 1300


def test_the_findings_of_a_vote_take_the_place_of_masks() -> None:
    unknown = replace(EXAMPLE, findings=None, boxes=())
    text = "<think>Drusen and a haemorrhage.</think> <answer>PDR</answer>"
    assert {kind for _, kind in marked(cases.read_reply(text, unknown))} == {"unknown"}
    voted = cases.read_reply(text, unknown, there=("drusen",))
    assert marked(voted) == [("Drusen", "supported"), ("haemorrhage", "unsupported")]
    partly = cases.read_reply(text, unknown, there=("drusen",), searched=("drusen",))
    assert marked(partly) == [("Drusen", "supported"), ("haemorrhage", "unknown")]
    masked = replace(EXAMPLE, findings=("drusen",), searched=("drusen",), boxes=())
    assert marked(cases.read_reply(text, masked)) == marked(partly)


@given(
    st.text()
    | st.lists(st.sampled_from(["no ", "drusen", " IRF, ", "\x00", "\u202e", "x" * 700])).map("".join)
)
def test_marking_loses_nothing_of_a_text(text: str) -> None:
    pieces = mark(text, "CFP", ("drusen",))
    assert "".join(piece.text for piece in pieces) == clean(text)


def test_cases_are_spread_over_modalities_and_classes() -> None:
    lines = [
        {"id": f"{modality}{label}{number}", "modality": modality, "answer": label}
        for modality in ("CFP", "OCT", "UWF") for label in ("Normal", "A", "B", "C") for number in range(5)
    ]  # fmt: skip
    chosen = cases._spread(lines, 8)
    assert [name[:3] for name in chosen] == ["CFP", "OCT", "UWF"] * 2 + ["CFP", "OCT"]
    labels = [next(line["answer"] for line in lines if line["id"] == name) for name in chosen]
    assert all(labels.count(label) == 2 for label in set(labels))
    assert cases._spread(lines[::-1], 8) == chosen
    masked = {**lines[0], "id": "masked", "findings": []}
    assert cases._spread([*lines, masked], 8)[0] == "masked"
    assert cases._spread(lines[:3], 8) == cases._spread(lines[:3], 3)


def coordinates(picture: str, kind: str) -> list[float]:
    """The y of every point of a path."""
    path = re.search(rf'class="{kind}" d="M([^"]+)"', picture)
    assert path
    return [float(point.split()[1]) for point in path.group(1).split("L")]


def test_a_curve_skips_null_and_rises_upwards() -> None:
    picture = charts.curve([(1, 0.0), (2, None), (3, float("nan")), (4, 1.0)], unit="<b>")
    assert picture is not None
    raw = coordinates(picture, "raw")
    assert len(raw) == 2
    assert raw[1] < raw[0]  # SVG's y points down
    assert "&lt;b&gt;" in picture
    assert charts.curve([(1, None)], unit="x") is None


@pytest.mark.parametrize("values", [[0.0] * 5, [3.5] * 900, [1e-14, 2e-14], [-2.0, -1.0], [0.0, 1e9], [7.0]])
def test_a_curve_stays_on_its_canvas(values: Sequence[float]) -> None:
    for axis in ("free", "zero", "log"):
        picture = charts.curve(list(enumerate(values)), unit="x", axis=axis)
        if axis == "log" and max(values) <= 0:
            assert picture is None
            continue
        assert picture is not None
        points = coordinates(picture, "raw") + coordinates(picture, "calm")
        assert len(points) <= 2 * charts.MOST
        assert all(charts.TOP - 1 <= y <= charts.HEIGHT - charts.BOTTOM + 1 for y in points)


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_ticks_are_few_round_and_cover_the_range(low: float, span: float) -> None:
    ticks = charts.nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 6
    slack = 1e-6 * max(abs(low), span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack


def test_a_logarithmic_curve_gives_each_power_of_ten_the_same_height() -> None:
    picture = charts.curve([(1, 1.0), (2, 0.1), (3, 0.0), (4, 0.01)], unit="loss", axis="log")
    assert picture is not None
    high, middle, low = coordinates(picture, "raw")
    assert low - middle == pytest.approx(middle - high, abs=0.11)
    assert "loss, logarithmic" in picture
    assert ">0.01<" in picture


def test_times_are_said_as_people_say_them() -> None:
    said = [curves.duration(seconds) for seconds in (0.024, 3.14, 27.2, 245, 7800)]
    assert said == ["24 ms", "3.1 s", "27 s", "4 min 05 s", "2 h 10 min"]
    assert curves.moment(1.79e9).endswith("2026, 14:13 UTC")
    assert curves.moment(None) == "unknown"


def test_a_stage_that_ran_twice_is_one_bar() -> None:
    spans = curves.timeline(
        [
            {"stage": "grpo", "seconds": 3.0},
            {"stage": "data", "seconds": 1.0},
            {"stage": "grpo", "seconds": 1.0},
        ]
    )
    assert [(span.stage, span.seconds, span.runs, span.share) for span in spans] == [
        ("data", 1.0, 1, 0.25),
        ("grpo", 4.0, 2, 1.0),
    ]


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "CMYK", "P", "I;16", "F", "1"])
@pytest.mark.parametrize("size", [(30, 20), (1200, 700)])
def test_pictures_of_any_mode_and_size(mode: str, size: tuple[int, int]) -> None:
    uri = data_uri(Image.new(mode, size))
    shown = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert shown.mode == "RGB"
    assert max(shown.size) == (LARGEST if max(size) > LARGEST else 224)
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.02)
