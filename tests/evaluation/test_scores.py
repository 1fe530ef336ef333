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


# Table 7: FunBench, Omni-Fundus, GMAI-Fundus, average.
TABLE_7 = """
Qwen2.5-VL-3B 41.0 66.4 37.4 48.3
InternVL2.5-8B 51.0 55.6 48.2 51.6
Qwen2.5-VL-7B 46.1 68.1 42.1 52.1
HealthGPT-M3-7B 52.4 64.0 46.3 54.2
HuatuoGPT-Vision-7B 59.0 69.6 47.3 58.6
Lingshu-7B 55.1 97.7 58.7 70.5
MedVLM-R1 46.2 56.3 37.1 46.6
QoQ-Med-7B 62.5 57.9 32.8 51.1
FundusExpert-8B 48.3 78.4 71.1 65.9
OphthaReason-Intern 44.9 57.7 44.1 48.9
OphthaReason-Qwen 48.8 62.4 49.7 53.6
Med-R1-fundus 48.2 79.2 36.5 54.7
Fundus-R1-3B 67.1 79.8 50.1 65.6
Fundus-R1-7B 69.2 91.1 61.1 73.8
""".strip().splitlines()


@pytest.mark.parametrize("row", TABLE_7, ids=[row.split()[0] for row in TABLE_7])
def test_averages_of_table_7(row: str) -> None:
    *parts, average = (float(cell) for cell in row.split()[1:])
    computed = scores.paper_average("overall", dict(zip(scores.PAPER_GROUPS, parts, strict=True)))
    assert computed == pytest.approx(average, abs=0.1001)


def test_which_counts_the_printed_accuracies_of_omni_fundus_allow() -> None:
    """docs/evaluation.md: neither all photographs nor these with OCT can be the paper's questions on anatomy,
    and photographs alone can not be those on diagnosis."""
    place = {"MR": 9, "AI": 10, "LG": 11, "DD": 12}
    column = {task: [float(row.split()[k]) for row in TABLE_5] for task, k in place.items()}

    def odd(task: str, n: int) -> list[float]:
        """The printed numbers that no count of right answers among n rounds to."""
        near = [(value, round(value * n / 100)) for value in column[task]]
        return [v for v, k in near if all(abs(100 * c / n - v) > 0.0501 for c in (k - 1, k, k + 1))]

    assert odd("MR", 1190) == odd("MR", 1678) == odd("DD", 3230) == []
    assert sorted(odd("DD", 769)) == [50.9, 59.5, 63.0]
    assert odd("AI", 439)
    assert min(n for n in range(10, 600) if not odd("AI", n)) == 531


def test_averages_need_all_their_groups() -> None:
    with pytest.raises(ConfigError, match="FunBench averages L1, L2, L3, L4, but got L1"):
        scores.paper_average("FunBench", {"L1": 1.0})
    with pytest.raises(ConfigError, match="unknown"):
        scores.paper_average("MMLU", {})


# Table 6: sensitivity, specificity, S2 of ours and of the model compared with.
TABLE_6 = (
    (78.3, 49.5, 60.7, 58.4, 23.3, 33.3),
    (73.7, 44.4, 55.4, 45.5, 51.0, 48.1),
    (78.7, 58.1, 66.9, 49.9, 65.8, 56.7),
    (48.2, 94.4, 63.8, 31.9, 85.3, 46.4),
    (62.5, 75.4, 68.3, 37.5, 81.0, 51.3),
    (55.8, 66.3, 60.6, 32.6, 72.2, 44.9),
)


def test_table_6_of_the_paper_is_the_same_harmonic_mean() -> None:
    """The last row averages the S2 of the findings; it is not the S2 of the averages."""
    for column, average in ((0, 62.6), (3, 46.8)):
        sums = [(row[column], 100 - row[column], row[column + 1], 100 - row[column + 1]) for row in TABLE_6]
        computed = 100 * scores.label_scores(np.array(sums))
        assert computed == pytest.approx([row[column + 2] for row in TABLE_6], abs=0.1)
        assert computed.mean() == pytest.approx(average, abs=0.1)
