"""The conversation grammar: what is rendered is parsed back, and no text makes the parsers slow or fail."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundus_jax import dialog
from fundus_jax.records import Box, ConfigError, DataError
from tests.test_records import example

CLEAN = st.text(max_size=60).map(str.strip).filter(lambda text: text and not dialog._TAG.search(text))
CORNER = st.tuples(st.integers(0, 999), st.integers(0, 999)).filter(lambda pair: pair[0] < pair[1])
NAME = st.sampled_from(["haemorrhage", "hard exudate", "cotton-wool spot"])
BOX = st.builds(
    lambda name, x, y: Box(finding=name, x1=x[0], y1=y[0], x2=x[1], y2=y[1]), NAME, CORNER, CORNER
)


@given(CLEAN, CLEAN)
def test_a_rendered_reply_is_parsed_back(think: str, answer: str) -> None:
    text = dialog.render(think, answer)
    assert text == f"<think>{think}</think> <answer>{answer}</answer>"
    assert dialog.parse(text) == dialog.Parsed(think, answer, True)


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>b</answer>",
        "\n<think>\na\n</think>\n\n<answer> b </answer>\n",
    ],
)
def test_white_space_between_the_blocks_is_free(text: str) -> None:
    assert dialog.parse(text) == dialog.Parsed("a", "b", True)


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("", None, None),
        ("plain", None, None),
        ("<answer>b</answer>", None, "b"),
        ("<think>a</think>", "a", None),
        ("<answer>b</answer> <think>a</think>", "a", "b"),
        ("x <think>a</think> <answer>b</answer>", "a", "b"),
        ("<think>a</think> x <answer>b</answer>", "a", "b"),
        ("<think>a</think> <answer>b</answer> x", "a", "b"),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", "a", None),
        ("<think>a</think> <think>a</think> <answer>b</answer>", None, "b"),
        ("<think>a <answer>b</answer></think>", None, "b"),
        ("<think>a<think></think> <answer>b</answer>", None, "b"),
        ("<think> </think> <answer>b</answer>", None, "b"),
        ("<think>a</think> <answer></answer>", "a", None),
        ("<think>a</think> <answer>b", "a", None),
        ("<think>a</think> b</answer>", "a", None),
        ("</think>a<think> <answer>b</answer>", None, "b"),
        ("<THINK>a</THINK> <answer>b</answer>", None, "b"),
    ],
)
def test_a_malformed_reply_gives_only_what_is_unambiguous(text: str, think: str, answer: str) -> None:
    assert dialog.parse(text) == dialog.Parsed(think, answer, False)


@pytest.mark.parametrize("part", ["", "  ", "a</think>", "<answer>"])
def test_render_refuses_what_could_not_be_read_back(part: str) -> None:
    with pytest.raises(DataError):
        dialog.render(part, "b")
    with pytest.raises(DataError):
        dialog.render("a", part)


def test_render_without_a_trace() -> None:
    assert dialog.render(None, "PDR") == "<answer>PDR</answer>"


@given(st.text())
def test_no_text_makes_a_parser_raise(text: str) -> None:
    dialog.parse(text)
    dialog.parse_boxes(text)
    dialog.choose(text, ("Normal", "PDR"))


@pytest.mark.parametrize(
    "piece",
    [
        "<think>",
        "</think> <answer>",
        "<",
        "<ref>",
        "<ref>a</ref><box>",
        "<ref>a</ref>    ",
        "<ref>a</ref><box>[",
        "<ref>a</ref><box>[[1, 2, 3, 4],",
        " ",
        "[",
        "<box>[[1, 2",
        "A. ",
        "(A",
    ],
)
def test_a_megabyte_of_anything_takes_linear_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    dialog.parse(text)
    dialog.parse_boxes(text)
    dialog.parse_boxes("<ref>a</ref><box>" + text + "</box>")
    dialog.choose(text, ("Normal", "PDR"))
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Mild NPDR", " mild  npdr. ", True),
        ("Mild NPDR", "Mild\nNPDR .", True),
        ("PDR", "NPDR", False),
        ("PDR", "PDR..", False),
        ("Yes", "No", False),
    ],
)
def test_same_answer(a: str, b: str, same: bool) -> None:
    assert dialog.same_answer(a, b) is same


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("mild npdr.", "Mild NPDR"),
        ("B", "Mild NPDR"),
        ("(B)", "Mild NPDR"),
        ("B.", "Mild NPDR"),
        ("B. Mild NPDR", "Mild NPDR"),
        ("B: mild npdr", "Mild NPDR"),
        ("B. Normal", None),  # letter and text disagree
        ("D", None),
        ("Bad", None),
        ("b", None),
        ("", None),
        ("C", "A"),  # the letter of the option whose text is "A"
        ("A", "A"),  # a text wins over a letter
    ],
)
def test_choose(answer: str, option: str | None) -> None:
    assert dialog.choose(answer, ("Normal", "Mild NPDR", "A")) == option


def test_messages() -> None:
    (turn,) = dialog.messages(example(), "options", True)
    assert turn["role"] == "user"
    assert turn["content"][0] == {"type": "image"}
    lines = turn["content"][1]["text"].splitlines()
    assert lines[:4] == ["Which disease does the image show?", "Options:", "A. Normal", "B. Mild NPDR"]
    assert lines[-1] == dialog.THINK_INSTRUCTION
    (turn,) = dialog.messages(example(), "open", False)
    assert turn["content"][1]["text"] == f"{example().question}\n{dialog.ANSWER_INSTRUCTION}"
    (turn,) = dialog.messages(example(), "open", True, instruct=False)
    assert turn["content"][1]["text"] == example().question
    assert dialog.messages(example(options=()), "options", True, instruct=False) == [turn]
    with pytest.raises(ConfigError, match="open, options"):
        dialog.messages(example(), "free", True)


def test_a_reply_is_an_assistants_turn() -> None:
    assert dialog.reply("x") == {"role": "assistant", "content": [{"type": "text", "text": "x"}]}


def test_there_are_26_letters() -> None:
    assert list(dialog.lettered([str(i) for i in range(26)]))[-1] == "Z"
    with pytest.raises(DataError, match="27 options"):
        dialog.lettered([str(i) for i in range(27)])


@given(st.lists(BOX, min_size=1, max_size=8))
def test_boxes_round_trip(boxes: list[Box]) -> None:
    text = f"Look: {dialog.render_boxes(boxes)} there."
    names = list(dict.fromkeys(box.finding for box in boxes))
    grouped = tuple(box for name in names for box in boxes if box.finding == name)
    assert dialog.parse_boxes(text) == grouped


def test_box_text_is_the_agreed_one() -> None:
    boxes = [
        Box(finding="haemorrhage", x1=1, y1=2, x2=3, y2=4),
        Box(finding="haemorrhage", x1=5, y1=6, x2=7, y2=8),
    ]
    assert dialog.render_boxes(boxes) == "<ref>haemorrhage</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "<ref>a</ref>",
        "<box>[[1, 2, 3, 4]]</box>",
        "<ref>a</ref><box>[]</box>",
        "<ref>a</ref><box>[[]]</box>",
        "<ref>a</ref><box>[1, 2, 3, 4]</box>",
        "<ref>a</ref><box>[[1, 2, 3]]</box>",
        "<ref>a</ref><box>[[1, 2, 3, 4],]</box>",
        "<ref>a</ref><box>[[1, 2, 3, 4] [5, 6, 7, 8]]</box>",
        "<ref>a</ref><box>[[1, 2, 3, 4000]]</box>",
        "<ref>a</ref><box>[[3, 2, 1, 4]]</box>",
        "<ref>a</ref><box>[[-1, 2, 3, 4]]</box>",
        "<ref> </ref><box>[[1, 2, 3, 4]]</box>",
        "<ref>a</ref><box>[[1, 2, 3, 4]]</box><ref>b</ref><box>[[1</box>",
        "<ref>a</ref><box>[[1, 2, 3, 4]]</box><box>[[1, 2, 3, 4]]</box>",
    ],
)
def test_malformed_boxes_are_none(text: str) -> None:
    assert dialog.parse_boxes(text) is None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a</think> <answer>b</answer>", ""),
        ("so <think>a</think> then <answer>b</answer> end", "so then end"),
        ("no tags", "no tags"),
        ("<think>cut off", ""),
        ("<think>a <answer>b</answer> c</think> d", "d"),
        ("a</think> b <answer>c", "a b"),
        ("<think>a</answer> b", ""),
        ("", ""),
    ],
)
def test_what_stands_outside_of_the_blocks(text: str, left: str) -> None:
    assert " ".join(dialog.outside(text).split()) == left


def test_looking_outside_takes_linear_time() -> None:
    start = time.process_time()
    for piece in ("<think>", "</think>", "<think></think>", "<think></answer>", "a ", "<"):
        dialog.outside(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 2.0
