"""Published scores: rules apart from our reading, groups with intervals, what is partial says so."""

from __future__ import annotations

import numpy as np
import pytest

from fundus_jax.evaluation import scores
from fundus_jax.evaluation.report import Prediction, evaluate
from fundus_jax.evaluation.table import table
from fundus_jax.records import ConfigError
from tests.evaluation.samples import answered, item

OMNI = ("MR", "AI", "LG", "DD")


def test_the_score_is_the_mean_of_groups_whatever_their_sizes() -> None:
    groups = ["MR"] * 100 + ["AI"] * 4 + ["LG"] * 2 + ["DD"] * 10
    hits = [True] * 90 + [False] * 10 + [True] * 3 + [False] + [True, False] + [False] * 10
    found = scores.group_figures("Omni-Fundus", groups, hits)
    assert {name: found[name].value for name in OMNI} == pytest.approx(
        {"MR": 0.9, "AI": 0.75, "LG": 0.5, "DD": 0}
    )
    assert found[""].value == pytest.approx((0.9 + 0.75 + 0.5 + 0) / 4)
    assert {name: one.n for name, one in found.items()} == {"MR": 100, "AI": 4, "LG": 2, "DD": 10, "": 116}
    assert found[""].low is not None
    assert found[""].high is not None
    assert found[""].low < found[""].value < found[""].high
    with pytest.raises(ConfigError, match="does not average"):
        scores.group_figures("Omni-Fundus", ["OBA"], [True])
    with pytest.raises(ConfigError, match="does not average"):
        scores.group_figures("MMLU", [], [])


def test_a_group_without_answers_leaves_no_score() -> None:
    found = scores.group_figures("Omni-Fundus", ["MR", "AI", "LG"], [True, True, False])
    assert found["DD"].value is None
    assert found[""].value is None


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Groups of 60, 40, 50 and 30 with known shares: about 95 of 100 intervals hold the true mean."""
    rng = np.random.default_rng(3)
    sizes, shares = (60, 40, 50, 30), (0.9, 0.6, 0.5, 0.3)
    groups = [name for name, size in zip(OMNI, sizes, strict=True) for _ in range(size)]
    odds = np.repeat(shares, sizes)
    held = 0
    for trial in range(100):
        one = scores.group_figures("Omni-Fundus", groups, rng.random(len(odds)) < odds, seed=trial)[""]
        assert one.low is not None
        assert one.high is not None
        held += one.low <= np.mean(shares) <= one.high
    assert 87 <= held <= 100


def test_sets_by_hand() -> None:
    found = scores.set_figures([{"a", "b"}, {"a"}, {"c"}], [{"b", "c"}, {"a"}, set()])
    values = {name: one.value for name, one in found.items()}
    assert values == pytest.approx({"exact": 1 / 3, "precision": 0.5, "recall": 0.5, "f1": 0.5})
    with pytest.raises(ConfigError, match="without a right answer"):
        scores.set_figures([set()], [{"a"}])


def omni(name: str, task: str, said: str = "Mild NPDR") -> Prediction:
    """A question of Omni-Fundus, answered with the right text."""
    return answered(item(name, "Mild NPDR", level="", task=task, part=f"{task}-SET"), said)


def test_published_numbers_are_made_by_published_rules() -> None:
    """ "PDR" stands inside of "Mild NPDR": VLMEvalKit's rules find two options in it, and so none."""
    report = evaluate([*(omni(f"q{k}", k) for k in OMNI), omni("l", "MR", "(B)")], published="Omni-Fundus")
    assert report["accuracy"]["value"] == 1.0
    assert report["unparsed"]["share"]["value"] == 0.0
    found = report["published"]
    assert found["extraction"] == "tail"
    assert {name: one["value"] for name, one in found["groups"].items()} == {
        "MR": 0.5,
        "AI": 0,
        "LG": 0,
        "DD": 0,
    }
    assert found["score"]["value"] == 0.125
    assert (found["unparsed"], found["unparsed_ids"]) == (4, [f"q{k}" for k in OMNI])
    assert report["by_level"] == {}
    assert report["funbench"] is None


def test_the_table_says_partial_at_every_number() -> None:
    answers = [omni(f"q{task}", task) for task in OMNI]
    reasons = ("3 of 9 images are not under images: a, b, c",)
    whole, part = (
        table(evaluate(answers, published="Omni-Fundus", partial=partial)) for partial in ((), reasons)
    )
    assert "PARTIAL" not in whole
    numbers = [line for line in part.splitlines() if "[" in line or "  -  " in line]
    assert len(numbers) > 10
    assert all(line.endswith("  PARTIAL") for line in numbers)
    assert part.splitlines()[-2] == "PARTIAL: 3 of 9 images are not under images: a, b, c"
    assert "Omni-Fundus as published, rules: tail" in part
    assert "unparsed by the rules tail" in part


def test_funbench_by_other_rules_than_our_reading() -> None:
    yes = item("y", "Yes", options=("Yes", "No"), level="L4", task="L4a", part="L4a-binary")
    no = item("n", "No", options=("Yes", "No"), level="L4", task="L4a", part="L4a-binary")
    said = [
        Prediction(item=yes, response="A"),
        Prediction(item=no, response="the other one, number two of these options"),
    ]
    found = evaluate(said, published="FunBench")["published"]
    assert found["lacking"] == ["L1", "L2", "L3"]
    assert found["score"]["value"] is None
    assert found["groups"]["L4"]["value"] == 1.0  # Yes: found, and left alone where nothing was read
    assert found["unparsed_ids"] == ["n"]
