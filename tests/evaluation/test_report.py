"""The report: what counts as right, which groups and baselines there are, and that it is JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fundus_jax.evaluation.report import Prediction, compare, evaluate, outcome_of
from fundus_jax.evaluation.table import table
from fundus_jax.records import ConfigError
from tests.evaluation.samples import DISEASES, answered, item, reply
from tests.growth import LINEAR, growth


def test_what_counts_as_right() -> None:
    one = item(answer="PDR")
    for answer in ("PDR", "pdr.", "E", "(E)", "E. PDR"):
        assert outcome_of(answered(one, answer)).correct, answer
    for answer in ("Mild NPDR", "NPDR", "A", "AMD and PDR"):
        assert not outcome_of(answered(one, answer)).correct, answer
    open_question = replace(one, lettered=False)
    assert outcome_of(answered(open_question, "E")).extracted is None
    assert outcome_of(answered(open_question, "PDR")).correct
    no_choices = replace(open_question, options=())
    assert outcome_of(answered(no_choices, "pdr")).correct
    assert outcome_of(answered(no_choices, "AMD")).extracted is None


def test_right_without_the_format() -> None:
    loose = outcome_of(Prediction(item=item(), response="The answer is PDR"))
    assert loose.correct
    assert not loose.well_formed
    assert outcome_of(answered(item(), "PDR")).well_formed


def test_where_no_trace_is_asked_for_none_is_missed() -> None:
    bare = Prediction(item=item(think=False, findings=("drusen",)), response="<answer>PDR</answer>")
    outcome = outcome_of(bare)
    assert (outcome.correct, outcome.well_formed, outcome.claimed) == (True, True, None)
    assert evaluate([bare])["findings"] is None
    assert not outcome_of(answered(bare.item, "PDR")).well_formed
    asked = Prediction(item=item(findings=("drusen",)), response="<answer>PDR</answer>")
    assert (outcome_of(asked).well_formed, outcome_of(asked).claimed) == (False, ())


def test_the_label_in_a_conclusion_is_no_finding_that_was_claimed() -> None:
    said = answered(item(findings=()), "Drusen", "Haemorrhages are seen. So the answer is Drusen.")
    assert outcome_of(said).claimed == ("haemorrhage",)


def test_several_answers_have_to_be_all_and_only() -> None:
    one = item(answers=("PDR", "AMD"), multiple=True)
    assert outcome_of(answered(one, "G, E")).correct
    assert not outcome_of(answered(one, "E")).correct
    assert not outcome_of(answered(one, "A, E, G")).correct


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """CFP: 2 of 4 right, best constant answer 3 of 4. OCT: 2 of 2 right, best constant answer 1 of 2."""
    cfp = [item(f"c{k}", answer, modality="CFP") for k, answer in enumerate(["PDR", "PDR", "PDR", "AMD"])]
    oct_ = [item(f"o{k}", answer, modality="OCT") for k, answer in enumerate(["Normal", "AMD"])]
    right = item("l1", "Yes", options=("Yes", "No"), level="L1", task="modality", part="modality")
    answers = ["PDR", "PDR", "AMD", "what?", "Normal", "AMD", "Yes"]
    return evaluate([answered(i, a) for i, a in zip([*cfp, *oct_, right], answers, strict=True)])


def value(entry: dict[str, Any]) -> tuple[float, int]:
    """Value and n of a number of the report."""
    return entry["value"], entry["n"]


def test_each_modality_has_its_own_baseline(report: dict[str, Any]) -> None:
    cfp, oct_ = report["by_modality"]["CFP"], report["by_modality"]["OCT"]
    assert value(cfp["accuracy"]) == (pytest.approx(3 / 5), 5)  # with the question about modality
    assert value(cfp["majority"]) == (pytest.approx(4 / 5), 5)
    assert value(cfp["difference"]) == (pytest.approx(-1 / 5), 5)
    assert cfp["majority_answers"] == {"CFP disease": "PDR", "CFP modality": "Yes"}
    assert value(oct_["accuracy"]) == (1.0, 2)
    assert value(oct_["majority"]) == (0.5, 2)
    assert oct_["difference"]["low"] >= 0


def test_levels_and_tasks(report: dict[str, Any]) -> None:
    assert list(report["by_level"]) == ["L1", "L4"]
    assert value(report["by_level"]["L4"]["accuracy"]) == (pytest.approx(4 / 6), 6)
    assert value(report["by_level"]["L1"]["funbench"]) == (1.0, 1)
    disease = report["funbench"]["files"]["L4/disease/disease"]
    assert disease["labels"]["PDR"] == pytest.approx({"sensitivity": 2 / 3, "specificity": 1.0, "score": 0.8})
    # AMD: 1 of 2 found, 3 of 4 left alone -> 0.6; Normal: 1 and 1
    assert report["by_task"]["disease"]["funbench"]["value"] == pytest.approx((0.8 + 0.6 + 1) / 3)
    assert report["funbench"]["overall"]["value"] == pytest.approx((1 + (0.8 + 0.6 + 1) / 3) / 2)


def test_unparsed_answers_are_counted_and_listed(report: dict[str, Any]) -> None:
    assert report["unparsed"]["ids"] == ["c3#0"]
    assert value(report["unparsed"]["share"]) == (pytest.approx(1 / 7), 7)
    assert report["findings"] is None


def test_every_number_has_an_interval_and_the_report_is_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report

    def figures(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, dict):
            own = [node] if set(node) == {"value", "n", "low", "high"} else []
            return own + [found for child in node.values() for found in figures(child)]
        return []

    found = figures(report)
    assert len(found) > 20
    for one in found:
        assert one["n"] > 0
        assert one["low"] <= one["value"] + 1e-9
        assert one["value"] <= one["high"] + 1e-9


def test_findings_come_from_the_trace() -> None:
    sick = item("s", findings=("haemorrhage", "microaneurysm"))
    blank = item("b", answer="Normal", findings=())
    unknown = item("u", findings=None)
    elsewhere = item("e", "Yes", options=("Yes", "No"), level="L3", findings=("drusen",))
    answers = [
        answered(sick, "PDR", "There are microaneurysms and hard exudates. No drusen are seen."),
        answered(blank, "Normal", "There is no haemorrhage."),
        answered(unknown, "PDR", "There are drusen."),
        answered(elsewhere, "Yes", "There are drusen."),
        Prediction(item=blank, response="no trace at all", sample=1),
    ]
    found = evaluate(answers)["findings"]
    assert found["answers"] == 3
    assert {name: value(found[name]) for name in ("precision", "recall", "f1")} == {
        "precision": (0.5, 2),
        "recall": (0.5, 2),
        "f1": (0.5, 3),
    }
    assert sorted(found["by_finding"]) == ["haemorrhage", "hard exudate", "microaneurysm"]
    assert found["by_finding"]["haemorrhage"]["recall"]["value"] == 0.0
    assert found["by_finding"]["haemorrhage"]["precision"]["value"] is None  # never claimed


def test_samples_of_one_item_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(60) < 0.5
    items = [item(f"q{k}") for k in range(60)]

    def answers(samples: int) -> list[Prediction]:
        return [
            answered(one, "PDR" if hit else "AMD", sample=s)
            for one, hit in zip(items, right, strict=True)
            for s in range(samples)
        ]

    once, thrice = evaluate(answers(1)), evaluate(answers(3))
    assert thrice["accuracy"] == {**once["accuracy"], "n": 180}
    assert (thrice["n"], thrice["items"], thrice["units"]) == (180, 60, 60)


def test_the_extraction_mode_is_used_and_reported() -> None:
    answers = [Prediction(item=item(), response="The answer is E because vessels grow on the disc")]
    assert evaluate(answers, mode="anywhere")["accuracy"]["value"] == 1.0
    strict = evaluate(answers)
    assert strict["accuracy"]["value"] == 0.0
    assert strict["extraction"] == "tail"


def test_accuracy_by_upstreams_rules_stands_beside_ours() -> None:
    """Upstream cannot read "Proliferative" among "nonproliferative" options, and takes NPDR for PDR."""
    options = ("Mild nonproliferative DR", "Proliferative DR")
    answers = [
        answered(item("a", options[0], options=options), options[0]),
        answered(item("b", "PDR"), "NPDR"),
        answered(item("c", answers=("PDR", "AMD"), multiple=True), "E, G"),
        answered(item("d", lettered=False), "PDR"),
    ]
    found = evaluate(answers)
    assert value(found["accuracy"]) == (0.75, 4)
    assert {mode: value(one) for mode, one in found["vlmevalkit"].items()} == {
        "anywhere": (0.5, 2),
        "tail": (0.5, 2),
        "phrase": (0.5, 2),
    }
    assert evaluate(answers[2:])["vlmevalkit"] is None


def test_two_models_are_compared_item_by_item() -> None:
    items = [item(f"q{k}") for k in range(40)]
    before = [answered(one, "PDR" if k < 20 else "AMD") for k, one in enumerate(items)]
    after = [
        answered(one, "PDR" if k < 26 else "AMD", sample=s) for k, one in enumerate(items) for s in (0, 1)
    ]
    found = compare(before, after[::-1])
    assert value(found) == (pytest.approx(0.15), 40)
    assert 0 < found["low"] < 0.15 < found["high"] < 0.3
    assert compare(after, before)["value"] == pytest.approx(-0.15)
    with pytest.raises(ConfigError, match="1 items were asked on one side only, such as q0"):
        compare(before, after[2:])


def test_no_answers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no answer to score"):
        evaluate([])


def test_the_table_names_every_group(report: dict[str, Any]) -> None:
    text = table(report)
    for name in (
        "accuracy",
        "modality CFP",
        "modality OCT",
        "level L4",
        "task disease",
        "best constant answer",
    ):
        assert name in text
    assert "7 answers to 7 items of 7 patients or images; extraction: tail" in text
    row = next(line for line in text.splitlines() if line.startswith("modality OCT"))
    assert row.split() == ["modality", "OCT", "100.0", "[100.0,", "100.0]", "2"]
    assert "without a FunBench score" not in text
    lone = table(
        evaluate(
            [
                answered(item("a", "PDR", options=("PDR", "AMD")), "PDR"),
                answered(item("b", "AMD", options=("AMD", "Normal")), "AMD"),
            ]
        )
    )
    assert "without a FunBench score: L4/disease/disease: PDR" in lone
    assert max(len(line) for line in text.splitlines()) < 100


def test_scoring_takes_linear_time() -> None:
    rng = np.random.default_rng(0)
    think = "There are microaneurysms, haemorrhages and hard exudates. No neovascularisation is seen. " * 3
    predictions = [
        Prediction(
            item=item(f"q{k}", DISEASES[k % 7], modality=("CFP", "OCT", "UWF")[k % 3], findings=("drusen",)),
            response=reply(DISEASES[rng.integers(7)], think),
            sample=s,
        )
        for k in range(900)
        for s in range(3)
    ]
    assert growth(lambda size: evaluate(predictions[:size]), len(predictions)) < LINEAR
