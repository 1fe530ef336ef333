"""What may not be trained on, by picture, eye, patient and over several links; copies that contradict."""

import pytest

from data_pipeline import leaks
from data_pipeline.leaks import BYTES, EYE, PICTURE, PIXELS, Pair, Print, Said


def said(split: str, patient: str = "", **answers: str) -> Said:
    return Said(split=split, patient=patient, answers=answers)


def pair(a: str, b: str, kind: str = PICTURE) -> Pair:
    return Pair(a=a, b=b, relation=kind, distance=12)


@pytest.mark.parametrize(
    ("pictures", "pairs", "kinds"),
    [
        ({"a": said("train"), "b": said("test")}, [], {}),
        ({"a": said("train"), "b": said("test")}, [pair("a", "b")], {"a": "picture"}),
        ({"a": said("train"), "b": said("test")}, [pair("b", "a", BYTES)], {"a": "picture"}),
        ({"a": said("train"), "b": said("test")}, [pair("a", "b", EYE)], {"a": "eye"}),
        ({"a": said("train"), "b": said("train")}, [pair("a", "b")], {}),
        ({"a": said("test"), "b": said("test")}, [pair("a", "b")], {}),
        ({"a": said("test"), "b": said("benchmark")}, [pair("a", "b")], {}),
        ({"a": said("val"), "b": said("test")}, [pair("a", "b")], {"a": "picture"}),
        ({"a": said("train"), "b": said("val")}, [pair("a", "b")], {"a": "picture"}),
        ({"a": said("train", "p"), "b": said("test", "p")}, [], {"a": "patient"}),
        ({"a": said("train", ""), "b": said("test", "")}, [], {}),
        (
            {"a": said("train", "p"), "b": said("train", "p"), "c": said("benchmark")},
            [pair("b", "c")],
            {"a": "linked", "b": "picture"},
        ),
        (
            {"a": said("train"), "b": said("train"), "c": said("train"), "d": said("test")},
            [pair("a", "b"), pair("b", "c"), pair("c", "d")],
            {"a": "linked", "b": "linked", "c": "picture"},
        ),
    ],
)
def test_removals(pictures: dict[str, Said], pairs: list[Pair], kinds: dict[str, str]) -> None:
    found = leaks.removals(pictures, pairs)
    assert {name: kind for name, (kind, _) in found.items()} == kinds


def test_the_reason_names_the_closest_picture() -> None:
    pictures = {"a": said("train", "p"), "b": said("test"), "c": said("test", "p")}
    pairs = [pair("a", "c", EYE), Pair(a="a", b="b", relation=PICTURE, distance=30)]
    assert leaks.removals(pictures, pairs)["a"] == ("picture", "same picture as b (test), distance 0.030")


def test_contradictions_are_of_copies_and_of_one_task() -> None:
    pictures = {
        "a": said("train", disease="PDR", dr_grade="PDR"),
        "b": said("train", disease="Normal"),
        "c": said("test", dr_grade="No DR"),
    }
    pairs = [pair("a", "b"), pair("b", "c"), pair("a", "c", EYE)]
    assert leaks.conflicts(pictures, pairs) == [("disease", "a", "PDR", "b", "Normal")]


def test_exact_copies_hang_on_the_first() -> None:
    rows = [("a", "1", "x"), ("b", "2", "y"), ("c", "1", "x"), ("d", "3", "x"), ("e", "1", "x")]
    prints = [Print(name=name, split="train", sha256=sha, pixels=pixels) for name, sha, pixels in rows]
    found = [(one.a, one.b, one.relation) for one in leaks.exact(prints)]
    assert found == [("a", "c", BYTES), ("a", "d", PIXELS), ("a", "e", BYTES)]


def test_an_exact_pair_counts_before_one_that_is_alike() -> None:
    found = leaks.union([pair("a", "b", BYTES)], [pair("a", "b"), pair("a", "c"), pair("a", "c")])
    assert [(one.b, one.relation) for one in found] == [("b", BYTES), ("c", PICTURE)]
