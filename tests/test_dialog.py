"""The conversation grammar: what is rendered is parsed back, and no text makes the parsers slow or fail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundus_jax import dialog
from fundus_jax.records import Box, ConfigError, DataError
from tests.growth import LINEAR, growth
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


@pytest.mark.parametrize(
    ("text", "answer", "well_formed"),
    [
        (" <answer>b</answer>\n", "b", True),
        ("<think>a</think> <answer>b</answer>", "b", False),
        ("b <answer>b</answer>", "b", False),
        ("<answer>b</answer> b", "b", False),
        ("<answer>b", None, False),
        ("<answer> </answer>", None, False),
        ("<answer>b</answer> <answer>b</answer>", None, False),
        ("b", None, False),
    ],
)
def test_without_a_trace_the_answer_block_stands_alone(
    text: str, answer: str | None, well_formed: bool
) -> None:
    parsed = dialog.parse(text, think=False)
    assert (parsed.answer, parsed.well_formed) == (answer, well_formed)
    if well_formed:
        assert not dialog.parse(text).well_formed


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
        "<ref>a</ref><box>[[1, 2, 3, 4]]</box>",
        " ",
        "[",
        "<box>[[1, 2",
        "A. ",
        "(A",
    ],
)
def test_anything_long_takes_linear_time(piece: str) -> None:
    def work(size: int) -> None:
        text = piece * (size // len(piece))
        dialog.parse(text)
        dialog.parse_boxes(text)
        dialog.parse_boxes("<ref>a</ref><box>" + text + "</box>")
        dialog.without_boxes(text)
        dialog.choose(text, ("Normal", "PDR"))

    assert growth(work, 200_000) < LINEAR


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
    with pytest.raises(ConfigError, match="open, options, letters"):
        dialog.messages(example(), "free", True)


def test_where_letters_are_asked_for_a_reply_is_a_letter() -> None:
    one = example()
    (turn,) = dialog.messages(one, "letters", True)
    assert "answer with its letter" in turn["content"][1]["text"].splitlines()[-2]
    letter = dialog.right_reply(one, "letters")
    assert one.options["AB".index(letter)] == one.answer
    assert dialog.right_reply(one, "options") == dialog.right_reply(one, "open") == one.answer
    for text in (
        letter,
        letter.lower(),
        f" {letter}. ",
        f"({letter})",
        one.answer,
        f"{letter}. {one.answer}",
    ):
        assert dialog.meant(text, one, "letters") == one.answer
    other = "AB".replace(letter, "")
    for text in (f"{other}. {one.answer}", "A, B", "Z", "", None):
        assert dialog.meant(text, one, "letters") is None
    for style in ("open", "options"):
        assert dialog.meant(letter, one, style) == letter
    bare = example(options=())
    assert dialog.right_reply(bare, "letters") == dialog.meant(bare.answer, bare, "letters") == bare.answer
    assert dialog.messages(bare, "letters", True) == dialog.messages(bare, "open", True)


def test_a_reply_is_an_assistants_turn() -> None:
    assert dialog.reply("x") == {"role": "assistant", "content": [{"type": "text", "text": "x"}]}


def test_there_are_26_letters() -> None:
    assert list(dialog.lettered([str(i) for i in range(26)]))[-1] == "Z"
    with pytest.raises(DataError, match="27 options"):
        dialog.lettered([str(i) for i in range(27)])


@given(st.lists(BOX, max_size=8))
def test_boxes_round_trip(boxes: list[Box]) -> None:
    text = f"Look: {dialog.render_boxes(boxes)} there."
    names = list(dict.fromkeys(box.finding for box in boxes))
    grouped = tuple(box for name in names for box in boxes if box.finding == name)
    assert dialog.parse_boxes(text) == dialog.Places(grouped, ())
    assert dialog.without_boxes(text) == f"Look: {''.join(names)} there."


def test_box_text_is_the_agreed_one() -> None:
    boxes = [
        Box(finding="haemorrhage", x1=1, y1=2, x2=3, y2=4),
        Box(finding="haemorrhage", x1=5, y1=6, x2=7, y2=8),
    ]
    assert dialog.render_boxes(boxes) == "<ref>haemorrhage</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>"


@pytest.mark.parametrize("name", [" drusen", "a</ref>", "x" * 81, "<box>"])
def test_a_name_that_could_not_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="too long, padded or contains a tag"):
        dialog.render_boxes([Box(finding=name, x1=1, y1=2, x2=3, y2=4)])


@pytest.mark.parametrize("text", ["", "no box", "a < b and [[1, 2, 3, 4]]", "<reference>"])
def test_a_text_without_boxes_has_nothing_malformed(text: str) -> None:
    assert dialog.parse_boxes(text) == dialog.Places((), ())


GOOD = "<ref>a</ref><box>[[1, 2, 3, 4]]</box>"
RANGE = "not [[x1, y1, x2, y2], ...] in whole numbers from 0 to 999"


@pytest.mark.parametrize(
    ("text", "names", "reason"),
    [
        ("<ref>a</ref>", ["a"], "opens no group"),
        ("<ref>a</ref> lies <box>[[1, 2, 3, 4]]</box>", ["a"], "opens no group"),
        ("<ref>a<box>[[1, 2, 3, 4]]</box>", [""], "opens no group"),
        ("<box>[[1, 2, 3, 4]]</box>", [""], "opens no group"),
        ("</box>", [""], "opens no group"),
        ("<ref>a</ref><box>[[1, 2", ["a"], "opens no group"),
        ("<ref>a</ref><box>[]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[1, 2, 3, 4]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3, 4, 5]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3, 4],]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3, 4] [5, 6, 7, 8]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3, 1000]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[-1, 2, 3, 4]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3.5, 4]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3, 04]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3, ٤]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[1, 2, 3, x]]</box>", ["a"], RANGE),
        ("<ref>a</ref><box>[[3, 2, 1, 4]]</box>", ["a"], "[3, 2, 1, 4] has no area"),
        ("<ref>a</ref><box>[[1, 2, 3, 2]]</box>", ["a"], "[1, 2, 3, 2] has no area"),
        ("<ref>a</ref><box>[[1, 2, 3, 4], [5, 5, 5, 9]]</box>", ["a"], "[5, 5, 5, 9] has no area"),
        ("<ref> </ref><box>[[1, 2, 3, 4]]</box>", [""], "the name has 0 characters"),
        (f"<ref>{'n' * 99}</ref><box>[[1, 2, 3, 4]]</box>", ["n" * 80], "the name has 99 characters"),
    ],
)
def test_malformed_boxes_are_reported_and_the_others_kept(text: str, names: list[str], reason: str) -> None:
    box = Box(finding="a", x1=1, y1=2, x2=3, y2=4)
    for whole, boxes in ((text, ()), (f"{GOOD}. {text}", (box,)), (f"{text} and {GOOD}", (box,))):
        found = dialog.parse_boxes(whole)
        assert found.boxes == boxes
        assert [name for name, _ in found.malformed] == names
        assert reason in found.malformed[0][1]


@given(st.lists(BOX, max_size=12), st.integers(1, 5))
def test_fewer_boxes_cover_all(boxes: list[Box], most: int) -> None:
    few = dialog.fewer(boxes, most)
    for name in {box.finding for box in (*boxes, *few)}:
        before, after = ([box for box in part if box.finding == name] for part in (boxes, few))
        assert len(after) == min(len(before), most)
        assert all(
            any(b.x1 <= a.x1 and b.y1 <= a.y1 and a.x2 <= b.x2 and a.y2 <= b.y2 for b in after)
            for a in before
        )
    assert dialog.fewer(few, most) == few
    assert set(dialog.fewer(boxes, 12)) == set(boxes)


def test_fewer_boxes_joins_what_overlaps_or_is_near() -> None:
    corners = [
        (10, 10, 60, 60),
        (50, 50, 90, 90),
        (900, 900, 950, 950),
        (880, 960, 930, 990),
        (10, 900, 40, 930),
    ]
    boxes = [Box(finding="drusen", x1=a, y1=b, x2=c, y2=d) for a, b, c, d in corners]
    few = [(box.x1, box.y1, box.x2, box.y2) for box in dialog.fewer(boxes, 3)]
    assert few == [(10, 10, 90, 90), (880, 900, 950, 990), (10, 900, 40, 930)]


def test_a_positioned_example_has_the_boxes_of_its_trace() -> None:
    boxes = [Box(finding="drusen", x1=10 * i, y1=10, x2=10 * i + 5, y2=20) for i in range(6)]
    one = example(boxes=tuple(boxes))
    assert dialog.positioned(one, 0) is one
    assert dialog.positioned(one, 2).boxes == dialog.fewer(boxes, 2)
    for task in dialog.WITHOUT_FINDINGS:
        assert dialog.positioned(example(boxes=tuple(boxes), task=task), 2).boxes == ()


def test_boxes_are_asked_for_only_where_a_trace_says_them() -> None:
    asked = dialog.BOX_INSTRUCTION.format(most=4)
    assert "at most 4 boxes" in asked
    for one, options, there in (
        (example(), {"boxes": 4}, True),
        (example(), {}, False),
        (example(), {"boxes": 4, "instruct": False}, False),
        (example(), {"boxes": 4, "think": False}, False),
        (example(task="laterality"), {"boxes": 4}, False),
    ):
        (turn,) = dialog.messages(one, "open", **options)
        assert (asked in turn["content"][1]["text"]) is there


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


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "<think></answer>", "a ", "<"])
def test_looking_outside_takes_linear_time(piece: str) -> None:
    assert growth(lambda size: dialog.outside(piece * (size // len(piece))), 200_000) < LINEAR
