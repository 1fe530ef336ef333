"""FunBench's metric by hand, the majority baseline, findings, and the averages of the paper's table 5."""

from __future__ import annotations

import numpy as np
import pytest

from fundus_jax.evaluation import scores
from fundus_jax.records import ConfigError

FILE = ("L4", "task", "file")


def score(gold: list[str], predicted: list[str], options: str) -> scores.FunBenchScores:
    """FunBench's scores of one file: a letter is an option, "AB" is the set of both."""
    return scores.funbench([FILE] * len(gold), gold, predicted, [options] * len(gold))


def test_one_label_is_plain_sensitivity() -> None:
    found = score(["A"] * 4, ["A", "A", "A", "B"], "ABC")
    assert found.figures[FILE].value == 0.75
    assert found.labels[FILE] == {"A": (0.75, None, None)}


def test_two_labels_score_the_first() -> None:
    """A: 3 of 4 found, B: 1 of 2 left alone: 2 * 0.75 * 0.5 / 1.25 = 0.6."""
    found = score(list("AAAABB"), list("AAABBA"), "AB")
    assert found.figures[FILE].value == pytest.approx(0.6)
    assert found.labels[FILE]["A"] == pytest.approx((0.75, 0.5, 0.6))
    assert found.labels[FILE]["B"] == pytest.approx((0.5, 0.75, 0.6))


def test_yes_comes_before_no() -> None:
    """Unparsed answers are neither, so the two labels are not mirrored, and which one is first matters."""
    gold = [["Yes"], ["Yes"], ["No"], ["No"]]
    predicted = [["Yes"], [], ["No"], []]
    labels, table = scores.label_table(gold, predicted, [["Yes", "No"]] * 4)
    assert labels == ("Yes", "No")
    # Yes: sensitivity 1/2, specificity 2/2 (an unparsed answer does not claim Yes): 2 * 0.5 * 1 / 1.5
    assert scores.file_score(table.sum(axis=0)) == pytest.approx(2 / 3)


def test_three_labels_are_averaged() -> None:
    """A: 1/2 and 2/3 -> 4/7; B: 1/2 and 2/3 -> 4/7; C: 1 and 1 -> 1."""
    found = score(list("AABBC"), list("ABBAC"), "ABC")
    assert [value[2] for value in found.labels[FILE].values()] == pytest.approx([4 / 7, 4 / 7, 1.0])
    assert found.figures[FILE].value == pytest.approx((4 / 7 + 4 / 7 + 1) / 3)


def test_a_label_counts_only_where_it_is_offered() -> None:
    gold, predicted = list("AABC"), list("AACC")
    options = ["AB", "AB", "BC", "BC"]
    found = scores.funbench([FILE] * 4, gold, predicted, options)
    # B is offered everywhere: 0 of 1 found, 3 of 3 left alone -> 0. C is offered twice: 1 of 1, 0 of 1 -> 0.
    assert found.labels[FILE]["B"] == (0.0, 1.0, 0.0)
    assert found.labels[FILE]["C"] == (1.0, 0.0, 0.0)
    # A is offered where it is right only: no negatives, so no score, and not in the average.
    assert found.labels[FILE]["A"] == (1.0, None, None)
    assert found.undefined == ("L4/task/file: A",)
    assert found.figures[FILE].value == 0.0


def test_predictions_that_are_no_label_are_dropped() -> None:
    found = score(list("AAB"), list("AXB"), "ABX")
    assert found.figures[FILE].value == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_several_right_answers() -> None:
    found = score(["AB", "B", "C"], ["A", "BC", "C"], "ABC")
    # A: 1/1, 2/2. B: 1/2, 1/1 -> 2/3. C: 1/1, 1/2 -> 2/3.
    assert [value[2] for value in found.labels[FILE].values()] == pytest.approx([1, 2 / 3, 2 / 3])


def test_all_wrong_is_zero_where_the_official_script_has_nan() -> None:
    assert score(list("AABB"), list("BBAA"), "AB").figures[FILE].value == 0.0


def test_levels_average_tasks_which_average_files() -> None:
    files = (
        [("L1", "a", "a")] * 4 + [("L3", "b", "b0")] * 2 + [("L3", "b", "b1")] * 2 + [("L3", "c", "c")] * 2
    )
    gold = list("AAAA") + list("AB" * 3)
    predicted = list("AAAB") + list("AB") + list("BA") + list("AB")
    found = scores.funbench(files, gold, predicted, ["AB"] * 10)
    values = {"/".join(key): figure.value for key, figure in found.figures.items()}
    assert values == {
        **{"": 0.75, "L1": 0.75, "L1/a": 0.75, "L1/a/a": 0.75},
        **{"L3": 0.75, "L3/b": 0.5, "L3/b/b0": 1.0, "L3/b/b1": 0.0, "L3/c": 1.0, "L3/c/c": 1.0},
    }
    assert found.figures[()].n == 10
    assert found.figures["L3",].n == 6
    assert found.figures["L3", "b"].n == 4


