"""pass@k, majority@k and calibration, counted by hand and over every subset."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundus_jax.evaluation.repeats import Repeats, calibration, evaluate_repeats, majority_at, pass_at
from fundus_jax.records import ConfigError


def asked(given: str, unit: str = "p") -> Repeats:
    """Answers by letter, "-" for none; A is right."""
    return Repeats(tuple(None if one == "-" else one for one in given), "A", unit)


def test_pass_at_by_hand() -> None:
    assert pass_at(4, 1, 1) == 0.25
    assert pass_at(4, 1, 2) == 0.5  # 3 of 6 pairs
    assert pass_at(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at(4, 0, 4) == 0
    assert pass_at(4, 2, 3) == 1
    with pytest.raises(ConfigError, match="pass@5 of 4"):
        pass_at(4, 1, 5)


def by_counting(answers: str, k: int) -> tuple[float, float]:
    """pass@k and majority@k over all subsets."""
    passed, won, number = 0.0, 0.0, 0
    for subset in itertools.combinations(answers, k):
        number += 1
        votes = Counter(one for one in subset if one != "-")
        passed += "A" in votes
        top = [one for one, count in votes.items() if count == max(votes.values())]
        won += ("A" in top) / max(1, len(top))
    return passed / number, won / number


@settings(max_examples=150, deadline=None)
@given(st.text("ABCD-", min_size=1, max_size=7), st.integers(1, 7))
def test_both_are_means_over_all_subsets(answers: str, k: int) -> None:
    k = min(k, len(answers))
    passed, won = by_counting(answers, k)
    one = asked(answers)
    assert pass_at(len(answers), one.hits, k) == pytest.approx(passed)
    counts = Counter(answers)
    wrong = [count for letter, count in counts.items() if letter not in "A-"]
    assert majority_at([counts["A"], *wrong], counts["-"], k) == pytest.approx(won)


def test_majority_at_is_fast_and_right_for_many_answers() -> None:
    assert majority_at([20, 7, 3, 1, 1], 32, 64) == 1
    assert majority_at([16, 16], 0, 32) == 0.5
    assert 0.2 < majority_at([20, 20, 20], 4, 31) < 0.5


def test_the_majority() -> None:
    assert asked("BAAB").majority == ("B", 0.5)  # of equals the first that was said
    assert asked("--AB-").majority == ("A", 0.2)
    assert asked("---").majority == (None, 0.0)


def test_calibration_by_hand() -> None:
    questions = [
        asked("AAAA", "a"),  # share 1, right
        asked("AAAA", "b"),  # share 1, right
        asked("BBBB", "c"),  # share 1, wrong
        asked("AAB-", "d"),  # share 0.5, right
        asked("----", "e"),  # share 0, wrong
    ]
    found = calibration(questions)
    # bins: (0.9, 1] accuracy 2/3 of 3, share 1; (0.4, 0.5] 1 of 1, share 0.5; (0, 0.1] 0 of 1, share 0
    assert found["ece"]["value"] == pytest.approx((3 * (1 / 3) + 1 * 0.5 + 0) / 5)
    assert found["brier"]["value"] == pytest.approx((0 + 0 + 1 + 0.25 + 0) / 5)
    assert (found["ece"]["n"], found["brier"]["n"]) == (5, 5)
    assert [(row["low"], row["high"], row["accuracy"]["n"]) for row in found["table"]] == [
        (0, 0.1, 1),
        (0.4, 0.5, 1),
        (0.9, 1, 3),
    ]
    assert found["table"][2]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["table"][2]["share"]["value"] == 1


def test_the_whole() -> None:
    found = evaluate_repeats([asked("AAB", "a"), asked("BB-", "b")])
    assert found is not None
    assert found["samples"] == 3
    assert {k: one["value"] for k, one in found["pass_at"].items()} == pytest.approx(
        {"1": (2 / 3 + 0) / 2, "2": 0.5, "3": 0.5}
    )
    assert {k: one["value"] for k, one in found["majority_at"].items()} == pytest.approx(
        {"1": 1 / 3, "2": (1 / 3 + 2 / 3 * 0.5) / 2, "3": 0.5}
    )
    assert found["pass_at"]["1"]["n"] == 2
    assert evaluate_repeats([asked("A"), asked("B")]) is None
    assert evaluate_repeats([asked("AB"), asked("ABA")]) is None
    assert evaluate_repeats([]) is None