def test_files_of_one_image_are_resampled_together() -> None:
    """Two files with the same answers about the same images: their mean varies as each alone does."""
    gold, predicted = list("AABB" * 10), list("AABA" * 10)
    images = [f"i{k}" for k in range(40)]
    one = scores.funbench([("L4", "t", "f0")] * 40, gold, predicted, ["AB"] * 40, units=images)
    files = [("L4", "t", "f0")] * 40 + [("L4", "t", "f1")] * 40
    two = scores.funbench(files, gold * 2, predicted * 2, ["AB"] * 80, units=images * 2)
    apart = scores.funbench(files, gold * 2, predicted * 2, ["AB"] * 80)

    def width(found: scores.FunBenchScores) -> float:
        figure = found.figures[()]
        assert figure.low is not None
        assert figure.high is not None
        return figure.high - figure.low

    assert width(two) == pytest.approx(width(one), rel=0.1)
    assert width(apart) < 0.85 * width(one)


def test_no_answers() -> None:
    assert scores.funbench([], [], [], []).figures == {}


def test_majority_is_of_each_stratum() -> None:
    answers = ["a", "a", "b", "c", "b", "b", "a"]
    strata = ["CFP"] * 3 + ["OCT"] * 4
    best, hits = scores.majority(answers, strata)
    assert best == {"CFP": "a", "OCT": "b"}
    assert hits.tolist() == [True, True, False, False, True, True, False]
    assert scores.majority(["z", "b"], ["s", "s"])[0] == {"s": "b"}  # a tie: the first in order


def test_findings_by_hand() -> None:
    gold = [{"drusen"}, {"microaneurysm", "haemorrhage"}, set()]
    claimed = [{"drusen", "haemorrhage"}, {"microaneurysm"}, set()]
    names, table = scores.finding_table(gold, claimed)
    assert names == ("drusen", "haemorrhage", "microaneurysm")
    pooled = scores.finding_figures(table)
    assert {name: (figure.value, figure.n) for name, figure in pooled.items()} == {
        "precision": (pytest.approx(2 / 3), 3),
        "recall": (pytest.approx(2 / 3), 3),
        "f1": (pytest.approx(2 / 3), 4),
    }
    haemorrhage = scores.finding_figures(table[:, [1]])
    assert [haemorrhage[name].value for name in ("precision", "recall", "f1")] == [0.0, 0.0, 0.0]
    nothing = scores.finding_figures(scores.finding_table([set()], [set()])[1])
    assert [figure.value for figure in nothing.values()] == [None, None, None]


# Rows of the paper's table 5: overall, FunBench, Omni-Fundus, GMAI-Fundus; then L1 L2 L3 L4, MR AI LG DD and
# AR NT BVR DD SG.
TABLE_5 = """
A 48.3 41.0 66.4 37.4 88.1 40.8 21.7 13.6 96.4 87.4 44.6 37.3 31.3 25.3 74.7 37.1 18.6
B 53.8 58.9 71.1 31.4 69.3 95.8 20.4 50.0 94.2 91.9 51.7 46.4 24.7 16.0 65.3 33.4 17.6
C 55.5 53.9 68.1 44.6 76.8 71.5 27.2 40.2 92.4 92.8 36.2 50.9 38.7 27.3 85.3 32.0 39.7
D 52.5 53.1 71.3 33.0 88.4 57.7 30.5 35.7 95.4 93.8 43.4 52.7 28.0 19.3 37.3 43.3 37.1
E 56.5 61.9 67.7 39.8 90.4 83.8 18.1 55.4 97.6 89.3 26.2 57.7 38.0 10.0 81.3 41.2 28.5
F 59.0 64.7 71.4 41.0 92.1 94.3 29.8 42.7 92.7 87.2 53.7 51.8 22.0 24.7 72.0 51.0 35.2
G 65.6 67.1 79.8 50.1 90.5 90.9 33.9 52.9 93.8 92.1 63.4 69.7 38.0 16.7 92.0 57.0 46.9
H 60.3 63.2 75.6 42.1 91.0 89.7 30.7 41.6 93.2 91.7 54.5 63.0 31.3 14.0 69.3 51.5 44.2
I 63.8 66.6 77.4 47.5 92.8 94.5 31.4 47.9 97.0 93.8 58.4 60.3 40.7 11.3 90.7 52.9 41.7
J 61.8 61.7 76.7 47.0 93.4 82.6 31.7 39.1 94.3 96.0 57.1 59.5 35.3 12.0 88.0 52.6 47.1
""".strip().splitlines()


@pytest.mark.parametrize("row", TABLE_5, ids=[row[0] for row in TABLE_5])
def test_averages_of_the_paper(row: str) -> None:
    overall, *printed = (float(cell) for cell in row.split()[1:])
    parts = iter(printed[3:])
    computed = {
        benchmark: scores.paper_average(benchmark, {group: next(parts) for group in groups})
        for benchmark, groups in scores.PAPER_GROUPS.items()
    }
    assert list(computed.values()) == pytest.approx(printed[:3], abs=0.1001)
    assert scores.paper_average("overall", computed) == pytest.approx(overall, abs=0.1001)


def test_averages_need_all_their_groups() -> None:
    with pytest.raises(ConfigError, match="FunBench averages L1, L2, L3, L4, but got L1"):
        scores.paper_average("FunBench", {"L1": 1.0})
    with pytest.raises(ConfigError, match="unknown"):
        scores.paper_average("MMLU", {})


def test_table_6_of_the_paper_is_the_same_harmonic_mean() -> None:
    """Microaneurysms: sensitivity 78.3 and specificity 49.5 are printed as S2 = 60.7."""
    sums = np.array([783.0, 217.0, 495.0, 505.0])
    assert 100 * scores.label_scores(sums) == pytest.approx(60.7, abs=0.05)
